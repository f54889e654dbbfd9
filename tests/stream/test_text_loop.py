"""Texts side by side, as on an accelerator: each gives what it gives alone, until its end."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.embedders import character_tokenizer, text
from support.families import tiny_model
from support.tolerances import CHUNKED, error

from compat.families.lookup import backbone_of
from compat.stream.text_loop import _run, stream_texts
from compat.stream.token_ids import TokenIds
from compat.stream.tokenizer import StreamingTokenizer

TOKENIZER = StreamingTokenizer(character_tokenizer(), window=5)


def hidden_of(chunks):
    """The hidden states of each row, and the widths in which they came."""
    rows, widths = {}, []
    for chunk in chunks:
        widths.append(chunk.hidden.shape[1])
        for row, length, hidden in zip(chunk.rows, chunk.lengths, chunk.hidden, strict=True):
            assert len(torch.cat(rows.get(int(row), [hidden[:0]]))) == chunk.start
            rows.setdefault(int(row), []).append(hidden[:length])
    return {row: torch.cat(parts) for row, parts in rows.items()}, widths


@pytest.mark.parametrize("model_type", ["mamba2", "mamba", "rwkv", "xlstm", "bamba"])
@settings(max_examples=3)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4), size=st.integers(2, 12))
def test_texts_side_by_side(model_type, lengths, size):
    model = tiny_model(model_type)
    backbone, family = backbone_of(model)
    texts = [text(length, seed) for seed, length in enumerate(lengths)]
    rows = torch.arange(len(texts)) + 3

    def ids():
        return [TokenIds(TOKENIZER, [one]) for one in texts]

    together, widths = hidden_of(_run(backbone, family, ids(), rows, size))
    alone, _ = hidden_of(stream_texts(backbone, family, ids(), rows, size))
    assert together.keys() == alone.keys() == set(rows.tolist())
    assert 1 not in widths[1:]
    for row, length in zip(rows.tolist(), lengths, strict=True):
        assert len(together[row]) == length
        assert error(together[row], alone[row]) <= CHUNKED[torch.float32]


def test_ids_are_counted_and_cut():
    ended = []
    ids = TokenIds(TOKENIZER, [text(30), text(10)], "p", limit=20, at_end=ended.append)
    taken = [ids.take(8) for _ in range(4)]
    assert [len(some) for some in taken] == [8, 8, 4, 0]
    assert ended == [ids]
    assert (ids.kept, ids.count, ids.chars) == (20, 41, 40)
