"""The fused path of Mamba2 on a CPU: when it is taken, and that its wiring is exact.

tests/ops/test_mamba2.py tests the op itself.
"""

import functools
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.families import tiny_model, tokens
from support.fused_packages import state_after
from support.tolerances import CHUNKED, HIDDEN, NO_WORSE_FACTOR, NO_WORSE_SLACK, error
from torch import nn

import compat
from compat import ops
from compat.families import delta, mamba2
from compat.families.lookup import backbone_of

cached_model = functools.cache(tiny_model)
ALL = sorted(mamba2.MIXERS)
F32, BF16 = torch.float32, torch.bfloat16

backends = pytest.mark.parametrize("backend", ["torch", "native"])


@contextmanager
def on(backend):
    """Run the fused path on this backend, and yield the list of the mixers that take it."""
    if backend == "native" and ops.compiled.library() is None:
        pytest.skip(ops.compiled.reason())
    calls = []
    run = mamba2.portable

    def spied(mixer, *args, **kwargs):
        calls.append(mixer)
        return run(mixer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, ops.using(backend):
        for model_type in ALL:  # Each is compared once, by runs of its own.
            backbone_of(cached_model(model_type))
        patch.setattr(mamba2, "portable", spied)
        yield calls


def released():
    return ops.using("released")


def in_chunks(model, ids=None, size=10, mask=None):
    model = cached_model(model) if isinstance(model, str) else model
    ids = tokens(2, 21) if ids is None else ids
    chunks = compat.iter_chunks(model, input_ids=ids, attention_mask=mask, vertical_chunk_size=size)
    return torch.cat([hidden for _, hidden in chunks], 1)


# In chunks.


@backends
@pytest.mark.parametrize("model_type", ALL)
@settings(max_examples=8)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3), size=st.integers(1, 35))
def test_chunks_are_what_transformers_gives(model_type, backend, lengths, size):
    ids = tokens(len(lengths), max(lengths))
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    with released():
        own = in_chunks(model_type, ids, size, mask)
    with on(backend) as calls:
        found = in_chunks(model_type, ids, size, mask)
    assert error(found, own) <= CHUNKED[F32]
    assert bool(calls) == (max(lengths) > 1)


@backends
@pytest.mark.parametrize("width", [2, 4, 5])
@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.01, 0.4)], ids=["open", "clamped"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_chunks_are_the_float64_recurrence(backend, dtype, limit, width):
    """Compare with the recurrence, and be no further from it than transformers' own path."""
    odd = {"num_heads": 3, "hidden_size": 27, "head_dim": 18, "n_groups": 1, "state_size": 7}
    shape = odd if limit[0] else {}
    model = cached_model(
        "mamba2", dtype=dtype, time_step_limit=limit, use_bias=True, conv_kernel=width, **shape
    )
    ids = tokens(1, 40)
    exact, _ = oracle.mamba2(model, ids[0].tolist())
    with released():
        own = error(in_chunks(model, ids, 9)[0], exact)
    with on(backend) as calls:
        found = error(in_chunks(model, ids, 9)[0], exact)
    assert calls
    assert found <= HIDDEN[dtype]
    assert found <= NO_WORSE_FACTOR * own + NO_WORSE_SLACK[dtype]


@torch.no_grad()
@backends
@pytest.mark.parametrize("sizes", [[9], [2, 2, 3], [12, 2], [2, 12]], ids=str)
@pytest.mark.parametrize("width", [2, 4])
def test_the_states_in_the_cache_are_those_of_transformers(backend, sizes, width):
    model, ids = cached_model("mamba2", conv_kernel=width), tokens(2, sum(sizes))
    with released():
        own = state_after(model, ids, sizes)
    with on(backend) as calls:
        found = state_after(model, ids, sizes)
    assert len(calls) == 2 * len(sizes)
    for layer, wanted in zip(found.layers, own.layers, strict=True):
        ssm, wanted_ssm = layer.recurrent_states[0], wanted.recurrent_states[0]
        assert (ssm.dtype, ssm.shape) == (torch.float32, wanted_ssm.shape)
        assert error(ssm, wanted_ssm) <= HIDDEN[F32]
        assert error(layer.conv_states[0], wanted.conv_states[0]) <= HIDDEN[F32]


# A pass without a cache.


def whole(model, ids, mask=None, **arguments):
    return model(ids, attention_mask=mask, use_cache=False, **arguments).last_hidden_state


def padded(left, right, seqlen=21):
    columns = torch.arange(seqlen)
    return ((columns >= left) & (columns < seqlen - right)).long()


MASKS = {
    "none": None,
    "of ones": torch.stack([padded(0, 0), padded(0, 0)]),
    "right": torch.stack([padded(0, 5), padded(0, 0)]),
    "left": torch.stack([padded(0, 0), padded(7, 0)]),
    "both, and a row of one token": torch.stack([padded(2, 3), padded(20, 0)]),
}


@torch.no_grad()
@backends
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("model_type", ALL)
def test_a_whole_pass_is_what_transformers_gives(model_type, backend, mask):
    model, ids, mask = cached_model(model_type), tokens(2, 21), MASKS[mask]
    own = whole(model, ids, mask)
    with on(backend) as calls, compat.vertical_chunking():
        found = whole(model, ids, mask)
    assert calls
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    assert error(found[real], own[real]) <= CHUNKED[F32]
    # Afterwards it is as before.
    assert torch.equal(whole(model, ids, mask), own)


def with_hook(model):
    model.layers[0].mixer.norm.register_forward_hook(lambda *_: None)
    model.layers[1].mixer.conv1d.register_forward_hook(lambda *_: None)


def with_shift(model):
    for layer in model.layers:
        layer.mixer.in_proj.register_forward_hook(lambda module, args, output: output + 1)


def kernelized(model):
    for layer in model.layers:
        function = nn.Module()
        function.forward = lambda: None
        vars(layer.mixer)["_kernel_funcs"] = {"causal_conv1d_fn": function}


HOLE = torch.ones(2, 21, dtype=torch.long)
HOLE[1, 9:12] = 0

# Cases that are left to transformers: options of the model, changes to it, and the call's mask.
ELSE = {
    "float64": ({"dtype": torch.float64}, None, None),
    "another activation": ({"hidden_act": "gelu"}, None, None),
    "hooks": ({}, with_hook, None),
    "kernels of the hub": ({}, kernelized, None),
    "padding between tokens": ({}, None, HOLE),
    "padding before a projection with a bias": ({"use_bias": True}, None, MASKS["left"]),
    "padding before a projection with a hook": ({}, with_shift, MASKS["left"]),
}


@torch.no_grad()
@pytest.mark.parametrize("case", ELSE)
def test_what_is_not_known_to_be_exact_takes_transformers_own_path(case):
    options, change, mask = ELSE[case]
    model, ids = tiny_model("mamba2", **options), tokens(2, 21)
    if change:
        change(model)
    own = whole(model, ids, mask)
    with on("torch") as calls, compat.vertical_chunking():
        assert torch.equal(whole(model, ids, mask), own)
    assert not calls


@torch.no_grad()
def test_calls_that_must_not_change_take_transformers_own_path():
    model, ids = cached_model("mamba2"), tokens(2, 21)

    def everything():
        with torch.enable_grad():
            yield whole(model, ids)
        with torch.autocast("cpu", BF16):
            yield whole(model, ids)
        yield model(ids, use_cache=True).last_hidden_state
        yield whole(model, ids[:, :1])
        yield whole(torch.compile(model, backend="eager"), ids)

    own = list(everything())
    with on("torch") as calls, compat.vertical_chunking():
        found = list(everything())
    assert not calls
    assert all(torch.equal(a, b) for a, b in zip(found, own, strict=True))


@torch.no_grad()
def test_without_enable_a_whole_pass_is_left_alone():
    model, ids = cached_model("mamba2"), tokens(2, 21)
    with on("torch") as calls:
        whole(model, ids)
        in_chunks(model, ids)
        assert calls
        calls.clear()
        whole(model, ids)
    assert not calls


def test_the_report_says_what_runs_on_a_cpu():
    others = ["falcon_mamba", "jamba", "mamba", "rwkv", "zamba", *delta.RULES]
    served = "; for " + ", ".join(sorted([*ALL, *others]))
    with on("torch"):
        assert compat.status().cpu.startswith("plain torch")
        assert compat.status().cpu.endswith(served)
    with on("native"):
        assert compat.status().cpu == f"native kernels, {ops.compiled.reason()}{served}"
