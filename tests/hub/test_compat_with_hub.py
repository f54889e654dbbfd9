"""compat beside kernels of the hub: which of them its fused path takes, and what it says.

A kernel of today, whose fused op has no conv states, is made here for the purpose.
"""

import json
import shutil

import hub_kernels as hub
import pytest
import torch
from families import tiny_model, tokens
from fused_packages import in_place, state_after
from test_laws_model import in_chunks
from test_models import ONE_GROUP
from tolerances import CHUNKED, error

import compat
from compat import _fused, _hub

FUSED = "mamba_split_conv1d_scan_combined"
IDS = tokens(2, 21)
ONES = torch.ones_like(IDS)
TODAY = """
from torch import nn
from . import {fused} as _op


class {fused}(nn.Module):
    def forward(
        self, zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, initial_states=None,
        dt_limit=(0.0, float("inf")), return_final_states=False, activation="silu",
        rmsnorm_weight=None, rmsnorm_eps=1e-6, outproj_weight=None, outproj_bias=None,
        headdim=None, ngroups=1, norm_before_gate=True, **kwargs,
    ):
        return _op(zxbcdt)
"""
INIT = """
def {fused}(zxbcdt, initial_states=None, seq_idx=None):
    raise RuntimeError("It is not to be called.")


from . import layers
"""


@pytest.fixture
def of_today(tmp_path):
    """A kernel as the hub has it: the layer takes anything, its function no conv states."""
    build = tmp_path / "build" / "torch-cpu"
    build.mkdir(parents=True)
    (build / "__init__.py").write_text(INIT.format(fused=FUSED))
    (build / "layers.py").write_text(TODAY.format(fused=FUSED))
    own = hub.tree("mamba-ssm") / "build" / "torch-cpu" / "metadata.json"
    metadata = json.loads(own.read_text()) | {"version": 4, "id": f"_of_today_{tmp_path.name}"}
    (build / "metadata.json").write_text(json.dumps(metadata))
    return tmp_path


@pytest.fixture
def model():
    """A Mamba2 whose norm says its groups, as that of transformers 5.23 does."""
    model = tiny_model("mamba2", **ONE_GROUP["mamba2"])
    for layer in model.layers:
        layer.mixer.norm.group_size = layer.mixer.intermediate_size
    return model


@pytest.fixture(autouse=True)
def _known_norm(monkeypatch, model):
    norm = type(model.layers[0].mixer.norm)
    monkeypatch.setattr(_fused, "_NORM_FORWARD", _fused._fingerprint(norm.forward))


def lines():
    report = compat.status()
    return report.fused, report.cpu


def test_with_kernels_installed_transformers_counts_as_before(model):
    transformers, _ = compat.status().libraries
    assert transformers.state == "native"
    assert not any("hub" in line for line in lines())
    assert not _hub.is_used(model.layers[0].mixer)


def test_a_kernel_with_conv_states_is_the_fused_path(model):
    wanted = in_chunks(model, IDS, ONES, 8)
    with hub.kernelized(model) as calls:
        found = in_chunks(model, IDS, ONES, 8)
        assert all("; in mamba2 that of the hub" in line for line in lines())
    assert set(calls) == {FUSED}
    assert calls[FUSED] == len(model.layers) * 3
    assert error(found, wanted) <= CHUNKED[torch.float32]
    assert not any("hub" in line for line in lines())


def test_its_states_are_in_the_cache(model):
    with torch.no_grad():
        wanted = state_after(model, IDS, [12, 9])
        with hub.kernelized(model) as calls:
            found = state_after(model, IDS, [12, 9])
    assert set(calls) == {FUSED}
    for layer, own in zip(found.layers, wanted.layers, strict=True):
        assert error(layer.recurrent_states[0], own.recurrent_states[0]) <= CHUNKED[torch.float32]
        assert error(layer.conv_states[0], own.conv_states[0]) <= CHUNKED[torch.float32]


def test_a_kernel_without_conv_states_is_not(model, of_today):
    """transformers' own path runs, nothing else in the kernel's place; the status says why."""
    wanted = in_chunks(model, IDS, ONES, 8)
    with hub.kernelized(model, [FUSED], of_today) as calls, in_place({}, on_gpu=False) as packages:
        found = in_chunks(model, IDS, ONES, 8)
        for line in lines():
            assert (
                f"not used in mamba2, as mamba-ssm 4 of the hub has a {FUSED} that takes no "
                "initial_conv_states, return_final_conv_states"
            ) in line
    assert not calls
    assert not packages
    assert error(found, wanted) <= CHUNKED[torch.float32]


def test_a_kernel_for_some_of_the_functions_is_not(model, monkeypatch):
    monkeypatch.setattr(_fused, "_portable", lambda *_: pytest.fail("It is not asked for."))
    with hub.kernelized(model, ["causal_conv1d_fn"]) as calls:
        in_chunks(model, IDS, ONES, 8)
        assert all("the kernels of the hub have no" in line for line in lines())
    assert set(calls) == {"causal_conv1d_fn"}


def test_a_kernel_that_hides_its_function_is_not(model, of_today):
    init = of_today / "build" / "torch-cpu" / "__init__.py"
    init.write_text(init.read_text() + f"\n{FUSED} = len\n")
    with hub.kernelized(model, [FUSED], of_today) as calls:
        in_chunks(model, IDS, ONES, 8)
    assert not calls
    shutil.rmtree(of_today)
