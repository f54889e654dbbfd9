"""The chunk loop: rows of tokens in, hidden states chunk by chunk, the state carried between them.

Rows are run without an attention mask. A row is padded on the right only, in its last chunk only,
and leaves the batch after it; so no state that is carried has ever seen padding, no causal model
can let padding reach a token, and rows do not depend on one another.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ._families import backbone_of
from ._family import Family
from ._pooling import Chunk, StreamingPooling
from ._registry import check_positions
from ._transformers import require_support

Window = tuple[int, int]

# What a run through all layers costs beside its tokens, in tokens: reading the weights, mostly.
RUN = 64


def check_chunk_size(vertical_chunk_size: object) -> int:
    """Return the vertical chunk size if it is a positive int.

    Raises:
        TypeError: It is not an int (a bool is not).
        ValueError: It is less than 1.
    """
    if isinstance(vertical_chunk_size, bool) or not isinstance(vertical_chunk_size, int):
        raise TypeError(
            "vertical_chunk_size must be an int, the number of tokens in a chunk; found "
            f"{vertical_chunk_size!r} of type {type(vertical_chunk_size).__name__}."
        )
    if vertical_chunk_size < 1:
        raise ValueError(
            "vertical_chunk_size must be at least 1, the number of tokens in a chunk; found "
            f"{vertical_chunk_size}."
        )
    return int(vertical_chunk_size)


def windows(seqlen: int, vertical_chunk_size: int) -> list[Window]:
    """Cut `seqlen` tokens into chunks `(start, end)`, none of them of one token if avoidable.

    Released models take another path for a single token, which differs from the chunk's (the time
    step is not clamped, the mask is dropped). So chunks of size 1 are run in pairs, and a last
    chunk of one token joins the chunk before it; the result is that of any other split.
    """
    size = max(vertical_chunk_size, 2)
    starts = list(range(0, seqlen, size))
    if len(starts) > 1 and seqlen - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], seqlen], strict=True))


def spans(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """First column and number of tokens of each row, both (batch,) int64.

    Args:
        attention_mask: (batch, seqlen), 1 or True at tokens and 0 or False at padding.

    Raises:
        ValueError: Padding stands between the tokens of a row.
    """
    real = attention_mask.bool()
    lengths = real.sum(1)
    first = real.int().argmax(1)
    last = real.shape[1] - 1 - real.flip(1).int().argmax(1)
    if (broken := ((lengths > 0) & (last - first + 1 != lengths)).nonzero()[:, 0]).numel():
        raise ValueError(
            f"attention_mask has zeros between the tokens of row {int(broken[0])}; padding may "
            "stand at a row's ends only. Remove those tokens from the row."
        )
    return first, lengths


def align_left(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Move each row's tokens to the row's beginning.

    Args:
        input_ids: (batch, seqlen) int64.
        attention_mask: (batch, seqlen), or None where no row has padding.

    Returns:
        The tokens, (batch, longest row), with arbitrary ids at padding, and the number of tokens
        of each row, (batch,) int64.
    """
    if attention_mask is None:
        return input_ids, input_ids.new_full((len(input_ids),), input_ids.shape[1])
    first, lengths = spans(attention_mask)
    columns = first[:, None] + torch.arange(int(lengths.max()), device=first.device)
    return input_ids.gather(1, columns.clamp(max=input_ids.shape[1] - 1)), lengths


@functools.cache
def warn_that_it_grows(model_type: str) -> None:
    """Once for each model type: what vertical chunks cannot spare a hybrid."""
    warnings.warn(
        f"{model_type} has attention layers, which keep the keys and values of the whole text: in "
        "vertical chunks its activations take constant memory, but that cache grows with the text. "
        "A model without attention, such as Mamba2, does not have it.",
        stacklevel=2,
    )


def batches(lengths: Tensor, parts: Sequence[Window]) -> list[Tensor]:
    """Which rows are run together, each (n,) int64 ascending; a row without a token in none.

    On an accelerator, all of them. On a CPU a token takes about the same time in any batch, so
    there rows go together only where that costs less in padding than runs of their own would.

    Args:
        lengths: (batch,) int64, the number of tokens of each row.
        parts: Consecutive `(start, end)` from 0; a row is padded to the end of its last part, or
            of the longest row with it.
    """
    order = lengths.argsort(descending=True, stable=True)[: int((lengths > 0).sum())]
    count = len(order)
    if lengths.device.type != "cpu" or count < 2:
        return [order.sort().values] if count else []
    longest = lengths[order]
    ends = torch.tensor([end for _, end in parts])
    last = torch.searchsorted(ends, longest)
    padded = torch.cat([ends.new_zeros(1), ends[last].cumsum(0)])
    # The first row of those behind that ends in an earlier part.
    earlier = torch.searchsorted(-last, -last, right=True)
    # The cheapest way to run the first rows, one row more at a time.
    cheapest, cuts = ends.new_zeros(count + 1), [0]
    first = torch.arange(count)
    for stop in range(1, count + 1):
        cut = earlier[:stop].clamp(max=stop)  # Before it, rows are padded to the longest's end.
        tokens = (cut - first[:stop]) * longest[:stop] + padded[stop] - padded[cut]
        costs = cheapest[:stop] + tokens + RUN * (last[:stop] + 1)
        cuts.append(int(costs.argmin()))
        cheapest[stop] = costs[cuts[-1]]
    found, stop = [], count
    while stop:
        found.append(order[cuts[stop] : stop].sort().values)
        stop = cuts[stop]
    return found


@torch.inference_mode(False)  # A state that is made in one call may be used in another's mode.
@torch.no_grad()
def stream(
    backbone: PreTrainedModel,
    family: Family,
    input_ids: Tensor,
    lengths: Tensor,
    parts: Sequence[Window],
) -> Iterator[Chunk]:
    """Run the rows part by part through all layers, and carry the state from part to part.

    Args:
        backbone: The model without its head.
        family: How its state is carried.
        input_ids: (batch, seqlen) int64, each row's tokens at its beginning.
        lengths: (batch,) int64, the number of tokens of each row.
        parts: Consecutive `(start, end)` from 0 to seqlen; a row's tokens are run in the parts
            that they reach, and not beyond.

    Yields:
        A `Chunk` for each batch of `batches` and each part that it reaches, batch after batch.
    """
    check_positions(backbone, int(lengths.max()))
    for rows in batches(lengths, parts):
        yield from _run(backbone, family, input_ids, lengths, parts, rows)


@torch.inference_mode(False)
@torch.no_grad()
def _run(
    backbone: PreTrainedModel,
    family: Family,
    input_ids: Tensor,
    lengths: Tensor,
    parts: Sequence[Window],
    rows: Tensor,
) -> Iterator[Chunk]:
    """`stream` of some rows, (n,) int64, as one batch that rows leave after their last part."""
    if family.grows:
        warn_that_it_grows(str(backbone.config.model_type))
    longest = int(lengths[rows].max())
    state: Any = None
    for start, end in parts:
        alive = (lengths[rows] > start).nonzero()[:, 0]
        if len(alive) < len(rows):
            rows = rows[alive]
            if not len(rows):
                return
            if state is not None:
                state = family.select_rows(state, alive)
        tokens = input_ids[rows, start : _stop(start, end, longest)]
        hidden, state = family.forward(backbone, tokens, start, state)
        yield Chunk(start, rows, (lengths[rows] - start).clamp(max=end - start), hidden)
        del hidden  # The next chunk's hidden states must not come on top of this one's.


def _stop(start: int, end: int, longest: int) -> int:
    """Where a part ends for rows of which the longest has so many tokens; never after one token."""
    return min(end, max(longest, start + 2))


def _check_inputs(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError("input_ids must be an integer tensor of shape (batch, seqlen).")
    if not input_ids.numel():
        raise ValueError(f"input_ids of shape {tuple(input_ids.shape)} has no token.")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}: the mask "
            f"of the whole text, not of a chunk; found {tuple(attention_mask.shape)}."
        )


def iter_chunks(
    model: PreTrainedModel,
    *,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    vertical_chunk_size: int,
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
        vertical_chunk_size: Tokens in a chunk. No chunk is a single token: size 1 is run as
            2, and a last chunk of one token joins the one before it.

    Yields:
        `(start, last_hidden_state)`, with `last_hidden_state[:, j]` (batch, chunk, hidden_size)
        belonging to `input_ids[:, start + j]`; zeros at padding. No gradient is recorded.

    Raises:
        UnsupportedModelError: The model cannot be continued exactly from a state.
        TypeError: vertical_chunk_size is not an int.
        ValueError: vertical_chunk_size is less than 1, the shapes do not fit, there is no token, or
            padding stands between tokens.

    Rows that begin in different columns (a left-padded batch) are run apart from one another; pad
    on the right to run them as one batch. On a CPU, rows of very different lengths are run apart
    too. A hybrid's attention layers keep keys and values of the whole text: that cache grows with
    the text, and a warning says so once.
    """
    backbone, family = backbone_of(model)
    require_support()
    size = check_chunk_size(vertical_chunk_size)
    _check_inputs(input_ids, attention_mask)
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    first, lengths = spans(attention_mask)
    if not int(lengths.max()):
        raise ValueError("attention_mask is zero everywhere: there is no token to read.")
    check_positions(backbone, int(lengths.max()))
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
            chunks = _run(backbone, family, tokens, lengths[rows], own, together)
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


def last_hidden_state(
    model: PreTrainedModel,
    *,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    vertical_chunk_size: int,
) -> Tensor:
    """The hidden state of each row's last token that is not padding, (batch, hidden_size).

    Arguments and errors are those of `iter_chunks`; besides, a row without a token is a ValueError.
    """
    backbone, family = backbone_of(model)
    require_support()
    size = check_chunk_size(vertical_chunk_size)
    _check_inputs(input_ids, attention_mask)
    tokens, lengths = align_left(input_ids, attention_mask)
    if (empty := (lengths == 0).nonzero()[:, 0]).numel():
        raise ValueError(f"Row {int(empty[0])} has no token: there is no last hidden state.")
    pooling = StreamingPooling(("lasttoken",), len(lengths))
    for chunk in stream(backbone, family, tokens, lengths, windows(tokens.shape[1], size)):
        pooling.update(chunk)
    return pooling.finalize()
