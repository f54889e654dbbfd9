"""Spans of a text: who names them, which tokens are theirs, and pooling over those tokens."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from compat.errors import UnsupportedTokenizerError
from compat.stream.chunk import Chunk
from compat.stream.pooling import StreamingPooling
from compat.stream.text import TextStream
from compat.stream.tokenizer import StreamingTokenizer

Span = tuple[int, int]


class NoTokenInSpanError(ValueError):
    """No token begins in a span."""


def spans_by_tokens(
    tokenizer: Any, text: str | TextStream, *, every: int = 256, overlap: int = 32
) -> list[Span]:
    """Cut a text into spans of so many tokens; the memory is that of a window and the spans.

    Example:
        >>> spans = compat.spans_by_tokens(model.tokenizer, text, every=256, overlap=32)
        >>> rows = compat.encode_spans(model, text, spans, vertical_chunk_size=512)

    Args:
        tokenizer: A `StreamingTokenizer`, a `tokenizers.Tokenizer`, or a fast tokenizer of
            transformers. Special tokens are not counted.
        text: The text.
        every: Tokens in a span; the last span has fewer where the text ends.
        overlap: How many of them the next span has too.

    Returns:
        The spans, (start, end) in characters, in the order of the text; none where it has no token.
        Where several tokens are parts of one character, it goes with the later span.

    Raises:
        UnsupportedTokenizerError: The tokens cannot be made piece by piece.
        ValueError: every is less than 1, or overlap is not from 0 to every - 1.
    """
    if not 0 <= overlap < every:
        raise ValueError(
            f"every must be at least 1, and overlap from 0 to every - 1; found every={every} and "
            f"overlap={overlap}."
        )
    if not isinstance(tokenizer, StreamingTokenizer):
        tokenizer = StreamingTokenizer(tokenizer)
    size, found = 0, list[Span]()
    waiting = deque[Span]()  # Of each span that is open, its first token and character.

    def counted() -> Iterator[str]:
        nonlocal size
        for piece in pieces_of(text):
            size += len(piece)
            yield piece

    token = 0
    for _, offsets in tokenizer.offsets(counted(), add_special_tokens=False):
        for start, _ in offsets:
            if waiting and token - waiting[0][0] == every:
                found.append((waiting.popleft()[1], start))
            if token % (every - overlap) == 0:
                waiting.append((token, start))
            token += 1
    if waiting:  # The others that are open lie within this one.
        found.append((waiting[0][1], size))
    # Tokens of one character make spans of no character.
    return [*dict.fromkeys(span for span in found if span[0] < span[1])]


def pieces_of(text: str | TextStream) -> Iterable[str]:
    """The pieces of a text, in order.

    Raises:
        TypeError: It is neither a str nor a `TextStream`.
    """
    if isinstance(text, str):
        return [text]
    if isinstance(text, TextStream):
        return text
    raise TypeError(f"text must be a str or a TextStream; found {type(text).__name__}.")


def spans_of(items: Iterable[Any]) -> list[Span]:
    """Return the spans that items name.

    Args:
        items: Each a pair (start, end) of characters, a document of LangChain from a splitter with
            `add_start_index=True`, or a node of LlamaIndex.

    Raises:
        ValueError: An item names no span, or one that is empty or begins before the text.
        TypeError: An item is of another kind.
    """
    found = []
    for index, item in enumerate(items):
        start, end = _span_of(index, item)
        if not 0 <= start < end:
            what = "begins before the text" if start < 0 else "is empty"
            raise ValueError(f"Span {index}, {(start, end)}, {what}: needed is 0 <= start < end.")
        found.append((start, end))
    return found


def _span_of(index: int, item: Any) -> tuple[int, int]:
    if hasattr(item, "page_content"):
        start = item.metadata.get("start_index", -1)
        if start < 0:
            raise ValueError(
                f"Document {index} has no metadata['start_index']: split the text by a splitter "
                "with add_start_index=True."
            )
        return start, start + len(item.page_content)
    if hasattr(item, "start_char_idx"):
        if item.start_char_idx is None or item.end_char_idx is None:
            raise ValueError(
                f"Node {index} has no start_char_idx and end_char_idx: its parser has not found it "
                "in the text. Give its span as (start, end)."
            )
        return int(item.start_char_idx), int(item.end_char_idx)
    try:
        start, end = item
        return start.__index__(), end.__index__()
    except (TypeError, ValueError, AttributeError):
        raise TypeError(
            f"Span {index} is {item!r:.60}: needed is a pair of int (start, end), a document of "
            "LangChain or a node of LlamaIndex."
        ) from None


class SpanPooling:
    """Pools the tokens of each span as they come; holds vectors, and sums of the spans open.

    A token belongs to the spans that its first character lies in.

    Args:
        spans: (start, end) in characters, overlapping or not, in any order.
        modes: Names out of `pooling.POOLING_MODES`.
    """

    def __init__(self, spans: Sequence[Span], modes: Sequence[str]) -> None:
        self._spans = spans
        self._modes = modes
        self._coming = deque(sorted(range(len(spans)), key=spans.__getitem__))
        self._open: dict[int, tuple[StreamingPooling, int]] = {}
        self._pooled: dict[int, Tensor] = {}
        self._last = -sys.maxsize

    @property
    def done(self) -> bool:
        """Return whether all spans have ended."""
        return not self._coming and not self._open

    def update(self, hidden: Tensor, starts: Sequence[int]) -> None:
        """Take in the next tokens.

        Args:
            hidden: (1, n, hidden_size), their token embeddings.
            starts: The n characters of the text at which they begin; below 0 before the text.

        Raises:
            UnsupportedTokenizerError: A token begins before the one in front of it.
            NoTokenInSpanError: A span has ended without a token.
        """
        for start in starts:
            if start < self._last:
                raise UnsupportedTokenizerError(
                    f"a token that begins at character {start}, after one at {self._last}",
                    "tokens in the order of the text",
                    "report the tokenizer; encode does not need the places of tokens",
                )
            self._last = max(start, self._last)
        self._open_until(self._last)
        for index, (pooling, seen) in [*self._open.items()]:
            low, high = (bisect_left(starts, place) for place in self._spans[index])
            if high > low:
                part = hidden[:, low:high]
                rows = torch.zeros(1, dtype=torch.int64, device=part.device)
                pooling.update(Chunk(seen, rows, rows + high - low, part))
                self._open[index] = pooling, seen + high - low
        self.end_before(self._last)

    def end_before(self, place: int) -> None:
        """End the spans that hold no character from `place` on.

        Raises:
            NoTokenInSpanError: One of them has no token.
        """
        self._open_until(place)
        for index, (pooling, seen) in [*self._open.items()]:
            if self._spans[index][1] <= place:
                if not seen:
                    raise NoTokenInSpanError(
                        f"Span {index}, {self._spans[index]}, has no token: none begins in it. "
                        "Leave it out, or let it begin where a word does."
                    )
                self._pooled[index] = pooling.finalize()
                del self._open[index]

    def _open_until(self, place: int) -> None:
        while self._coming and self._spans[self._coming[0]][0] <= place:
            self._open[self._coming.popleft()] = StreamingPooling(self._modes, 1), 0

    def unfinished(self) -> list[int]:
        """Return the spans that have not ended, by their place among the spans."""
        return sorted([*self._coming, *self._open])

    def finalize(self) -> Tensor:
        """The pooled vectors, (spans, len(modes) * hidden_size)."""
        return torch.cat([self._pooled[index] for index in range(len(self._spans))])
