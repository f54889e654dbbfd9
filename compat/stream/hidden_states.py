"""The hidden states of a plain transformers model, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compat.families.base import Family
from compat.families.lookup import backbone_of
from compat.installed.eager import eager
from compat.installed.recurrent_cache import require_support
from compat.stream.chunk import Chunk
from compat.stream.chunk_size import settled
from compat.stream.loop import run_together, stream
from compat.stream.pooling import StreamingPooling
from compat.stream.rows import Auto, Window, align_left, batches, spans, windows


def check_inputs(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Raise a ValueError where they are not a batch of token ids and its mask."""
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError("input_ids must be an integer tensor of shape (batch, seqlen).")
    if not input_ids.numel():
        raise ValueError(f"input_ids of shape {tuple(input_ids.shape)} has no token.")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}: the mask "
            f"of the whole text, not of a chunk; found {tuple(attention_mask.shape)}."
        )


@eager
def iter_chunks(
    model: PreTrainedModel,
    *,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    vertical_chunk_size: int | Auto,
) -> Iterator[tuple[int, Tensor]]:
    """Read a batch in vertical chunks; the memory does not depend on the length of the text.

    Each chunk goes through all layers before the next one does, and the recurrent state is carried
    between them (arXiv 2604.18199). The hidden states are those of one pass over the whole text.

    Args:
        model: A transformers model of a supported family (`python -m compat status --models`),
            with or without a head.
        input_ids: (batch, seqlen) int64, on the model's device.
        attention_mask: (batch, seqlen), 1 at tokens, 0 at padding, which may stand on the left and
            on the right; None where there is no padding.
        vertical_chunk_size: Tokens in a chunk; "auto" for the fastest size. No chunk is a single
            token: size 1 is run as 2, and a last chunk of one token joins the one before it.

    Yields:
        `(start, last_hidden_state)`, with `last_hidden_state[:, j]` (batch, chunk, hidden_size)
        belonging to `input_ids[:, start + j]`; zeros at padding. No gradient is recorded.

    Raises:
        UnsupportedModelError: The model cannot be continued exactly from a state.
        TypeError: vertical_chunk_size is neither an int nor "auto".
        ValueError: vertical_chunk_size is less than 1, the shapes do not fit, there is no token, or
            padding stands between tokens.

    Rows that begin in different columns (a left-padded batch) are run apart from one another; pad
    on the right to run them as one batch. On a CPU, rows of very different lengths are run apart
    too. A hybrid's attention layers keep keys and values of the whole text: that cache grows with
    the text, and a warning says so once.
    """
    backbone, family = backbone_of(model)
    require_support()
    check_inputs(input_ids, attention_mask)
    size = settled(vertical_chunk_size, input_ids.device)
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    first, lengths = spans(attention_mask)
    if not int(lengths.max()):
        raise ValueError("attention_mask is zero everywhere: there is no token to read.")
    return _iter_columns(backbone, family, input_ids, first, lengths, size)


def _iter_columns(
    backbone: PreTrainedModel,
    family: Family,
    input_ids: Tensor,
    first: Tensor,
    lengths: Tensor,
    size: int,
) -> Iterator[tuple[int, Tensor]]:
    """`iter_chunks` after its checks: batches of rows that begin in one column, part by part."""
    parts = windows(input_ids.shape[1], size)
    streams: list[tuple[int, Tensor, Iterator[Chunk]]] = []
    for column in sorted(set(first[lengths > 0].tolist())):
        rows = ((first == column) & (lengths > 0)).nonzero()[:, 0]
        own = [(max(start - column, 0), end - column) for start, end in parts if end > column]
        tokens = input_ids[rows, column:]
        for together in batches(lengths[rows], own):
            chunks = run_together(backbone, family, tokens, lengths[rows], own, together)
            streams.append((column, rows, chunks))

    waiting: list[Window] = []  # Parts of padding before the first hidden state, of unknown width.
    like: Tensor | None = None
    for start, end in parts:
        pieces = []
        for column, rows, chunks in streams:
            if end > column and (chunk := next(chunks, None)) is not None:
                pieces.append((max(column - start, 0), rows, chunk))
                like = chunk.hidden
        if like is None:
            waiting.append((start, end))
            continue
        batch, hidden_size = len(input_ids), like.shape[-1]
        while waiting:
            before, after = waiting.pop(0)
            yield before, like.new_zeros(batch, after - before, hidden_size)
        hidden = like.new_zeros(batch, end - start, hidden_size)
        for offset, rows, chunk in pieces:
            width = chunk.hidden.shape[1]
            real = torch.arange(width, device=rows.device) < chunk.lengths[:, None]
            piece = chunk.hidden.masked_fill(~real[..., None], 0)
            hidden[rows[chunk.rows], offset : offset + width] = piece
        yield start, hidden


@eager
def last_hidden_state(
    model: PreTrainedModel,
    *,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    vertical_chunk_size: int | Auto,
) -> Tensor:
    """The hidden state of each row's last token that is not padding, (batch, hidden_size).

    Arguments and errors are those of `iter_chunks`; besides, a row without a token is a ValueError.
    """
    backbone, family = backbone_of(model)
    require_support()
    check_inputs(input_ids, attention_mask)
    size = settled(vertical_chunk_size, input_ids.device)
    tokens, lengths = align_left(input_ids, attention_mask)
    if (empty := (lengths == 0).nonzero()[:, 0]).numel():
        raise ValueError(f"Row {int(empty[0])} has no token: there is no last hidden state.")
    pooling = StreamingPooling(("lasttoken",), len(lengths))
    for chunk in stream(backbone, family, tokens, lengths, windows(tokens.shape[1], size)):
        pooling.update(chunk)
    return pooling.finalize()
