"""Streaming pooling is sentence-transformers' Pooling, however the text is cut."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer.modules import Pooling

from compat._pooling import POOLING_MODES, Chunk, StreamingPooling


def stream_of(hidden, lengths, cuts):
    """Cut (batch, seqlen, hidden_size) into chunks; what stands at padding must not matter."""
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

    pooling = StreamingPooling(modes, lengths, prompt_length)
    for chunk in stream_of(hidden, lengths, {cut for cut in cuts if cut < longest}):
        pooling.update(chunk)
    found = pooling.finalize()

    features = {"token_embeddings": hidden, "attention_mask": mask, "prompt_length": prompt_length}
    released = Pooling(5, tuple(modes), include_prompt=False)(features)["sentence_embedding"]
    assert found.dtype == released.dtype
    torch.testing.assert_close(found, released)  # torch's own tolerance of each dtype


def test_modes_are_those_of_the_library():
    assert set(POOLING_MODES) == set(Pooling.POOLING_MODES)


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match="attention"):
        StreamingPooling(("mean", "attention"), torch.tensor([3]))


def test_without_a_chunk_there_is_no_embedding():
    with pytest.raises(RuntimeError, match="no chunk"):
        StreamingPooling(("mean",), torch.tensor([3])).finalize()
