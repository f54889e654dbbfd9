"""The token ids of one text on their way to the model: so many at a time, and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from compat.stream.tokenizer import StreamingTokenizer


class TokenIds:
    """The ids of a text that is read as they are taken.

    Args:
        tokenizer: Makes the ids.
        pieces: The text.
        prompt: What stands before it.
        limit: The most tokens that are given, special ones counted; what is behind them is counted
            all the same. None for all.
        at_end: Is called with the finished object when there are no more ids.

    Attributes:
        count: Tokens that have been made, special ones counted; in the end those of the whole text.
        kept: Those of them that the limit leaves.
    """

    def __init__(
        self,
        tokenizer: StreamingTokenizer,
        pieces: Iterable[str],
        prompt: str = "",
        limit: int | None = None,
        at_end: Callable[[TokenIds], None] = lambda _: None,
    ) -> None:
        self.kept = self._given = self._chars = 0
        self.count = sum(map(len, tokenizer.special_tokens))
        self._limit = limit
        self._at_end = at_end
        self._ids = self._read(tokenizer, chain([prompt], self._counted(pieces)))
        self._waiting: list[int] = []
        self._ended = False

    @property
    def chars(self) -> int:
        """Return about how many characters of the text have been taken, at most those read."""
        return self._chars * self._given // max(self.kept, 1)

    def take(self, count: int) -> list[int]:
        """The next ids: `count` of them, or fewer where the text ends."""
        while len(self._waiting) < count and not self._ended:
            if (ids := next(self._ids, None)) is None:
                self._ended = True
                self._at_end(self)
            else:
                self.kept += len(ids)
                self._waiting += ids
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        self._given += len(taken)
        return taken

    def _read(self, tokenizer: StreamingTokenizer, pieces: Iterable[str]) -> Iterator[list[int]]:
        before, after = tokenizer.special_tokens
        room = None if self._limit is None else self._limit - len(before) - len(after)
        yield before
        for ids in tokenizer(pieces, add_special_tokens=False):
            self.count += len(ids)
            if room is None:
                yield ids
            elif room > 0:
                yield ids[:room]
                room -= len(ids)
        yield after

    def _counted(self, pieces: Iterable[str]) -> Iterator[str]:
        for piece in pieces:
            self._chars += len(piece)
            yield piece
