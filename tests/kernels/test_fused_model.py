"""Models on the fused path, with the kernels themselves.

mamba-ssm's kernels run under Triton's interpreter, causal-conv1d's CUDA sources on the emulation.
tests/families/test_mamba2_kernels.py tests when the path is taken.
"""

import functools
import importlib

import pytest
import torch
from support import oracle
from support.families import tiny_model, tokens
from support.fused_packages import in_place, kernels, state_after, transformers_own_path
from support.tolerances import CHUNKED, HIDDEN, NO_WORSE_FACTOR, NO_WORSE_SLACK, error

import compat
from ci.kernels import interpreter
from compat.families import mamba2, mamba2_kernels

if reason := interpreter.unavailable():
    pytest.skip(reason, allow_module_level=True)

from ci import forks

for model_type in mamba2.MIXERS:
    # At its import a model takes the packages that are there, but its own path must be torch.
    importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")

# Half of the heads and states of the other tests: the interpreter runs about a scan a second.
SMALL = {"num_heads": 2, "head_dim": 8, "hidden_size": 8, "state_size": 8, "n_groups": 1}


@pytest.fixture(scope="module")
def packages(emulated_conv):
    """Map "stock" or "patched" to causal-conv1d and the ops of mamba-ssm with it."""

    @functools.cache
    def load(source):
        conv = emulated_conv(source)
        return conv, interpreter.mamba_ssm(forks.sources("mamba-ssm", source), conv=conv)

    return load


@pytest.fixture(params=["composed", "whole"])
def calls(request, packages):
    """Put released or patched packages in place, and yield the calls of the fused path."""
    conv, ops = packages("stock" if request.param == "composed" else "patched")
    with in_place(kernels(conv, ops)) as made:
        assert mamba2_kernels.probe().reason.startswith("composed") == (request.param == "composed")
        yield made
    ops.check_guards()


def in_chunks(model, ids, size):
    chunks = compat.iter_chunks(model, input_ids=ids, vertical_chunk_size=size)
    return torch.cat([hidden for _, hidden in chunks], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_mamba2_is_the_float64_recurrence(calls, dtype, width):
    """Include a clamped step, biases, and a last chunk that is shorter."""
    model = tiny_model(
        "mamba2", dtype, time_step_limit=(0.01, 0.4), use_bias=True, conv_kernel=width, **SMALL
    )
    ids = tokens(1, 23)
    exact, _ = oracle.mamba2(model, ids[0].tolist())
    with transformers_own_path():
        own = error(in_chunks(model, ids, 10)[0], exact)
    assert not calls
    found = in_chunks(model, ids, 10)
    assert len(calls) == 6
    assert error(found[0], exact) <= HIDDEN[dtype]
    assert error(found[0], exact) <= NO_WORSE_FACTOR * own + NO_WORSE_SLACK[dtype]


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[12, 2], pytest.param([2, 2, 3], marks=pytest.mark.slow)])
def test_the_states_in_the_cache_are_those_of_transformers(calls, sizes):
    model, ids = tiny_model("mamba2", **SMALL), tokens(2, sum(sizes))
    _, exact = oracle.mamba2(model, ids[0].tolist())
    with transformers_own_path():
        own = state_after(model, ids, sizes)
    found = state_after(model, ids, sizes)
    assert len(calls) == 2 * len(sizes)
    for layer, wanted, once in zip(found.layers, own.layers, exact, strict=True):
        ssm, conv = layer.recurrent_states[0], layer.conv_states[0]
        assert ssm.dtype == torch.float32
        assert error(ssm, wanted.recurrent_states[0]) <= HIDDEN[torch.float32]
        assert error(conv, wanted.conv_states[0]) <= HIDDEN[torch.float32]
        assert error(ssm[0], once.ssm) <= HIDDEN[torch.float32]
        assert error(conv[0, :, 1:], once.conv) <= HIDDEN[torch.float32]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(mamba2.MIXERS))
def test_every_family_gives_what_transformers_gives(calls, model_type):
    """Use 4 heads, 2 groups, and several inner chunks; rows end in different chunks."""
    model, ids = tiny_model(model_type), tokens(2, 31)
    mask = torch.ones_like(ids)
    mask[1, 14:] = 0

    def hidden():
        chunks = compat.iter_chunks(
            model, input_ids=ids, attention_mask=mask, vertical_chunk_size=12
        )
        return torch.cat([hidden for _, hidden in chunks], 1)

    with transformers_own_path():
        own = hidden()
    assert error(hidden(), own) <= CHUNKED[torch.float32]
    assert calls
