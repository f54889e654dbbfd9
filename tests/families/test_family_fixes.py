"""Fixes for single families, beyond the laws that the common suites hold all families to."""

import contextlib
import copy
import functools
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from support.embedders import embedder, save_checkpoint, text
from support.families import FAMILIES, tiny_model, tokens
from support.tolerances import CHUNKED, COSINE, HIDDEN, NO_WORSE_FACTOR, error
from torch.nn.functional import cosine_similarity, silu, softplus
from transformers.models.jamba.modeling_jamba import mamba_selective_scan as jamba_scan
from transformers.models.mamba.modeling_mamba import mamba_selective_scan as mamba_scan

import compat
from compat import ops
from compat.families import delta, mamba1, rwkv4
from compat.families.lookup import backbone_of
from compat.installed.recurrent_cache import modeling

FEW = settings().max_examples // 3


def streamed(model, ids, size=7, mask=None):
    chunks = compat.iter_chunks(model, input_ids=ids, attention_mask=mask, vertical_chunk_size=size)
    return torch.cat([hidden for _, hidden in chunks], 1)


@torch.no_grad()
def in_one_pass(model, ids, **kwargs):
    return model(input_ids=ids, **kwargs).last_hidden_state


# Mamba-1: a scan that begins from a state.


def recurrence(x, dt, A, B, C, state, D=None, z=None, delta_bias=None, delta_softplus=False):
    """Compute token by token: h = exp(dt A) h + dt B x, y = C . h + D x, gated by silu(z)."""
    if delta_bias is not None:
        dt = dt + delta_bias[:, None]
    if delta_softplus:
        dt = softplus(dt)
    outputs = []
    for t in range(x.shape[-1]):
        step = dt[..., t, None]
        state = torch.exp(step * A) * state + step * B[:, None, :, t] * x[..., t, None]
        y = (state * C[:, None, :, t]).sum(-1)
        y = y if D is None else y + D * x[..., t]
        outputs.append(y if z is None else y * silu(z[..., t]))
    return torch.stack(outputs, -1), state


def in_dtype(dtype, arguments):
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def kernel(hidden_states, dt, A, B, C, return_last_state=False, **options):
    """Compute like mamba-ssm's selective_scan_fn: from zeros, in float32; return x's dtype."""
    arguments = {"x": hidden_states, "dt": dt, "A": A, "B": B, "C": C} | options
    state = torch.zeros(*hidden_states.shape[:2], A.shape[1])
    out, last = recurrence(**in_dtype(torch.float32, arguments), state=state)
    out = out.to(hidden_states.dtype)
    return (out, last) if return_last_state else out


@pytest.mark.parametrize(
    ("scan", "dtype"),
    [
        pytest.param(mamba_scan, torch.float32, id="mamba"),
        pytest.param(jamba_scan, torch.float32, id="jamba"),
        pytest.param(kernel, torch.float32, id="kernel-float32"),
        pytest.param(kernel, torch.bfloat16, id="kernel-bfloat16"),
    ],
)
@settings(max_examples=FEW)
@given(
    optional=st.sets(st.sampled_from(["D", "z", "delta_bias"])),
    use_softplus=st.booleans(),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 20), st.integers(1, 6)),
    seed=st.integers(0, 9),
)
def test_a_mamba_scan_begins_from_a_state(scan, dtype, optional, use_softplus, shape, seed):
    batch, dim, seqlen, dstate = shape
    random = torch.Generator().manual_seed(seed)

    def randn(*size, dtype=dtype):
        return torch.randn(*size, generator=random).to(dtype)

    arguments = {
        "x": randn(batch, dim, seqlen),
        "dt": randn(batch, dim, seqlen) if use_softplus else randn(batch, dim, seqlen).abs() / 2,
        "A": -randn(dim, dstate, dtype=torch.float32).exp(),
        "B": randn(batch, dstate, seqlen),
        "C": randn(batch, dstate, seqlen),
        "delta_softplus": use_softplus,
    }
    given_options = {
        "D": randn(dim, dtype=torch.float32),
        "z": randn(batch, dim, seqlen),
        "delta_bias": randn(dim, dtype=torch.float32).abs() / 2,
    }
    arguments |= {name: value for name, value in given_options.items() if name in optional}
    state = randn(batch, dim, dstate, dtype=torch.float32)

    wanted, last = recurrence(**in_dtype(torch.float64, arguments), state=state.double())
    with pytest.MonkeyPatch.context() as patch:
        if scan is kernel:  # If mamba-ssm is installed, it is the kernel's.
            patch.setattr(mamba1, "find_spec", lambda _: object())
        token = mamba1._scans.set(mamba1._Scans(None, iter([state]), on_ops=False))
        try:
            x = arguments.pop("x")
            from_state = mamba1.with_initial_state(scan)
            found, found_last = from_state(x, **arguments, return_last_state=True)
        finally:
            mamba1._scans.reset(token)
    assert found.dtype == dtype
    assert found_last.dtype == torch.float32
    # Outputs here are sums of up to six products of normal numbers, not of order 1.
    assert error(found, wanted) <= HIDDEN[dtype] * max(1, wanted.abs().max().item())
    assert error(found_last, last) <= HIDDEN[torch.float32] * max(1, last.abs().max().item())


def test_without_a_state_the_scan_is_the_released_one():
    seen = []

    def scan(*args, **kwargs):
        seen.append((args, kwargs))
        return "what it returns"

    assert mamba1.with_initial_state(scan)(1, 2, 3, 4, 5, D=6) == "what it returns"
    assert seen == [((1, 2, 3, 4, 5), {"D": 6})]


# The ops of `compat.ops` in place of loops over tokens.

# The name of the loop in the released module.
LOOPS = dict.fromkeys(mamba1.MIXERS, "mamba_selective_scan") | {"rwkv": "rwkv_linear_attention"}
LOOPS |= {name: rule for name, rule in delta.RULES.items() if name in FAMILIES}
# Mixers of their own.
KINDS = [*mamba1.MIXERS, "rwkv", "qwen3_next", "kimi_linear"]


@pytest.fixture
def count_loops(monkeypatch):
    """Count the calls of a model type's released loop over tokens, once compat knows it."""

    def watch(model_type):
        name, calls = LOOPS[model_type], []
        module = modeling(model_type.removesuffix("_text"))
        loop = getattr(module, name)

        @functools.wraps(loop)
        def counted(*args, **kwargs):
            calls.append(None)
            return loop(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
        if model_type in delta.RULES:
            assert not delta.differs(counted, name == delta._OF_CHANNELS)
        else:
            assert not (rwkv4.differs if model_type == "rwkv" else mamba1.differs)(counted)
        backbone_of(tiny_model(model_type))
        calls.clear()
        return calls

    return watch


@pytest.mark.parametrize("model_type", LOOPS)
@pytest.mark.usefixtures("backend")
def test_chunks_and_full_passes_without_gradients_run_on_ops(model_type, count_loops):
    model, ids = tiny_model(model_type), tokens(2, 33)
    wanted = in_one_pass(model, ids, use_cache=False)
    loops = count_loops(model_type)
    assert error(streamed(model, ids), wanted) <= CHUNKED[torch.float32]
    with compat.vertical_chunking():
        found = in_one_pass(model, ids, use_cache=False)
    assert error(found, wanted) <= CHUNKED[torch.float32]
    assert not loops


@pytest.mark.parametrize("model_type", [name for name in KINDS if name != "rwkv"])  # No mask.
@pytest.mark.usefixtures("backend")
def test_a_padded_full_pass_on_ops_is_that_of_the_rows_alone(model_type):
    model, ids = tiny_model(model_type), tokens(2, 33)
    mask = torch.ones_like(ids)
    mask[0, :9] = mask[1, 30:] = 0
    with compat.vertical_chunking():
        found = in_one_pass(model, ids, attention_mask=mask, use_cache=False)
    for row in range(2):
        real = mask[row].bool()
        wanted = in_one_pass(model, ids[row : row + 1, real], use_cache=False)
        assert error(found[row, real], wanted[0]) <= CHUNKED[torch.float32]


@pytest.mark.parametrize("model_type", KINDS)
@pytest.mark.parametrize("where", ["with gradients", "with a cache", "released", "autocast"])
def test_elsewhere_the_released_loop_runs(model_type, where, count_loops):
    model, ids, loops = tiny_model(model_type), tokens(2, 20), count_loops(model_type)
    with contextlib.ExitStack() as stack:
        stack.enter_context(compat.vertical_chunking())
        stack.enter_context(torch.set_grad_enabled(where == "with gradients"))
        if where == "released":
            stack.enter_context(ops.using("released"))
        if where == "autocast":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        model(input_ids=ids, use_cache=where == "with a cache")
    assert loops


# The recurrent state is carried in float32.


def recurrent_state(cache):
    """Return the tensors that the recurrence runs on, in any model's cache."""
    if isinstance(cache, list):  # rwkv: two token shifts, then numerator, denominator, maximum.
        return cache[2:]
    if hasattr(cache, "rnn_state"):
        return [part for parts in cache.rnn_state.values() for part in parts]
    if hasattr(cache, "linear_cache"):
        return [part for part in cache.linear_cache if isinstance(part, torch.Tensor)]
    if hasattr(cache, "blocks"):
        return [recurrent for _, recurrent in cache.blocks]
    layers = [getattr(layer, "recurrent_states", None) or {} for layer in cache.layers]
    return [part for states in layers for part in states.values() if part is not None]


# Layers that are convolutions only; zaya's "recurrent" is the hidden state of a token.
NO_RECURRENCE = [
    "inkling2_loop_text", "inkling2_text", "inkling_text", "lfm2", "lfm2_moe", "lfm3", "zaya",
]  # fmt: skip


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - set(NO_RECURRENCE)))
def test_the_recurrent_state_of_a_bfloat16_model_is_in_float32(model_type):
    model = tiny_model(model_type, dtype=torch.bfloat16)
    backbone, family = backbone_of(model)
    ids, state = tokens(2, 30), None
    with torch.no_grad():
        for start, end in ((0, 10), (10, 21), (21, 30)):
            _, state = family.forward(backbone, ids[:, start:end], start, state)
            parts = recurrent_state(state)
            assert parts
            assert {part.dtype for part in parts} == {torch.float32}


# bfloat16 against float32.


@torch.no_grad()
def _distances(hidden, exact):
    return 1 - cosine_similarity(hidden.double(), exact.double(), dim=-1)


def _picks(model):
    """Return whether a model has a router or an indexer.

    Rounding may flip its pick, which then costs up to 1.
    """
    parts = re.compile(r"experts|router|indexer")
    return any(parts.search(name) for name, _ in model.named_modules())


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_chunks_in_bfloat16_are_as_near_to_float32_as_one_pass_is(model_type):
    """Compare each token's cosine distance: the median always, the mean where no pick can flip.

    A flipped pick moves single tokens by more than all rounding does, in the full pass and in
    chunks alike, but not the same tokens. Then the mean is a matter of luck, and is not compared.
    """
    full, chunked = [], []
    for seed in range(3):
        ids = tokens(2, 40, seed)
        model = tiny_model(model_type, dtype=torch.bfloat16, seed=seed)
        exact = in_one_pass(tiny_model(model_type, seed=seed), ids)
        # Released xlstm cannot run in bfloat16 without a cache.
        full.append(_distances(in_one_pass(model, ids, use_cache=True), exact))
        chunked.append(_distances(streamed(model, ids), exact))
    full, chunked = torch.stack(full), torch.stack(chunked)
    slack = COSINE[torch.bfloat16]
    assert chunked.median() <= NO_WORSE_FACTOR * full.median() + slack
    if not _picks(model):
        assert chunked.mean() <= NO_WORSE_FACTOR * full.mean() + slack


# xLSTM


@pytest.mark.parametrize(
    "sizes",
    [
        {"qk_dim_factor": 0.5},
        {"v_dim_factor": 0.5},
        {"qk_dim_factor": 0.75, "v_dim_factor": 1.5, "num_heads": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [1, 5, 16])
def test_xlstm_of_any_head_dims(sizes, size):
    model, ids = tiny_model("xlstm", **sizes), tokens(2, 40)
    with pytest.raises(RuntimeError):  # In transformers 5.23.0; so the cache is ours.
        in_one_pass(model, ids, use_cache=True)
    wanted = in_one_pass(model, ids, use_cache=False)
    assert error(streamed(model, ids, size), wanted) <= CHUNKED[torch.float32]


def test_xlstm_in_bfloat16_runs_without_a_cache_after_enable():
    model, ids = tiny_model("xlstm", dtype=torch.bfloat16), tokens(2, 40)
    with pytest.raises(RuntimeError, match="dtype"):  # In transformers 5.23.0.
        in_one_pass(model, ids, use_cache=False)
    with compat.vertical_chunking():
        found = in_one_pass(model, ids, use_cache=False)
    assert found.dtype == torch.bfloat16
    exact = in_one_pass(tiny_model("xlstm"), ids)
    cached = _distances(in_one_pass(model, ids, use_cache=True), exact)
    assert _distances(found, exact).mean() <= NO_WORSE_FACTOR * cached.mean()


# RWKV-4


def test_rwkv_reads_a_batch_whose_first_chunk_is_one_token():
    """Read one token, and padding on the left that leaves one token to the first chunk."""
    model = tiny_model("rwkv")
    ids = tokens(3, 9)
    found = streamed(model, ids[:, :1])
    assert error(found, in_one_pass(model, ids[:, :1], use_cache=False)) <= CHUNKED[torch.float32]
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    found = streamed(model, ids, 2, mask)[:, 1:]
    assert error(found, in_one_pass(model, ids[:, 1:])) <= CHUNKED[torch.float32]


# Encoders as they are published: saved with a real tokenizer, loaded again.


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize(
    ("model_type", "end_of_text", "pooling"),
    [
        # Mamba Retriever (arXiv 2408.08066): the state at <EOS> is the vector.
        pytest.param("mamba", True, "lasttoken", id="mamba-retriever"),
        pytest.param("mamba2", False, "mean", id="mamba2"),
        pytest.param("rwkv", True, "lasttoken", id="rwkv"),
        pytest.param("xlstm", False, "mean", id="xlstm"),
        pytest.param("falcon_h1", True, "lasttoken", id="falcon_h1"),
    ],
)
def test_encode_of_a_saved_model(tmp_path, model_type, end_of_text, pooling, padding_side):
    checkpoint = save_checkpoint(
        tmp_path / "checkpoint", model_type, padding_side=padding_side, end_of_text=end_of_text
    )
    embedder(checkpoint, pooling=pooling).save(str(tmp_path / "saved"))
    model = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    texts = [text(length, seed) for seed, length in enumerate([60, 1, 17, 33, 16])]
    assert (model.tokenizer(texts[0])["input_ids"][-1] == model.tokenizer.eos_token_id) == (
        end_of_text
    )
    one_by_one = torch.cat([model.encode([row], convert_to_tensor=True) for row in texts])
    with compat.vertical_chunking():
        for size in (1, 16, 64):
            found = model.encode(texts, vertical_chunk_size=size, convert_to_tensor=True)
            assert _distances(found, one_by_one).max() <= COSINE[torch.float32], size


def test_rwkv_divides_its_weights_once_whoever_reads_first():
    """Let two threads meet where the released model has seen that it must, and not done it."""
    model, ids = tiny_model("rwkv"), tokens(1, 20)
    wanted = compat.last_hidden_state(copy.deepcopy(model), input_ids=ids, vertical_chunk_size=7)
    slow = property(lambda config: time.sleep(0.05) or 2)
    model.config.__class__ = type("Slow", (type(model.config),), {"rescale_every": slow})
    with ThreadPoolExecutor(2) as pool:
        read = functools.partial(
            compat.last_hidden_state, model, input_ids=ids, vertical_chunk_size=7
        )
        found = [future.result() for future in [pool.submit(read) for _ in range(2)]]
    assert all(torch.equal(one, wanted) for one in found)
