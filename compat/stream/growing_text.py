"""Token ids of a text that grows: those that stay, and those that the next character may change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from compat.errors import UnsupportedTokenizerError

if TYPE_CHECKING:
    from compat.stream.tokenizer import StreamingTokenizer

# Characters without a place to cut that are held; beyond it the text is refused.
LONGEST = 1_000_000

Offsets = list[tuple[int, int]]


class Slice(NamedTuple):
    """Tokens of a window, and where in the text it begins, from where their offsets count."""

    ids: list[int]
    offsets: Offsets
    begin: int


@dataclass
class GrowingText:
    """A text of which only the end is held, from some seam before its last one on.

    Attributes:
        tokenizer: Makes the ids.
        held: The end of the text.
        given: How many of its characters lie before the last seam; their ids have been given out.
        known: Their ids.
        begin: How many characters come before the held ones.
        searched: The place in the held text up to which no seam can be found.
        with_offsets: Whether the offsets of the tokens are made too.
    """

    tokenizer: StreamingTokenizer
    held: str = ""
    given: int = 0
    known: list[int] = field(default_factory=list)
    begin: int = 0
    searched: int = 0
    with_offsets: bool = False

    def append(self, text: str) -> Iterator[list[int]]:
        """Let the text grow, window by window; see `take`.

        Yields:
            The ids that cannot change any more, special ones left out.
        """
        for part in cut(text, self.tokenizer.window):
            if (new := self.take(part)) is not None:
                yield new.ids

    def take(self, part: str) -> Slice | None:
        """Let the text grow by a part of about a window.

        Returns:
            The tokens that cannot change any more: those up to the last seam, special ones left
            out; None where there is no new seam.

        Raises:
            UnsupportedTokenizerError: A million characters hold no place to cut.
        """
        self.held += part
        seam = self.tokenizer.last_seam(self.held, max(self.given + 1, self.searched))
        self.searched = len(self.held) - 1
        if seam is None:
            if len(self.held) - self.given > LONGEST:
                raise _endless(self.begin + self.given)
            return None
        new = self._new(self.held[:seam])
        start, self.known = self.tokenizer.context(self.held, seam)
        self.held, self.given = self.held[start:], seam - start
        self.begin, self.searched = self.begin + start, 0
        return new

    def tail(self) -> list[int]:
        """Return the ids behind the last seam, as they are if the text ends here."""
        return self.rest().ids

    def rest(self) -> Slice:
        """Return the tokens behind the last seam, as they are if the text ends here."""
        return self._new(self.held)

    def copy(self) -> GrowingText:
        """Return a text that grows apart from this one."""
        return replace(self, known=[*self.known])

    def _new(self, text: str) -> Slice:
        return self.tokenizer.behind(text, self.known, self.begin, self.with_offsets)


def cut(text: str, size: int) -> Iterator[str]:
    """Cut a text into pieces of at most `size` characters."""
    for at in range(0, len(text), size):
        yield text[at : at + size]


def _endless(position: int) -> UnsupportedTokenizerError:
    """Make the error for a text without a seam from a position on."""
    return UnsupportedTokenizerError(
        f"{LONGEST:,} characters from position {position:,} of the text on that this "
        "tokenizer may make one token of, or whose tokens depend on one another",
        "a place to cut among them, such as a space between words",
        "put spaces or line feeds in, or tokenize the text as a whole",
    )
