"""Streaming pooling is sentence-transformers' Pooling, however the text is cut."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer.modules import Pooling

from compat.stream.chunk import Chunk
from compat.stream.pooling import POOLING_MODES, StreamingPooling


def stream_of(hidden, lengths, cuts):
    """Cut (batch, seqlen, hidden_size) into chunks, with NaN at padding, which must not matter."""
    ends = [*sorted(cuts), hidden.shape[1]]
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        rows = (lengths > start).nonzero()[:, 0]
        here = (lengths[rows] - start).clamp(max=end - start)
        piece = hidden[rows, start:end].clone()
        piece[torch.arange(end - start) >= here[:, None]] = torch.nan
        yield Chunk(start, rows, here, piece)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    cuts=st.sets(st.integers(1, 11)),
    prompt_length=st.integers(0, 13),
    modes=st.lists(st.sampled_from(POOLING_MODES), min_size=1, unique=True),
)
def test_it_is_the_released_pooling(dtype, lengths, cuts, prompt_length, modes):
    lengths = torch.tensor(lengths)
    longest = int(lengths.max())
    hidden = torch.randn(len(lengths), longest, 5, dtype=torch.float64).to(dtype)
    mask = (torch.arange(longest) < lengths[:, None]).long()

    pooling = StreamingPooling(modes, len(lengths), prompt_length)
    for chunk in stream_of(hidden, lengths, {cut for cut in cuts if cut < longest}):
        pooling.update(chunk)
    found = pooling.finalize()

    features = {"token_embeddings": hidden, "attention_mask": mask, "prompt_length": prompt_length}
    released = Pooling(5, tuple(modes), include_prompt=False)(features)["sentence_embedding"]
    assert found.dtype == released.dtype
    torch.testing.assert_close(found, released)  # torch's own tolerance of each dtype is used.


def test_modes_are_those_of_the_library():
    assert set(POOLING_MODES) == set(Pooling.POOLING_MODES)


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match="attention"):
        StreamingPooling(("mean", "attention"), 1)


def test_without_a_chunk_there_is_no_embedding():
    with pytest.raises(RuntimeError, match="no chunk"):
        StreamingPooling(("mean",), 1).finalize()


@pytest.mark.parametrize("mode", ["mean", "mean_sqrt_len_tokens", "weightedmean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_beyond_the_integers_of_float32_are_exact(dtype, mode):
    """Pool two chunks of four tokens, and zeros between them that are not run: 2^25 tokens."""
    length = 2**25 + 3
    value = torch.rand(1, 4, 2, dtype=torch.float64).to(dtype)
    pooling = StreamingPooling((mode,), 1)
    for start in (0, length - 4):
        pooling.update(Chunk(start, torch.tensor([0]), torch.tensor([4]), value))

    numbers = [[Fraction(x) for x in row] for row in value[0].T.tolist()]
    places = [*range(1, 5), *range(length - 3, length + 1)]
    weights = places if mode == "weightedmean" else [1] * 8
    sums = [sum(w * x for w, x in zip(weights, [*row, *row], strict=True)) for row in numbers]
    divisor = {
        "mean": length,
        "mean_sqrt_len_tokens": Fraction(math.sqrt(length)),
        "weightedmean": Fraction(length * (length + 1), 2),
    }[mode]
    wanted = torch.tensor([[float(total / divisor) for total in sums]], dtype=torch.float64)
    found = pooling.finalize()
    assert found.dtype == dtype
    # It is a few units in the last place of the chunk's own dtype, as its four values are added in
    # it.
    assert ((found.double() - wanted) / wanted).abs().max() <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("mode", ["mean", "weightedmean"])
def test_sums_of_many_chunks_lose_nothing(mode):
    """Add one bit in the last place of a float32 for each of very many chunks."""
    count, value = 20_000, 1 + 2**-23
    pooling = StreamingPooling((mode,), 1)
    for start in range(count):
        hidden = torch.full((1, 1, 1), value)
        pooling.update(Chunk(start, torch.tensor([0]), torch.tensor([1]), hidden))
    assert pooling.finalize().item() == value
