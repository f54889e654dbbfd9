"""The laws at the level of a model: chunking, padding and batching are invisible."""

import functools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.families import tiny_model
from support.tolerances import CHUNKED, HIDDEN, NO_WORSE_FACTOR, NO_WORSE_SLACK, error

import compat
from compat.families.lookup import FAMILIES, backbone_of
from compat.installed.recurrent_cache import state_of
from compat.stream.loop import stream, warn_that_it_grows
from compat.stream.rows import windows

DTYPES = [torch.float32, torch.bfloat16]
# The number of examples for a test that is run for every family or every setting.
FEW = settings().max_examples // 3


cached_model = functools.cache(tiny_model)


def tokens(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 64, (length,), generator=generator)


@st.composite
def batches(draw, max_rows=3, max_length=30):
    """Draw rows of tokens with padding on either side: (input_ids, attention_mask)."""
    lengths = draw(st.lists(st.integers(1, max_length), min_size=1, max_size=max_rows))
    left = [draw(st.integers(0, 20)) for _ in lengths]
    right = draw(st.integers(0, 20))
    width = max(a + n for a, n in zip(left, lengths, strict=True)) + right
    input_ids = tokens(len(lengths) * width, seed=draw(st.integers(0, 5))).view(-1, width)
    mask = torch.zeros_like(input_ids)
    for row, (begin, length) in enumerate(zip(left, lengths, strict=True)):
        mask[row, begin : begin + length] = 1
    return input_ids, mask


def in_chunks(model, input_ids, mask, size):
    """Return all hidden states, after checking that the chunks are consecutive."""
    pieces, column = [], 0
    for start, hidden in compat.iter_chunks(
        model, input_ids=input_ids, attention_mask=mask, vertical_chunk_size=size
    ):
        assert start == column
        column += hidden.shape[1]
        pieces.append(hidden)
    assert column == input_ids.shape[1]
    return torch.cat(pieces, 1)


@torch.no_grad()
def alone(model, input_ids, mask):
    """Run each row by itself, without its padding, in one pass; zeros at padding."""
    rows = []
    for ids, real in zip(input_ids, mask.bool(), strict=True):
        hidden = model(ids[real][None]).last_hidden_state[0]
        row = hidden.new_zeros(len(ids), hidden.shape[-1])
        row[real] = hidden
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@settings(max_examples=FEW)
@given(batch=batches(), size=st.sampled_from([1, 7, 16]) | st.integers(1, 35))
def test_chunks_give_each_row_what_it_gives_alone(model_type, batch, size):
    model = cached_model(model_type)
    input_ids, mask = batch
    found = in_chunks(model, input_ids, mask, size)
    wanted = alone(model, input_ids, mask)
    assert error(found, wanted) <= CHUNKED[torch.float32]


# Families whose released code can be run in float64; in the others, experts or a kernel's torch
# stand-in refuse it.
IN_FLOAT64 = [
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "lfm2",
    "lfm3",
    "mamba",
    "mamba2",
    "olmo_hybrid",
    "qwen3_5_text",
    "recurrent_gemma",
    "rwkv",
    "xlstm",
    "zamba",
    "zamba2",
]


@pytest.mark.parametrize("model_type", IN_FLOAT64)
@settings(max_examples=8)
@given(batch=batches(), size=st.integers(1, 35))
def test_chunks_are_no_worse_than_the_full_pass_against_float64(model_type, batch, size):
    model = cached_model(model_type)
    input_ids, mask = batch
    exact = alone(cached_model(model_type, dtype=torch.float64), input_ids, mask)
    full = max(error(alone(model, input_ids, mask), exact), _usual_error(model_type))
    chunked = error(in_chunks(model, input_ids, mask, size), exact)
    assert chunked <= NO_WORSE_FACTOR * full + NO_WORSE_SLACK[torch.float32]


@functools.cache
def _usual_error(model_type):
    """Return the largest error of full passes over eight texts.

    By chance a full pass can be much nearer to float64 than this: in qwen3_5_text its error is
    2e-6 to 2e-5 from one text to the next, and in chunks as well, but not in the same texts.
    """
    models = [cached_model(model_type, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    ids = torch.stack([tokens(30, seed) for seed in range(8)])
    single, double = (alone(model, ids, torch.ones_like(ids)) for model in models)
    return error(single, double)


@pytest.mark.parametrize("model_type", ["mamba2", "falcon_h1"])
@settings(max_examples=FEW)
@given(batch=batches(), size=st.integers(1, 35))
def test_last_hidden_state_is_that_of_the_last_token(model_type, batch, size):
    model = cached_model(model_type)
    input_ids, mask = batch
    found = compat.last_hidden_state(
        model, input_ids=input_ids, attention_mask=mask, vertical_chunk_size=size
    )
    hidden = alone(model, input_ids, mask)
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    assert error(found, hidden[torch.arange(len(last)), last]) <= CHUNKED[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.01, 0.4)], ids=["open", "clamped"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@settings(max_examples=FEW)
@given(batch=batches(max_rows=2), size=st.integers(1, 35))
def test_mamba2_in_chunks_is_the_float64_recurrence(dtype, limit, bias, batch, size):
    """Include cases where released models differ: a clamped step, a bias before the convolution."""
    model = cached_model("mamba2", dtype=dtype, time_step_limit=limit, use_bias=bias)
    input_ids, mask = batch
    exact = torch.stack([_exact_row(model, *row) for row in zip(input_ids, mask, strict=True)])
    full = error(alone(model, input_ids, mask), exact)
    chunked = error(in_chunks(model, input_ids, mask, size), exact)
    assert chunked <= HIDDEN[dtype]
    assert chunked <= NO_WORSE_FACTOR * full + NO_WORSE_SLACK[dtype]


def _exact_row(model, ids, mask):
    real = mask.bool()
    hidden, _ = oracle.mamba2(model, ids[real].tolist())
    row = hidden.new_zeros(len(ids), hidden.shape[-1])
    row[real] = hidden
    return row


@given(length=st.integers(2, 40), data=st.data(), lengths=st.lists(st.integers(1, 40), max_size=2))
def test_any_split_hands_on_the_exact_state(length, data, lengths):
    """Use unequal parts, also of one token; the longest row's final state is the recurrence's."""
    cuts = data.draw(st.sets(st.integers(1, length - 1)), label="cuts")
    ends = [*sorted(cuts), length]
    parts = list(zip([0, *ends[:-1]], ends, strict=True))
    model = tiny_model("mamba2")
    lengths = torch.tensor([length, *(min(n, length) for n in lengths)])
    ids = tokens(len(lengths) * length).view(-1, length)

    states = []
    original = model.forward

    def spy(**kwargs):
        output = original(**kwargs)
        states.append(state_of(output))
        return output

    model.forward = spy
    hidden = torch.zeros(len(lengths), length, model.config.hidden_size)
    for chunk in stream(*backbone_of(model), ids, lengths, parts):
        hidden[chunk.rows, chunk.start : chunk.start + chunk.hidden.shape[1]] = chunk.hidden

    exact, final = oracle.mamba2(model, ids[0].tolist())
    assert error(hidden[0], exact) <= HIDDEN[torch.float32]
    for row, n in enumerate(lengths.tolist()):
        wanted, _ = oracle.mamba2(model, ids[row, :n].tolist())
        assert error(hidden[row, :n], wanted) <= HIDDEN[torch.float32]
    for layer, state in zip(states[-1].layers, final, strict=True):
        assert layer.recurrent_states[0].dtype == torch.float32
        assert error(layer.recurrent_states[0][0], state.ssm) <= HIDDEN[torch.float32]
        width = state.conv.shape[-1]
        assert error(layer.conv_states[0][0, :, -width:], state.conv) <= HIDDEN[torch.float32]


@given(length=st.integers(1, 100), size=st.integers(1, 120))
def test_windows_cover_the_text_and_never_leave_one_token_over(length, size):
    parts = windows(length, size)
    assert [start for start, _ in parts] == [0, *(end for _, end in parts[:-1])]
    assert parts[-1][1] == length
    assert all(end - start > 1 for start, end in parts) or length == 1
    assert all(end - start <= max(size, 2) + 1 for start, end in parts)


def test_rows_that_have_ended_are_not_computed():
    model = tiny_model("mamba2")
    widths = []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    input_ids = tokens(3 * 40).view(3, 40)
    mask = torch.zeros_like(input_ids)
    mask[0, :5], mask[1, :20], mask[2] = 1, 1, 1
    compat.last_hidden_state(
        model, input_ids=input_ids, attention_mask=mask, vertical_chunk_size=10
    )
    assert widths == [(3, 10), (2, 10), (1, 10), (1, 10)]


def test_padding_columns_are_zero_also_before_the_first_token():
    model = tiny_model("mamba2")
    input_ids, mask = tokens(60).view(2, 30), torch.zeros(2, 30, dtype=torch.int64)
    mask[0, 17:25] = mask[1, 21:] = 1
    hidden = in_chunks(model, input_ids, mask, 6)
    assert hidden[~mask.bool()].abs().max() == 0
    assert hidden[mask.bool()].abs().amin(-1).min() > 0


def test_a_head_is_left_aside():
    from transformers import Mamba2ForCausalLM

    body = tiny_model("mamba2")
    model = Mamba2ForCausalLM(body.config).eval()
    model.backbone.load_state_dict(body.state_dict())
    ids = tokens(20)[None]
    found = in_chunks(model, ids, torch.ones_like(ids), 7)
    assert error(found, alone(body, ids, torch.ones_like(ids))) <= CHUNKED[torch.float32]


def test_a_hybrid_says_once_that_its_cache_grows():
    warn_that_it_grows.cache_clear()
    ids = tokens(12)[None]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for model_type in ("falcon_h1", "mamba2", "falcon_h1"):
            in_chunks(cached_model(model_type), ids, torch.ones_like(ids), 4)
    (only,) = said
    assert "falcon_h1 has attention layers" in str(only.message)
