"""compat beside kernels of the hub: which of them its fused path takes, and its status.

The test makes a kernel like today's, whose fused op has no conv states.
"""

import functools
import json
import shutil

import pytest
import torch
from support import hub_kernels as hub
from support.families import tiny_model, tokens
from support.fused_packages import in_place, state_after
from support.tolerances import CHUNKED, error
from transformers.models.mamba2 import modeling_mamba2

import compat
from compat.families import exact, mamba2_probe, tiny_models
from compat.families import mamba2 as _fused
from compat.families.lookup import backbone_of
from compat.installed import hub_kernels as _hub
from tests.hub.test_models import ONE_GROUP
from tests.laws.test_model import in_chunks

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
    """Make a kernel like the hub's: the layer takes anything, its function no conv states."""
    build = tmp_path / "build" / "torch-cpu"
    build.mkdir(parents=True)
    (build / "__init__.py").write_text(INIT.format(fused=FUSED))
    (build / "layers.py").write_text(TODAY.format(fused=FUSED))
    own = hub.tree("mamba-ssm") / "build" / "torch-cpu" / "metadata.json"
    metadata = json.loads(own.read_text()) | {"version": 5, "id": f"_of_today_{tmp_path.name}"}
    (build / "metadata.json").write_text(json.dumps(metadata))
    return tmp_path


@pytest.fixture(autouse=True)
def _of_one_group(monkeypatch):
    """Let compat compare a Mamba2 with one group, whose norm says over how many channels it is.

    The norm of this transformers is over all channels and does not say so. So compat, which
    compares with two groups, rightly takes none of its mixers. From 5.23 on the norm is by group,
    and says so. With one group both are the same, and all else is compared as usual. None of this
    is needed from 5.23 on.
    """
    config, norm = tiny_models.config, modeling_mamba2.MambaRMSNormGated
    monkeypatch.setattr(norm, "group_size", property(lambda self: len(self.weight)), raising=False)

    def of_one_group(model_type):
        made = config(model_type)
        for name, value in ONE_GROUP.get(model_type, {}).items():
            setattr(made, name, value)
        return made

    monkeypatch.setattr(tiny_models, "config", of_one_group)
    # Earlier verdicts are not used, and those of this test are not kept.
    of_mixer = functools.cache(mamba2_probe.of_mixer.__wrapped__)
    monkeypatch.setattr(mamba2_probe, "of_mixer", of_mixer)
    monkeypatch.setattr(exact.verdicts, "classes", {})


@pytest.fixture
def model(_of_one_group):
    return tiny_model("mamba2")


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
        # Before its first chunks the model is asked, in one pass too, which runs other kernels.
        backbone_of(model)
        calls.clear()
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
    """Expect transformers' own path, nothing else in the kernel's place; the status says why."""
    wanted = in_chunks(model, IDS, ONES, 8)
    with hub.kernelized(model, [FUSED], of_today) as calls, in_place({}, on_gpu=False) as packages:
        found = in_chunks(model, IDS, ONES, 8)
        for line in lines():
            assert (
                f"not used in mamba2, as mamba-ssm 5 of the hub has a {FUSED} that takes no "
                "initial_conv_states, return_final_conv_states"
            ) in line
    assert not calls
    assert not packages
    assert error(found, wanted) <= CHUNKED[torch.float32]


def test_a_kernel_for_some_of_the_functions_is_not(model, monkeypatch):
    wanted = in_chunks(model, IDS, ONES, 8)
    lines()  # Now compat knows all mixers: it compares no more, which would call `_portable` too.
    asked_for = "It is not asked for."
    monkeypatch.setattr(_fused, "portable", lambda *_, **__: pytest.fail(asked_for))
    with pytest.raises(pytest.fail.Exception, match=asked_for):
        in_chunks(model, IDS, ONES, 8)
    with hub.kernelized(model, ["causal_conv1d_fn"]) as calls:
        found = in_chunks(model, IDS, ONES, 8)
        assert all("the kernels of the hub have no" in line for line in lines())
    assert set(calls) == {"causal_conv1d_fn"}
    assert error(found, wanted) <= CHUNKED[torch.float32]


def test_a_kernel_that_hides_its_function_is_not(model, of_today):
    init = of_today / "build" / "torch-cpu" / "__init__.py"
    init.write_text(init.read_text() + f"\n{FUSED} = len\n")
    with hub.kernelized(model, [FUSED], of_today) as calls:
        in_chunks(model, IDS, ONES, 8)
    assert not calls
    shutil.rmtree(of_today)
