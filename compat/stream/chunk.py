"""A chunk, as the loop gives it to pooling."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Chunk(NamedTuple):
    """Hidden states of one vertical chunk: tokens `start` to `start + width` of some rows.

    Tokens are counted from each row's first token that is not padding.

    Attributes:
        start: Index of the chunk's first token in its rows.
        rows: (n,) int64, the rows of the batch that still have tokens here.
        lengths: (n,) int64, how many of the `width` tokens are real; the rest is padding.
        hidden: (n, width, hidden_size), the hidden states; undefined at padding.
    """

    start: int
    rows: Tensor
    lengths: Tensor
    hidden: Tensor
