r"""Find which characters can stand side by side in a match of a regular expression.

A pattern is read into Glushkov's automaton ("The abstract theory of automata", 1961): a position
for each character that it names, and which position may follow which. A match contains the
characters a b side by side only if a position that takes b may follow one that takes a. What a
lookahead looks at counts as if it were matched, so that where no two positions join, the search
on either side never sees the other one.

The syntax is that of Oniguruma, as far as tokenizers use it; the rest is refused: what looks back
(lookbehind, \b, ^) depends on text before the match.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

from compat.stream import characters
from compat.stream.characters import NO, UNKNOWN, YES, Bounds
from compat.stream.refusals import unsupported

Position = Callable[[str], Bounds]

_ESCAPED = {"r": "\r", "n": "\n", "t": "\t"}
_LOOKAHEADS = ("(?=", "(?!")


class _Part(NamedTuple):
    """A part of a pattern.

    Attributes:
        nullable: Whether it can match nothing.
        first, last: Positions at which its matches may begin and end.
        looks: Whether there is a lookahead in it.
        atomic: Whether there is something in it that gives nothing back once it has matched.
    """

    nullable: bool
    first: frozenset[int]
    last: frozenset[int]
    looks: bool = False
    atomic: bool = False


_EMPTY = _Part(True, frozenset(), frozenset())


class Pattern:
    """A regular expression, or a string to be found.

    Args:
        text: A pattern of Oniguruma, in Ruby's syntax, which is that of `tokenizers`.

    Raises:
        UnsupportedTokenizerError: Where it matches depends on more than the matches' characters.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._at = 0
        self._positions: list[Position] = []
        self._follow: dict[int, set[int]] = {}
        self._unsure: set[int] = set()
        whole = self._alternatives(fold=False)
        if self._at != len(text):
            raise self._refuse(self._peek())
        if whole.nullable:
            raise self._refuse("a match of nothing")
        self._first, self._last = whole.first, whole.last
        # One of their characters is a match by itself, whatever stands around it.
        self._lone = (whole.first & whole.last) - self._unsure
        self._taken = lru_cache(maxsize=16384)(self._take)

    @classmethod
    def literal(cls, text: str) -> Pattern:
        """The pattern that matches a string and nothing else."""
        return cls("".join(char if char.isalnum() else "\\" + char for char in text))

    @classmethod
    def described(cls, config: dict[str, str]) -> Pattern:
        """The pattern of a part of tokenizer.json."""
        return cls(config["Regex"]) if "Regex" in config else cls.literal(config["String"])

    def joins(self, left: str, right: str) -> bool:
        """Return whether a match, or what it looks at, may have `left` and `right` side by side."""
        after = self._taken(right)
        return any(self._follow.get(at, _NONE) & after for at in self._taken(left))

    def may_start(self, char: str) -> bool:
        """Return whether a match, or what it looks at, may begin with the character."""
        return bool(self._first & self._taken(char))

    def may_end(self, char: str) -> bool:
        """Return whether a match may end with the character."""
        return bool(self._last & self._taken(char))

    def covers(self, char: str) -> bool:
        """Return whether the character is part of a match wherever it stands."""
        return any(self._positions[at](char).sure for at in self._lone)

    def _take(self, char: str) -> frozenset[int]:
        """The positions that may take the character."""
        taken = (at for at, takes in enumerate(self._positions) if takes(char).possible)
        return frozenset(taken)

    # Reading the pattern.

    def _refuse(self, what: str) -> Exception:
        return unsupported(f"{what!r} in the regular expression {self.text!r}")

    def _peek(self, count: int = 1) -> str:
        return self.text[self._at : self._at + count]

    def _join(self, lefts: Iterable[int], rights: frozenset[int]) -> None:
        for at in lefts:
            self._follow.setdefault(at, set()).update(rights)

    def _alternatives(self, fold: bool) -> _Part:
        parts = [self._sequence(fold)]
        while self._peek() == "|":
            self._at += 1
            parts.append(self._sequence(fold))
        return _Part(
            any(part.nullable for part in parts),
            frozenset().union(*(part.first for part in parts)),
            frozenset().union(*(part.last for part in parts)),
            any(part.looks for part in parts),
            any(part.atomic for part in parts),
        )

    def _sequence(self, fold: bool) -> _Part:
        whole, begin = _EMPTY, len(self._positions)
        while self._peek() not in ("", "|", ")"):
            here, ahead = len(self._positions), self._peek(3) in _LOOKAHEADS or self._peek() == "$"
            part = self._repeated(fold)
            self._join(whole.last, part.first)
            if whole.atomic:  # It may have taken what this part needs.
                self._unsure.update(range(here, len(self._positions)))
            if part.looks:
                self._unsure.update(range(begin, here))
            if whole.looks:
                self._unsure.update(range(here, len(self._positions)))
            looks, atomic = whole.looks or part.looks, whole.atomic or part.atomic
            first = whole.first | part.first if whole.nullable else whole.first
            if ahead:  # The match goes on from before what was looked at.
                whole = whole._replace(first=first, looks=looks, atomic=atomic)
                continue
            last = whole.last | part.last if part.nullable else part.last
            whole = _Part(whole.nullable and part.nullable, first, last, looks, atomic)
        return whole

    def _repeated(self, fold: bool) -> _Part:
        begin, ahead = len(self._positions), self._peek(3) in _LOOKAHEADS or self._peek() == "$"
        part = self._atom(fold)
        sign = self._peek()
        if sign not in ("*", "+", "?", "{") or not sign:
            return part
        if ahead:
            raise self._refuse("a lookahead that is repeated")
        low, high = self._times()
        if high != 1:
            self._join(part.last, part.first)
        if low > 1:
            self._unsure.update(range(begin, len(self._positions)))
        part = part._replace(nullable=part.nullable or low == 0)
        if self._peek() == "+":
            part = part._replace(atomic=True)
            self._at += 1
        elif self._peek() == "?" and sign != "{":
            self._at += 1
        if self._peek() in ("*", "+", "?", "{") and self._peek():
            raise self._refuse("a repeat of a repeat")
        return part

    def _times(self) -> tuple[int, int | None]:
        """Return how often something is repeated: at least, and at most."""
        sign = self._peek()
        self._at += 1
        if sign != "{":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
        inside, brace, _ = self.text[self._at :].partition("}")
        low, comma, high = inside.partition(",")
        if not brace or not (low + high).isdigit() or high == "0" or (low, comma) == ("0", ""):
            raise self._refuse("{" + inside)
        self._at += len(inside) + 1
        least = int(low or 0)
        return least, (int(high) if high else None if comma else least)

    def _atom(self, fold: bool) -> _Part:
        char = self._peek()
        if char == "(":
            return self._group(fold)
        if char == "[":
            return self._position(self._class(fold))
        if char in ".$":
            self._at += 1
            if char == "$":
                return self._position(lambda _: UNKNOWN)._replace(looks=True)
            return self._position(lambda x: Bounds(x != "\n", True))
        if char in "^*+?":
            raise self._refuse(char)
        return self._position(self._single(fold)[1])

    def _group(self, fold: bool) -> _Part:
        for opening in ("(?:", "(?i:", "(?>", *_LOOKAHEADS, "("):
            if self._peek(len(opening)) == opening:
                break
        self._at += len(opening)
        if opening == "(" and self._peek() == "?":
            raise self._refuse("(" + self._peek(3))
        part = self._alternatives(fold or opening == "(?i:")
        if self._peek() != ")":
            raise self._refuse("an open group")
        self._at += 1
        return part._replace(
            looks=part.looks or opening in _LOOKAHEADS, atomic=part.atomic or opening == "(?>"
        )

    def _position(self, takes: Position) -> _Part:
        self._positions.append(takes)
        at = frozenset({len(self._positions) - 1})
        return _Part(False, at, at)

    def _single(self, fold: bool) -> tuple[str, Position]:
        """Read what stands for one character: that character, or "" for a kind of them."""
        char = self._peek()
        self._at += 1
        if char == "\\":
            char = self._peek()
            self._at += 1
            if (kind := self._kind(char, fold)) is not None:
                return "", kind
            char = _ESCAPED.get(char, char)
        if not fold:
            return char, lambda x: YES if x == char else NO
        if not char.isascii():
            raise self._refuse(f"{char} in any case")
        return char, lambda x: _folded(x, char, char)

    def _kind(self, char: str, fold: bool) -> Position | None:
        """Read what is behind a backslash; None if it stands for one character."""
        kind: Position
        if fold and char in ("S", "w", "W", "D", "p", "P"):
            raise self._refuse(f"\\{char} in any case")  # A letter may fold to two.
        if char in ("s", "S"):
            kind = characters.space
        elif char in ("w", "W"):
            kind = characters.word
        elif char in ("d", "D"):
            kind = _property("Nd")
        elif char in ("p", "P") and self._peek() == "{" and "}" in self.text[self._at :]:
            name, _, _ = self.text[self._at + 1 :].partition("}")
            self._at += len(name) + 2
            kind = _property(name.removeprefix("^"))
            negated = (char == "P") != name.startswith("^")
            return (lambda x: ~kind(x)) if negated else kind
        elif char in _ESCAPED or (char and not char.isalnum()):
            return None
        else:
            raise self._refuse("\\" + char)
        return (lambda x: ~kind(x)) if char.isupper() else kind

    def _class(self, fold: bool) -> Position:
        self._at += 1
        negated = self._peek() == "^"
        self._at += negated
        if negated and fold:
            raise self._refuse("[^ in any case")
        items: list[Position] = []
        while (char := self._peek()) != "]" or not items:
            if char in ("", "[", "]") or self._peek(2) == "&&":
                raise self._refuse("[" + char)
            low, item = self._single(fold)
            if self._peek() == "-" and self.text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                high, _ = self._single(fold)
                item = self._range(low, high, fold)
            items.append(item)
        self._at += 1

        def takes(char: str) -> Bounds:
            found = [item(char) for item in items]
            either = Bounds(any(b.sure for b in found), any(b.possible for b in found))
            return ~either if negated else either

        return takes

    def _range(self, low: str, high: str, fold: bool) -> Position:
        if not low or not high:
            raise self._refuse(f"{low}-{high}")
        if fold:
            return lambda x: _folded(x, low, high)
        return lambda x: YES if low <= x <= high else NO


def _folded(char: str, low: str, high: str) -> Bounds:
    """Return whether a range of ASCII takes the character in any case.

    Any letter may be meant: the long s is an s, and some fold to several letters.
    """
    cases = {char, char.lower(), char.upper()} if char.isascii() else {char}
    return Bounds(any(low <= case <= high for case in cases), char.isalpha() or low <= char <= high)


_NONE: frozenset[int] = frozenset()


def _property(name: str) -> Position:
    if name[:1] in tuple("LMNPSZC") and (len(name) == 1 or (len(name) == 2 and name[1].islower())):
        return lambda x: characters.category(x, name)
    return lambda _: UNKNOWN  # A script or the like.
