"""Setup that all tests share: no network, and a clean state of the hooks."""

import os
from contextlib import nullcontext

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import Phase, settings
from support.embedders import embedder, save_checkpoint
from support.stack import FORKS

import compat
import compat.ops
from compat.ops import compiled

if FORKS:
    # The libraries must do it themselves where a test turns the hooks on.
    compat.enable_vertical_chunking = compat.status
    compat.vertical_chunking = lambda: nullcontext(compat.status())

# The models are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)

settings.register_profile("default", deadline=None, max_examples=60, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=300)
# For runs that ask only which tests fail: searching smaller examples takes long for many failures.
settings.register_profile(
    "unshrunk", settings.get_profile("default"), phases=[Phase.explicit, Phase.generate]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True, scope="session")
def _the_libraries_own_ops():
    with compat.ops.using("released") if FORKS else nullcontext():
        yield


@pytest.fixture(autouse=True)
def _hooks_off_afterwards():
    yield
    compat.disable_vertical_chunking()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def mamba2_checkpoint(tmp_path_factory):
    """Save a tiny Mamba2 with its tokenizer, and return the folder."""
    return save_checkpoint(tmp_path_factory.mktemp("mamba2"))


@pytest.fixture
def model(mamba2_checkpoint):
    """Return a new embedder for each test: that Mamba2, and mean pooling."""
    return embedder(mamba2_checkpoint)


@pytest.fixture(params=["torch", "native"])
def backend(request):
    """Choose what the ops of `compat.ops` run on."""
    if request.param == "native" and compiled.library() is None:
        pytest.skip(compiled.reason())
    with compat.ops.using(request.param):
        yield
