"""What all tests share: no network, and a clean state of the hooks."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

import compat

# The models are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)

settings.register_profile("default", deadline=None, max_examples=60, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=300)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _hooks_off_afterwards():
    yield
    compat.disable_vertical_chunking()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
