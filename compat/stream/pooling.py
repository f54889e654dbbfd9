"""Pooling over a stream of chunks: sentence-transformers' six modes without all token embeddings.

The module depends on torch alone, so that a library can take it over as it is. The modes and their
corner cases (the prompt left out, a text without a token) are those of `Pooling` in
sentence-transformers 6.2.0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compat.stream.chunk import Chunk

POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


class StreamingPooling:
    """Pools chunks as they come; holds one vector per row and mode, never the token embeddings.

    Args:
        modes: Names out of `POOLING_MODES`; their vectors are concatenated in this order.
        batch: How many rows there are. Their tokens are counted as they come.
        prompt_length: The first tokens of each row that are left out of the pooling.

    Raises:
        ValueError: A mode is unknown.
    """

    def __init__(self, modes: Sequence[str], batch: int, prompt_length: int = 0) -> None:
        if unknown := [mode for mode in modes if mode not in POOLING_MODES]:
            raise ValueError(f"Unknown pooling modes {unknown}; known are {POOLING_MODES}.")
        self.modes = tuple(modes)
        self.batch = batch
        self.prompt_length = prompt_length
        self._state: dict[str, Tensor] = {}
        self._dtype = self._total_dtype = torch.float32

    def update(self, chunk: Chunk) -> None:
        """Take in the next chunk; chunks come in the order of the text."""
        hidden = chunk.hidden
        if not self._state:
            self._allocate(chunk)
        end = chunk.start + chunk.lengths
        self._seen[chunk.rows] = end
        position = torch.arange(hidden.shape[1], device=hidden.device)
        kept = position < chunk.lengths[:, None]
        if self.prompt_length > chunk.start:
            kept &= position >= self.prompt_length - chunk.start
        state = self._state
        if "cls" in state:
            # Where nothing but the prompt comes, the row's first token is taken all the same.
            for first in {0, self.prompt_length}:
                self._pick("cls", torch.full_like(end, first), chunk)
        if "lasttoken" in state:
            self._pick("lasttoken", torch.where(end > self.prompt_length, end - 1, -1), chunk)
        if "max" in state:
            top = hidden.masked_fill(~kept[..., None], -torch.inf).amax(dim=1)
            state["max"][chunk.rows] = torch.maximum(state["max"][chunk.rows], top)
        if "sum" in state or "weighted" in state:
            # Of one chunk in at least float32; chunks are added up in more, however many they are.
            dtype = torch.promote_types(hidden.dtype, torch.float32)
            value = hidden.masked_fill(~kept[..., None], 0)
            total = value.sum(1, dtype=dtype).to(self._total_dtype)
        if "sum" in state:
            state["sum"].index_add_(0, chunk.rows, total)
        if "weighted" in state:
            # A token's weight is its place in the text: that of the chunk, and that in the chunk.
            # A matrix product per row: no copy of the chunk is made for the weights.
            weight = ((position + 1) * kept).to(dtype)
            within = (weight[:, None] @ value.to(dtype))[:, 0].to(self._total_dtype)
            state["weighted"].index_add_(0, chunk.rows, within + chunk.start * total)

    def finalize(self) -> Tensor:
        """The pooled vectors, (batch, len(modes) * hidden_size), in the hidden states' dtype.

        Raises:
            RuntimeError: No chunk came.
        """
        if not self._state:
            raise RuntimeError("finalize() before any update(): there is no chunk to pool.")
        return torch.cat([self._result(mode).to(self._dtype) for mode in self.modes], dim=-1)

    @property
    def accumulators(self) -> list[Tensor]:
        """The vectors that are held, (batch, hidden_size) each; none before the first chunk."""
        return list(self._state.values())

    def resumed(self, accumulators: Sequence[Tensor]) -> StreamingPooling:
        """Return a pooling that goes on from here, from these accumulators in place of its own.

        Neither they nor this pooling change when the new one takes chunks in.
        """
        found = copy.copy(self)
        values = [part.clone() for part in accumulators]
        found._state = dict(zip(self._state, values, strict=True))
        if self._state:
            found._seen = self._seen.clone()
        return found

    def _allocate(self, chunk: Chunk) -> None:
        """Set up the accumulators; sums run over the whole text, and lose nothing in float64."""
        hidden = chunk.hidden
        self._seen = chunk.lengths.new_zeros(self.batch)
        self._dtype = hidden.dtype
        if hidden.device.type != "mps":  # Which has no float64.
            self._total_dtype = torch.float64
        shape = (self.batch, hidden.shape[-1])
        for mode in self.modes:
            if mode in ("cls", "lasttoken"):
                self._state[mode] = hidden.new_zeros(shape)
            elif mode == "max":
                self._state["max"] = hidden.new_full(shape, -torch.inf)
            else:
                name = "weighted" if mode == "weightedmean" else "sum"
                self._state[name] = hidden.new_zeros(shape, dtype=self._total_dtype)

    def _pick(self, mode: str, target: Tensor, chunk: Chunk) -> None:
        """Keep the hidden state of each row's token `target`, (n,), if it lies in this chunk."""
        local = target - chunk.start
        here = ((local >= 0) & (local < chunk.lengths)).nonzero()[:, 0]
        self._state[mode][chunk.rows[here]] = chunk.hidden[here, local[here]]

    def _result(self, mode: str) -> Tensor:
        if mode in ("cls", "lasttoken", "max"):
            return self._state[mode]
        name = "weighted" if mode == "weightedmean" else "sum"
        total = self._state[name]
        if mode == "weightedmean":
            # The weights are 1, 2, 3, ... and sum up to n (n + 1) / 2, less the prompt's share.
            prompt = self._seen.clamp(max=self.prompt_length)
            weights = self._seen * (self._seen + 1) - prompt * (prompt + 1)
            divisor = (weights // 2).to(total.dtype)
        else:
            divisor = (self._seen - self.prompt_length).clamp(min=0).to(total.dtype)
            if mode == "mean_sqrt_len_tokens":
                divisor = divisor.sqrt()
        return total / divisor.clamp(min=1e-9)[:, None]


@dataclass(frozen=True)
class TokenStream:
    """Stands in for the token embeddings of a batch, which it hands over chunk by chunk, once.

    Attributes:
        chunks: The chunks, in the order of the text.
        lengths: (batch,) int64, the number of tokens of each row, padding not counted; 0 where the
            row's end is not known yet.
    """

    chunks: Iterator[Chunk]
    lengths: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenStream:
        """Apply a function of single tokens to each chunk's hidden states as it comes."""
        return replace(self, chunks=(c._replace(hidden=function(c.hidden)) for c in self.chunks))

    def pool(self, modes: Sequence[str], prompt_length: int = 0) -> Tensor:
        """Read all chunks; see `StreamingPooling` for arguments, result and errors."""
        pooling = StreamingPooling(modes, len(self.lengths), prompt_length)
        for chunk in self.chunks:
            pooling.update(chunk)
        return pooling.finalize()
