"""Token ids of a text that grows: those that stay, and those that the next character may change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from compat.stream.tokenizer import LONGEST, StreamingTokenizer, cut


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
    """

    tokenizer: StreamingTokenizer
    held: str = ""
    given: int = 0
    known: list[int] = field(default_factory=list)
    begin: int = 0
    searched: int = 0

    def append(self, text: str) -> Iterator[list[int]]:
        """Let the text grow.

        Yields:
            The ids that cannot change any more: those up to the last seam, special ones left out.

        Raises:
            UnsupportedTokenizerError: A million characters hold no place to cut.
        """
        for part in cut(text, self.tokenizer.window):
            self.held += part
            low = max(self.given + 1, self.searched)
            seam = self.tokenizer.last_seam(self.held, low)
            self.searched = len(self.held) - 1
            if seam is not None:
                ids = self.tokenizer.ids_behind(self.held[:seam], self.known)
                start, self.known = self.tokenizer.context(self.held, seam)
                self.held, self.given = self.held[start:], seam - start
                self.begin, self.searched = self.begin + start, 0
                yield ids
            elif len(self.held) - self.given > LONGEST:
                raise self.tokenizer.endless(self.begin + self.given)

    def tail(self) -> list[int]:
        """The ids behind the last seam, as they are if the text ends here."""
        return self.tokenizer.ids_behind(self.held, self.known)

    def copy(self) -> GrowingText:
        """Return a text that grows apart from this one."""
        return replace(self, known=[*self.known])
