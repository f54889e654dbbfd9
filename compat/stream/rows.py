"""Rows of tokens: where they begin, how they are cut into chunks, and which are run together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Window = tuple[int, int]
Auto = Literal["auto"]


# What a run through all layers costs beside its tokens, in tokens: reading the weights, mostly.
RUN = 64


class Step(NamedTuple):
    """One run through all layers, of rows that are run together.

    Attributes:
        start: The first token.
        stop: Behind the last one.
        rows: (n,) int64, the rows of the batch that still have tokens here.
        kept: (n,) int64, their places among the rows of the step before, from whose state they go
            on; None where the text begins.
        lengths: (n,) int64, how many of the tokens are real; the rest is padding.
    """

    start: int
    stop: int
    rows: Tensor
    kept: Tensor | None
    lengths: Tensor


def check_chunk_size(size: object, name: str = "vertical_chunk_size") -> int:
    """Return a vertical chunk size if it is a positive int; errors call it by `name`.

    Raises:
        TypeError: It is not an int (a bool is not).
        ValueError: It is less than 1.
    """
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(
            f"{name} must be an int, the number of tokens in a chunk; found {size!r} of type "
            f"{type(size).__name__}."
        )
    if size < 1:
        raise ValueError(
            f"{name} must be at least 1, the number of tokens in a chunk; found {size}."
        )
    return int(size)


def check_size_or_auto(size: object, name: str = "vertical_chunk_size") -> int | Auto:
    """Return a size of chunks if it is a positive int or "auto"; errors call it by `name`.

    Raises:
        TypeError: It is neither.
        ValueError: It is less than 1, or another str.
    """
    if isinstance(size, str):
        if size != "auto":
            raise ValueError(f'{name} must be a number of tokens or "auto"; found {size!r}.')
        return "auto"
    return check_chunk_size(size, name)


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


def require_tokens(lengths: Tensor) -> None:
    """Raise a ValueError where a row has no token, of (batch,) int64 numbers of them."""
    if (empty := (lengths == 0).nonzero()[:, 0]).numel():
        raise ValueError(
            f"Row {int(empty[0])} of attention_mask has no token: there is nothing to embed."
        )


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


def batches(lengths: Tensor, parts: Sequence[Window]) -> list[Tensor]:
    """Return which rows are run together, each (n,) int64 ascending; a row without a token in none.

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


def steps(rows: Tensor, lengths: Tensor, parts: Sequence[Window]) -> Iterator[Step]:
    """List the runs of one batch of `batches`, part by part; a row leaves after its last part.

    Args:
        rows: (n,) int64, the rows that are run together, at least one.
        lengths: (batch,) int64, the number of tokens of each row.
        parts: Consecutive `(start, end)`, from 0 or from where a state is.
    """
    longest = int(lengths[rows].max())
    for start, end in parts:
        alive = (lengths[rows] > start).nonzero()[:, 0]
        if not len(alive):
            return
        rows = rows[alive]
        stop = min(end, max(longest, start + 2))  # Never after one token.
        real = (lengths[rows] - start).clamp(max=stop - start)
        yield Step(start, stop, rows, alive if start else None, real)
