"""The fused op in inference of the fork of transformers, with the patched kernels themselves.

mamba-ssm's kernels run under Triton's interpreter, causal-conv1d's CUDA sources on the emulation.
`nox -s test-forks` runs these tests. The fork's own tests have an op that only counts.
"""

import functools

import pytest
import torch
from support import oracle
from support.families import tiny_model, tokens
from support.fused_op import MODELS, in_place
from support.stack import FORKS
from support.tolerances import CHUNKED, HIDDEN, KERNEL_SSD, NO_WORSE_FACTOR, NO_WORSE_SLACK, error

import compat
from ci.kernels import interpreter
from compat.families import mamba2
from compat.installed.recurrent_cache import modeling
from tests.laws.test_released import (
    BIAS,
    CASES,
    DROP,
    LIMIT,
    PADDED_BIAS,
    SINGLE,
    families_of,
    in_chunks,
)

if not FORKS:
    pytest.skip("needs the fork of transformers: nox -s test-forks", allow_module_level=True)
if reason := interpreter.unavailable():
    pytest.skip(reason, allow_module_level=True)

from ci import forks

# The interpreter runs about a scan a second.
SMALL = {"num_heads": 2, "head_dim": 8, "hidden_size": 8, "state_size": 8, "n_groups": 1}


@pytest.fixture(scope="module")
def ops(emulated_conv):
    """Return the ops of the patched mamba-ssm, with the patched causal-conv1d."""
    conv = emulated_conv("patched")
    return interpreter.mamba_ssm(forks.sources("mamba-ssm", "patched"), conv=conv)


@pytest.fixture
def fused(ops):
    """Return a context in which the fork's models have the fused op; it yields the op's calls."""
    yield functools.partial(in_place, ops.ssd_combined.mamba_split_conv1d_scan_combined)
    ops.check_guards()


@pytest.mark.parametrize("sizes", [[7, 1, 9], [17]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mamba2_is_the_float64_recurrence(fused, dtype, sizes):
    """Pad by more than a chunk, with biases and a clamped step."""
    config = {"time_step_limit": (0.01, 0.4), "use_bias": True, **SMALL}
    left, ids = [0, 8], tokens(2, 17)
    model = tiny_model("mamba2", dtype, **config)
    own = in_chunks(model, ids, sizes, left)
    with fused() as calls:
        found = in_chunks(model, ids, sizes, left)
    assert len(calls) == 2 * sum(size > 1 for size in sizes)
    for row, n in enumerate(left):
        exact, _ = oracle.mamba2(model, ids[row, n:].tolist())
        errors = error(found[row, n:], exact)
        assert errors <= HIDDEN[dtype]
        assert errors <= NO_WORSE_FACTOR * error(own[row, n:], exact) + NO_WORSE_SLACK[dtype]


@torch.no_grad()
@pytest.mark.parametrize(("sizes", "length"), [([17], 9), ([8, 9], 17)], ids=str)
def test_the_states_are_those_of_each_row_alone(fused, sizes, length):
    """Pad on the left, over a whole chunk, and in one pass on the right."""
    model, ids = tiny_model("mamba2", **SMALL), tokens(3, 17)
    mask = torch.ones_like(ids)
    mask[1, :8] = mask[2, length:] = 0
    state, start = None, 0
    with fused() as calls:
        for size in sizes:
            end, inputs = start + size, {"attention_mask": mask[:, : start + size], "cache": state}
            state = model(ids[:, start:end], use_cache=True, **inputs).cache
            start = end
    assert len(calls) == 2 * len(sizes)
    for row, real in enumerate(mask.bool()):
        _, exact = oracle.mamba2(model, ids[row, real].tolist())
        for layer, wanted in zip(state.layers, exact, strict=True):
            ssm, conv = layer.recurrent_states[0], layer.conv_states[0]
            assert ssm.dtype == torch.float32
            assert error(ssm[row], wanted.ssm) <= HIDDEN[torch.float32]
            assert error(conv[row, :, 1:], wanted.conv) <= HIDDEN[torch.float32]


@torch.no_grad()
def test_padding_before_tokens_that_continue_is_as_in_one_pass(fused):
    """Pad a second turn by less than the convolution looks back: the mixer's own path is taken."""
    model, ids = tiny_model("mamba2", **SMALL), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 6] = 0
    wanted = in_turns(model, ids, mask, [12])
    with fused() as calls:
        found = in_turns(model, ids, mask, [6, 6])
    assert len(calls) == 2
    assert error(found[mask.bool()], wanted[mask.bool()]) <= CHUNKED[torch.float32]


def in_turns(model, ids, mask, sizes):
    cache, pieces, start = None, [], 0
    for size in sizes:
        end = start + size
        inputs = {"attention_mask": mask[:, :end], "cache": cache}
        output = model(ids[:, start:end], use_cache=True, **inputs)
        pieces.append(output.last_hidden_state)
        cache, start = output.cache, end
    return torch.cat(pieces, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "case"),
    [
        (name, case)
        for case in CASES
        if case not in (SINGLE, DROP)
        for name in families_of(case)
        if name in MODELS
    ],
)
def test_every_family_gives_each_row_alone(fused, model_type, case):
    """Use 4 heads, 2 groups and several inner chunks; compare with the unfused path in one pass."""
    settings = {BIAS[model_type]: True} if case == PADDED_BIAS else {}
    if case == LIMIT:
        settings = {"time_step_limit": (0.02, 0.1)}
    model = tiny_model(model_type, **settings)
    sizes = CASES[case]["sizes"]
    ids, left = tokens(3, sum(sizes)), CASES[case].get("left", [0, 0, 0])
    with fused() as calls:
        found = in_chunks(model, ids, **CASES[case])
    assert calls
    for row, hidden, n in zip(ids, found, left, strict=True):
        with torch.no_grad():
            alone = model(row[None, n:], use_cache=False).last_hidden_state[0]
        assert error(hidden[n:], alone) <= CHUNKED[torch.float32]


@pytest.mark.parametrize("sizes", [[17], [8, 9]], ids=str)
def test_training_has_the_gradients_of_the_unfused_path(fused, sizes):
    """Include the gradients through the states in the cache."""
    model, ids = tiny_model("mamba2", use_bias=True, **SMALL).train(), tokens(2, 17)
    mask = torch.ones_like(ids)
    mask[1, :8] = 0

    def gradients():
        model.zero_grad()
        state, losses, start = None, [], 0
        for size in sizes:
            end = start + size
            inputs = {"attention_mask": mask[:, :end], "cache": state}
            output = model(ids[:, start:end], use_cache=len(sizes) > 1, **inputs)
            real = mask[:, start:end].bool()
            losses.append(output.last_hidden_state[real].square().sum())
            state, start = output.cache, end
        sum(losses).backward()
        return {name: weight.grad for name, weight in model.named_parameters()}

    wanted = gradients()
    with fused() as calls:
        found = gradients()
    assert len(calls) == 2 * len(sizes)
    for name, gradient in wanted.items():
        largest = max(1, gradient.abs().max().item())
        assert error(found[name], gradient) <= KERNEL_SSD[torch.float32] * largest, name


@torch.no_grad()
def test_an_op_without_the_states_is_not_for_inference(fused):
    """Leave a single token that continues to its own path, too."""
    model, ids = tiny_model("mamba2", **SMALL), tokens(1, 5)
    with fused() as calls:
        state = model(ids, use_cache=True).cache
        assert len(calls) == 2
        model(ids[:, :1], cache=state, use_cache=True)
        assert len(calls) == 2
        op = modeling("mamba2").mamba2_split_conv1d_scan_combined
        op.implementation_params = ("initial_states", "seq_idx")
        model(ids, use_cache=True)
        assert len(calls) == 2


def test_compat_leaves_a_transformers_alone_that_runs_the_op_itself(fused):
    assert not mamba2.is_native("mamba2")
    assert compat.status().fused[:6] != "native"
    with fused():
        assert mamba2.is_native("mamba2")
        assert compat.status().fused.startswith("native")
