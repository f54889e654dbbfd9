"""RWKV-7 and RWKV-6 of flash-linear-attention on a CPU: no Triton kernel runs, and all is exact.

tests/families/test_fla.py compares their chunks with one pass in Triton's interpreter.
"""

import copy
import math
import sys
from importlib.util import find_spec

import pytest
import torch
from support.tolerances import (
    CHUNKED,
    GRADIENTS,
    HIDDEN,
    NO_WORSE_FACTOR,
    NO_WORSE_SLACK,
    error,
)
from torch.nn.functional import group_norm, layer_norm

import compat
from compat import ops
from compat.families import fla_rwkv, gradients
from compat.hooks.report import Report
from tests.laws.test_gradients import gradients_of, off
from tests.laws.test_model import alone, in_chunks, tokens

# It is not imported here: that module has to prepare Triton first.
if find_spec("fla") is None:
    pytest.skip("flash-linear-attention: nox -s test-fla", allow_module_level=True)
from tests.families.test_fla import DEVICE, GPU, TEXTS, tiny

pytestmark = [
    pytest.mark.skipif(GPU, reason="on a GPU fla's own kernels run"),
    pytest.mark.filterwarnings("ignore:According to Bo:UserWarning"),
]
TYPES = ["rwkv6", "rwkv7"]
BOTH = pytest.mark.parametrize("model_type", TYPES)
IDS = tokens(150, seed=3).view(2, 75)
MASK = torch.ones_like(IDS)


@pytest.fixture
def no_triton(monkeypatch):
    """Fail where Triton's interpreter runs a kernel."""
    from triton.runtime import interpreter

    def run(*_, **__):
        raise AssertionError("a Triton kernel runs")

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run)


@torch.no_grad()
def recurrence(model, ids):
    """Read a text with RWKV-7 token by token, in float64, from its weights alone."""
    weights = {name: x.double() for name, x in model.state_dict(keep_vars=True).items()}
    config, heads = model.config, model.config.num_heads
    eps = config.norm_eps

    def norm(name, x):
        return layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    def lora(name, x, between):
        first, second = weights[f"{name}.lora.0.weight"], weights[f"{name}.lora.2.weight"]
        return between(x @ first.T) @ second.T + weights.get(f"{name}.lora.2.bias", 0.0)

    def by_head(x):
        return x.view(heads, -1)

    size = config.hidden_size
    layers = range(config.num_hidden_layers)
    shifted = {(i, part): torch.zeros(size).double() for i in layers for part in ("attn", "ffn")}
    states = [torch.zeros(heads, size // heads, size // heads).double() for _ in layers]
    outputs = []
    for token in ids:
        hidden = weights["embeddings.weight"][token]
        for i in layers:
            name = f"layers.{i}.attn"
            if i == 0:
                hidden = norm("layers.0.pre_norm", hidden)
            x = norm(f"layers.{i}.attn_norm", hidden)
            delta, shifted[i, "attn"] = shifted[i, "attn"] - x, x
            mixed = {c: x + delta * weights[f"{name}.x_{c}"].flatten() for c in "rwkvag"}
            r, k, v = (mixed[c] @ weights[f"{name}.{c}_proj.weight"].T for c in "rkv")
            w = torch.sigmoid(lora(f"{name}.w_lora", mixed["w"], torch.tanh))
            w = torch.exp(-math.exp(-0.5) * w)
            if i == 0:
                first = v
            else:
                rate = torch.sigmoid(lora(f"{name}.v_lora", mixed["v"], lambda x: x))
                v = v + rate * (first - v)
            rate = torch.sigmoid(lora(f"{name}.a_lora", mixed["a"], lambda x: x))
            gate = lora(f"{name}.g_lora", mixed["g"], torch.sigmoid)
            removal = by_head(k * weights[f"{name}.k_k"])
            removal = removal / (removal.square().sum(-1, keepdim=True) + 1e-6).sqrt()  # As in fla.
            k = k * (1 + (rate - 1) * weights[f"{name}.k_a"])
            r, w, k, v, rate = map(by_head, (r, w, k, v, rate))
            removed = (removal[..., None] * states[i]).sum(1, keepdim=True)
            states[i] = w[..., None] * states[i] - (removal * rate)[..., None] * removed
            states[i] = states[i] + k[..., None] * v[:, None]
            out = (r[..., None] * states[i]).sum(1).view(1, -1)
            own = weights[f"{name}.g_norm.weight"], weights[f"{name}.g_norm.bias"]
            out = group_norm(out, heads, *own, eps=size // heads * eps).view(heads, -1)
            out = out + (r * k * weights[f"{name}.r_k"]).sum(-1, keepdim=True) * v
            hidden = hidden + (out.flatten() * gate) @ weights[f"{name}.o_proj.weight"].T
            x, name = norm(f"layers.{i}.ffn_norm", hidden), f"layers.{i}.ffn"
            delta, shifted[i, "ffn"] = shifted[i, "ffn"] - x, x
            keys = (x + delta * weights[f"{name}.x_k"]) @ weights[f"{name}.key.weight"].T
            hidden = hidden + torch.relu(keys).square() @ weights[f"{name}.value.weight"].T
        outputs.append(norm("norm", hidden))
    return torch.stack(outputs)


@pytest.mark.usefixtures("no_triton", "backend")
@pytest.mark.parametrize("size", [7, 75])
def test_rwkv7_is_the_recurrence_of_its_paper(size):
    found = in_chunks(tiny("rwkv7"), IDS, MASK, size)
    for row, ids in zip(found, IDS, strict=True):
        assert error(row, recurrence(tiny("rwkv7"), ids)) <= HIDDEN[torch.float32]


@pytest.mark.usefixtures("no_triton", "backend")
@BOTH
def test_no_triton_kernel_runs_for_rows_padded_on_both_sides(model_type):
    model, ids, mask = tiny(model_type), IDS.clone(), MASK.clone()
    mask[0, :9] = mask[0, 60:] = mask[1, :3] = 0
    ids[mask == 0] = 5
    found = in_chunks(model, ids, mask, 20)
    for row in range(2):
        kept = mask[row].bool()
        whole = in_chunks(model, ids[row : row + 1, kept], mask[row : row + 1, kept], 75)
        assert error(found[row, kept], whole[0]) <= CHUNKED[torch.float32]
    assert not found[mask == 0].any()


@pytest.mark.usefixtures("no_triton", "backend")
@BOTH
def test_in_bfloat16(model_type):
    """Leave rounding to the dtype: chunks are no further from exact than one pass."""
    half = tiny(model_type, torch.bfloat16)
    exact_model = type(half)(half.config).eval()
    exact_model.load_state_dict(half.state_dict())
    exact = in_chunks(exact_model.double(), IDS, MASK, 75)
    full = error(in_chunks(half, IDS, MASK, 75), exact)
    chunked = error(in_chunks(half, IDS, MASK, 20), exact)
    assert full <= HIDDEN[torch.bfloat16] * exact.abs().max()
    assert chunked <= NO_WORSE_FACTOR * full + NO_WORSE_SLACK[torch.bfloat16]


@BOTH
def test_released_runs_flas_own_kernels(model_type, request):
    ids, mask = TEXTS[1][None], torch.ones_like(TEXTS[1][None])
    own = alone(tiny(model_type), ids, mask)
    with ops.using("released"):
        found = in_chunks(tiny(model_type), ids, mask, 5)
    assert error(found, own) <= CHUNKED[torch.float32]
    request.getfixturevalue("no_triton")
    with ops.using("released"), pytest.raises(AssertionError, match="a Triton kernel runs"):
        in_chunks(tiny(model_type), ids, mask, 5)


@pytest.mark.usefixtures("no_triton")
def test_outside_of_chunks_all_is_as_it_was():
    planned = fla_rwkv.plan()
    assert len(planned) == 20
    before = [getattr(owner, name) for owner, name, _ in planned]
    with fla_rwkv.PATCHED:
        now = [getattr(owner, name) for owner, name, _ in planned]
        assert not any(a is b for a, b in zip(now, before, strict=True))
        called = sys.modules["fla.layers.rwkv7"].token_shift  # Not in a chunk.
        x = torch.randn(1, 3, 4, device=DEVICE)
        with pytest.raises(AssertionError, match="a Triton kernel runs"):
            called(x)
    after = [getattr(owner, name) for owner, name, _ in planned]
    assert all(a is b for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize(
    ("module", "name", "change", "says"),
    [
        ("fla.layers.rwkv7", "gate_output_correction", None, "there is no"),
        ("fla.layers.rwkv7", "fused_k_rwkv7", lambda k, rate: k, "takes no a, ka"),
        ("fla.ops.rwkv7.fused_k_update", "k_update_ref", lambda k, a, ka: k * a, "something else"),
        ("fla.ops.rwkv7.fused_k_update", "k_update_ref", None, "to compare with"),
    ],
)
def test_another_fla_is_refused_on_a_cpu(module, name, change, says, monkeypatch):
    model = tiny("rwkv7")
    if change is None:
        monkeypatch.delattr(sys.modules[module], name)
    else:
        monkeypatch.setattr(sys.modules[module], name, change)
    fla_rwkv.differs.cache_clear()
    try:
        with pytest.raises(compat.UnsupportedModelError, match=says):
            in_chunks(model, IDS, MASK, 20)
        assert says in f"{Report(())}"
    finally:
        fla_rwkv.differs.cache_clear()


def pooled(model, size, mode="lasttoken", ids=IDS[:, :40], mask=None):
    return compat.pooled(
        model, input_ids=ids, attention_mask=mask, pooling_mode=mode, vertical_chunk_size=size
    )


@pytest.mark.usefixtures("no_triton")
def test_gradients_of_rwkv7_are_those_of_the_recurrence_of_its_paper():
    model = tiny("rwkv7", torch.float64)
    found = gradients_of(pooled(model, 9), model)
    rows = [recurrence.__wrapped__(model, ids)[-1] for ids in IDS[:, :40]]
    wanted = gradients_of(torch.stack(rows), model)
    assert max(off(found, wanted).values()) <= GRADIENTS[torch.float64]


@pytest.mark.usefixtures("no_triton")
@BOTH
@pytest.mark.parametrize("mode", ["lasttoken", "mean"])
def test_gradients_in_chunks_are_those_of_one_chunk(model_type, mode):
    """Read rows with padding on both sides, in training mode, too."""
    model, mask = tiny(model_type, torch.float64).train(), torch.ones(2, 40, dtype=torch.int64)
    mask[0, :5] = mask[1, 30:] = 0
    found = gradients_of(pooled(model, 9, mode, mask=mask), model)
    wanted = gradients_of(pooled(model, 40, mode, mask=mask), model)
    assert max(off(found, wanted).values()) <= GRADIENTS[torch.float64]


@pytest.mark.usefixtures("no_triton")
@BOTH
def test_gradients_are_those_of_differences(model_type):
    """Move the layers' weights a little, both ways, in one direction: fla's kernels are in float32.

    A norm makes much of a small change in the embeddings, which are small.
    """
    model = copy.deepcopy(tiny(model_type, torch.float64))
    named = dict(model.layers.named_parameters())
    generator = torch.Generator().manual_seed(0)
    way = {n: torch.randn(p.shape, generator=generator).to(p) for n, p in named.items()}
    gradient = torch.autograd.grad(pooled(model, 9).sum(), [*named.values()])
    found = sum(float((g * way[n]).sum()) for n, g in zip(named, gradient, strict=True))

    @torch.no_grad()
    def moved(step):
        for name, parameter in named.items():
            parameter.add_(way[name], alpha=step)
        return float(pooled(model, 40).sum())

    step = 1e-6
    wanted = (moved(step) - moved(-2 * step)) / (2 * step)
    assert abs(found - wanted) <= 1e-5 * abs(wanted)


@pytest.mark.usefixtures("no_triton")
@BOTH
def test_a_state_whose_gradient_is_cut_off_is_found(model_type, monkeypatch):
    op = f"wkv{model_type[-1]}"
    released = getattr(fla_rwkv, op)

    def cut(*args):
        out, last = released(*args)
        return out, last.detach()

    monkeypatch.setattr(fla_rwkv, op, cut)
    gradients.verdicts.models.clear()
    try:
        with pytest.raises(compat.UnsupportedModelError, match="gradient of its state"):
            pooled(tiny(model_type), 7)
    finally:
        gradients.verdicts.models.clear()


def test_status_names_both():
    assert {"rwkv6 (fla)", "rwkv7 (fla)"} <= Report(()).paths.keys()
    assert "rwkv7 (fla)" in Report(()).cpu
