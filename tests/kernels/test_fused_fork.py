"""`use_fused_scan` of the fork of transformers, with the patched kernels themselves.

mamba-ssm's kernels run under Triton's interpreter, causal-conv1d's CUDA sources on the emulation.
`nox -s test-forks` runs these tests. tests/laws/test_released.py and the fork's own tests use the
operation in plain torch.
"""

import importlib
import sys

import pytest
import torch
from support import oracle
from support.families import tiny_model, tokens
from support.fused_packages import kernels
from support.stack import FORKS
from support.tolerances import CHUNKED, HIDDEN, KERNEL_SSD, NO_WORSE_FACTOR, NO_WORSE_SLACK, error

from ci.kernels import interpreter
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

MODELS = ["bamba", "granitemoehybrid", "mamba2", "nemotron_h", "zamba2"]
MODELING = {
    name: importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in MODELS
}
# The interpreter runs about a scan a second.
SMALL = {"num_heads": 2, "head_dim": 8, "hidden_size": 8, "state_size": 8, "n_groups": 1}


@pytest.fixture(scope="module")
def packages(emulated_conv):
    """Return the patched causal-conv1d and the ops of the patched mamba-ssm."""
    conv = emulated_conv("patched")
    return conv, interpreter.mamba_ssm(forks.sources("mamba-ssm", "patched"), conv=conv)


@pytest.fixture
def calls(packages, monkeypatch):
    """Return the calls of the fused op, which the models find in the installed mamba-ssm."""
    conv, ops = packages
    made = []
    op = ops.ssd_combined.mamba_split_conv1d_scan_combined

    for name, module in kernels(conv, ops).items():
        monkeypatch.setitem(sys.modules, name, module)
    for module in MODELING.values():
        module.get_fused_scan_with_states.cache_clear()
        assert module.get_fused_scan_with_states() is op

        def counted(*args, **kwargs):
            made.append(kwargs)
            return op(*args, **kwargs)

        monkeypatch.setattr(module, "get_fused_scan_with_states", lambda: counted)
    yield made
    monkeypatch.undo()
    for module in MODELING.values():
        module.get_fused_scan_with_states.cache_clear()
    ops.check_guards()


@pytest.mark.parametrize("sizes", [[7, 1, 9], [17]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mamba2_is_the_float64_recurrence(calls, dtype, sizes):
    """Pad by more than a chunk, with biases and a clamped step."""
    config = {"time_step_limit": (0.01, 0.4), "use_bias": True, **SMALL}
    left, ids = [0, 8], tokens(2, 17)
    unfused = tiny_model("mamba2", dtype, **config)
    own = in_chunks(unfused, ids, sizes, left)
    assert not calls
    found = in_chunks(tiny_model("mamba2", dtype, use_fused_scan=True, **config), ids, sizes, left)
    assert len(calls) == 2 * sum(size > 1 for size in sizes)
    for row, n in enumerate(left):
        exact, _ = oracle.mamba2(unfused, ids[row, n:].tolist())
        errors = error(found[row, n:], exact)
        assert errors <= HIDDEN[dtype]
        assert errors <= NO_WORSE_FACTOR * error(own[row, n:], exact) + NO_WORSE_SLACK[dtype]


@torch.no_grad()
def test_the_states_are_those_of_each_row_alone(calls):
    """Pad on either side, over a whole chunk; the rows' lengths are 17, 9 and 9."""
    model, ids = tiny_model("mamba2", use_fused_scan=True, **SMALL), tokens(3, 17)
    mask = torch.ones_like(ids)
    mask[1, :8] = mask[2, 9:] = 0
    state = None
    for start, end in [(0, 8), (8, 17)]:
        inputs = {"attention_mask": mask[:, :end], "cache": state}
        state = model(ids[:, start:end], use_cache=True, **inputs).cache
    for row, real in enumerate(mask.bool()):
        _, exact = oracle.mamba2(model, ids[row, real].tolist())
        for layer, wanted in zip(state.layers, exact, strict=True):
            ssm, conv = layer.recurrent_states[0], layer.conv_states[0]
            assert ssm.dtype == torch.float32
            assert error(ssm[row], wanted.ssm) <= HIDDEN[torch.float32]
            assert error(conv[row, :, 1:], wanted.conv) <= HIDDEN[torch.float32]
    assert len(calls) == 4


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
def test_every_family_gives_each_row_alone(calls, model_type, case):
    """Use 4 heads, 2 groups and several inner chunks; compare with the unfused path in one pass."""
    settings = {BIAS[model_type]: True} if case == PADDED_BIAS else {}
    if case == LIMIT:
        settings = {"time_step_limit": (0.02, 0.1)}
    unfused = tiny_model(model_type, **settings)
    fused = tiny_model(model_type, use_fused_scan=True, **settings)
    sizes = CASES[case]["sizes"]
    ids, left = tokens(3, sum(sizes)), CASES[case].get("left", [0, 0, 0])
    found = in_chunks(fused, ids, **CASES[case])
    assert calls
    for row, hidden, n in zip(ids, found, left, strict=True):
        with torch.no_grad():
            alone = unfused(row[None, n:], use_cache=False).last_hidden_state[0]
        assert error(hidden[n:], alone) <= CHUNKED[torch.float32]


@pytest.mark.parametrize("sizes", [[17], [8, 9]], ids=str)
def test_training_has_the_gradients_of_the_unfused_path(calls, sizes):
    """Include the gradients through the states in the cache."""
    model, ids = tiny_model("mamba2", use_bias=True, **SMALL).train(), tokens(2, 17)
    mask = torch.ones_like(ids)
    mask[1, :10] = 0

    def gradients(**how):
        model.zero_grad()
        state, losses, start = None, [], 0
        for size in sizes:
            end = start + size
            inputs = {"attention_mask": mask[:, :end], "cache": state}
            output = model(ids[:, start:end], use_cache=len(sizes) > 1, **inputs, **how)
            real = mask[:, start:end].bool()
            losses.append(output.last_hidden_state[real].square().sum())
            state, start = output.cache, end
        sum(losses).backward()
        return {name: weight.grad for name, weight in model.named_parameters()}

    wanted = gradients(use_fused_scan=False)
    assert not calls
    found = gradients(use_fused_scan=True)
    assert len(calls) == 2 * len(sizes)
    for name, gradient in wanted.items():
        largest = max(1, gradient.abs().max().item())
        assert error(found[name], gradient) <= KERNEL_SSD[torch.float32] * largest, name


@torch.no_grad()
def test_it_is_chosen_by_the_config_and_by_the_call(calls):
    ids, layers = tokens(1, 5), 2
    default, fused = (
        tiny_model("mamba2", **SMALL),
        tiny_model("mamba2", use_fused_scan=True, **SMALL),
    )
    state = fused(ids, use_cache=True).cache
    assert len(calls) == layers
    for model, how in [
        (fused, {"use_fused_scan": False}),
        (default, {}),
        (default, {"use_fused_scan": False}),
        (default.train(), {}),
    ]:
        model(ids, **how)
    fused(ids[:, :1], cache=state, use_cache=True)  # A single token that continues.
    assert len(calls) == layers
    default(ids, use_fused_scan=True)
    assert len(calls) == 2 * layers
