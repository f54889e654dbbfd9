"""transformers' models on the layers of the kernel, by its own switch: the four laws.

Packing is tested where transformers takes it: in training, through `seq_idx`.
"""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import hub_kernels as hub
from support import oracle
from support.families import tiny_model, tokens
from support.tolerances import CHUNKED, HIDDEN, NO_WORSE_FACTOR, NO_WORSE_SLACK, error

from compat.installed.recurrent_cache import parameters, state_argument, state_of
from tests.laws.test_model import alone, batches, in_chunks

FEW = settings().max_examples // 3
F32, BF16 = torch.float32, torch.bfloat16
# This transformers norms over all channels; 5.23 and the fused op norm by group.
ONE_GROUP = {"mamba2": {"n_groups": 1}, "bamba": {"mamba_n_groups": 1}}
TYPES = sorted(ONE_GROUP)


@functools.cache
def model_of(model_type, dtype=F32, one_group=False):
    return tiny_model(model_type, dtype=dtype, **(ONE_GROUP[model_type] if one_group else {}))


def in_steps(model, ids, sizes):
    """Return the hidden states of pieces of these sizes through the cache, and the cache."""
    forward = type(model).forward
    name, takes_positions = state_argument(forward), "position_ids" in parameters(forward)
    cache, start, hidden = None, 0, []
    for size in sizes:
        positions = torch.arange(start, start + size)[None].expand(len(ids), -1)
        more = {"position_ids": positions} if takes_positions else {}
        output = model(ids[:, start : start + size], use_cache=True, **{name: cache}, **more)
        cache, start = state_of(output), start + size
        hidden.append(output.last_hidden_state)
    return torch.cat(hidden, 1), cache


@pytest.mark.parametrize("model_type", [*TYPES, "mamba"])
@settings(max_examples=FEW)
@given(batch=batches(), size=st.integers(1, 35))
def test_chunks_give_each_row_what_it_gives_alone(model_type, batch, size):
    """Compare chunks, padding and batches with the model's own functions."""
    model = model_of(model_type)
    wanted = alone(model, *batch)
    with hub.kernelized(model) as calls:
        found = in_chunks(model, *batch, size)
        own = alone(model, *batch)
    assert error(found, wanted) <= CHUNKED[F32]
    assert error(found, own) <= CHUNKED[F32]
    assert calls["causal_conv1d_fn"] > 0
    scan = "selective_scan_fn" if model_type == "mamba" else "mamba_chunk_scan_combined"
    assert calls[scan] > 0


@torch.no_grad()
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("sizes", [[19], [7, 12], [5, 1, 1, 1, 9, 1, 1], [1] * 19], ids=str)
def test_mamba2_and_its_cache_are_the_float64_recurrence(dtype, sizes):
    """Run prefill, and one token at a time; be no worse than the model's own functions."""
    model, ids = model_of("mamba2", dtype, one_group=True), tokens(2, 19)
    exact, states = zip(*(oracle.mamba2(model, row.tolist()) for row in ids), strict=True)
    exact = torch.stack(exact)
    stock = error(in_steps(model, ids, sizes)[0], exact)
    with hub.kernelized(model) as calls:
        found, cache = in_steps(model, ids, sizes)
    assert error(found, exact) <= HIDDEN[dtype]
    assert error(found, exact) <= NO_WORSE_FACTOR * stock + NO_WORSE_SLACK[dtype]
    for number, layer in enumerate(cache.layers):
        ssm, conv = layer.recurrent_states[0], layer.conv_states[0]
        assert ssm.dtype == F32
        for row, final in enumerate(states):
            width = final[number].conv.shape[-1]
            assert error(ssm[row], final[number].ssm) <= HIDDEN[dtype]
            assert error(conv[row, :, -width:], final[number].conv) <= HIDDEN[dtype]
    layers = len(model.layers)
    # The first piece has no state to continue from.
    steps = sum(size == 1 for size in sizes[1:])
    assert calls["mamba_chunk_scan_combined"] == layers * (len(sizes) - steps)
    assert calls["selective_state_update"] == layers * steps
    assert calls["causal_conv1d_update"] == layers * steps


@torch.no_grad()
@pytest.mark.parametrize("model_type", sorted(hub.MODELS))
def test_every_model_gives_what_its_own_functions_give(model_type):
    model, ids = tiny_model(model_type), tokens(2, 21)
    sizes = [12, 1, 1]
    wanted, wanted_cache = in_steps(model, ids, sizes)
    whole = model(ids).last_hidden_state
    with hub.kernelized(model) as calls:
        found, cache = in_steps(model, ids, sizes)
        assert error(model(ids).last_hidden_state, whole) <= CHUNKED[F32]
    assert error(found, wanted) <= CHUNKED[F32]
    training_only = {"mamba_split_conv1d_scan_combined", "mamba_inner_fn"}
    assert set(calls) == set(hub.MODELS[model_type]) - training_only
    for layer, own in zip(cache.layers, wanted_cache.layers, strict=True):
        if _recurrent(own):
            assert error(layer.recurrent_states[0], own.recurrent_states[0]) <= CHUNKED[F32]
            assert error(layer.conv_states[0], own.conv_states[0]) <= CHUNKED[F32]


def gradients(model, hidden, rows):
    """Return the gradients of a loss in which every output counts, by parameter."""
    loss = (hidden * torch.linspace(-1, 1, hidden[0].numel()).view_as(hidden[0])[None]).sum()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize("model_type", [*TYPES, "mamba"])
def test_training_takes_the_fused_op(model_type):
    """Compare hidden states and gradients with the model's own functions, which are not fused."""
    model, ids = tiny_model(model_type, **ONE_GROUP.get(model_type, {})).train(), tokens(2, 21)
    wanted = model(ids, use_cache=False).last_hidden_state
    own = gradients(model, wanted, ids)
    with hub.kernelized(model) as calls:
        found = model(ids, use_cache=False).last_hidden_state
        grads = gradients(model, found, ids)
    fused = "mamba_inner_fn" if model_type == "mamba" else "mamba_split_conv1d_scan_combined"
    assert set(calls) == {fused}
    assert error(found, wanted) <= CHUNKED[F32]
    largest = max(grad.abs().max().item() for grad in own.values())
    for name, grad in grads.items():
        assert error(grad, own[name]) <= CHUNKED[F32] * largest, name


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_packing_is_invisible(mode):
    """Run convolution and scan in eval mode, and the fused op in training."""
    model = tiny_model("mamba2", **ONE_GROUP["mamba2"])
    ids, lengths = tokens(1, 24), [5, 1, 18]
    seq_idx = torch.repeat_interleave(torch.tensor(lengths)).int()[None]
    with hub.kernelized(model.train(mode == "train")) as calls, torch.no_grad():
        packed = model(ids, use_cache=False, seq_idx=seq_idx).last_hidden_state
        parts = [
            model(part, use_cache=False).last_hidden_state for part in ids.split(lengths, dim=1)
        ]
        mixed = model(ids, use_cache=False).last_hidden_state
    assert error(packed, torch.cat(parts, 1)) <= CHUNKED[F32]
    assert error(packed, mixed) > 1e-2  # Without seq_idx the sequences do mix.
    fused = {"mamba_split_conv1d_scan_combined"}
    assert set(calls) == (fused if mode == "train" else set(hub.MAMBA2[:1]) | {hub.MAMBA2[2]})


@pytest.mark.parametrize("model_type", TYPES)
def test_going_back_leaves_no_bit_different(model_type):
    model, ids = tiny_model(model_type), tokens(2, 21)

    def results():
        with torch.no_grad():
            hidden, cache = in_steps(model.eval(), ids, [9, 1, 5])
            states = [layer.recurrent_states[0] for layer in cache.layers if _recurrent(layer)]
            return [hidden, *states, model.train()(ids, use_cache=False).last_hidden_state]

    own = results()
    with hub.kernelized(model.eval()):
        results()
    again = results()
    assert all(torch.equal(a, b) for a, b in zip(own, again, strict=True))
    for function in hub.functions(model_type).values():
        assert function.forward.__func__ is type(function).forward


def _recurrent(layer):
    return getattr(layer, "recurrent_states", [None])[0] is not None
