"""A tokenizer's pre-tokenizers, asked whether they cut between two characters."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

from compat.stream import characters
from compat.stream.characters import Bounds
from compat.stream.normalizers import Sides, bytes_of
from compat.stream.patterns import Pattern
from compat.stream.refusals import unsupported


class Verdict(Enum):
    """The answer of a pre-tokenizer about a place, which holds whatever stands farther away."""

    CUT = "it always cuts there"
    WHOLE = "it never cuts there"
    UNKNOWN = "it may look across"


Rule = Callable[[Sides], tuple[Verdict, Sides]]

# The expression of byte-level pre-tokenizers, of GPT-2.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def rule(config: dict[str, Any]) -> Rule:
    """The rule of one pre-tokenizer.

    Raises:
        UnsupportedTokenizerError: It is not known what it looks at.
    """
    kind = config["type"]
    if kind == "ByteLevel":
        return _byte_level(config)
    if kind == "Metaspace":
        return _metaspace(config)
    decide = _decision(config)
    return lambda sides: (decide(sides), sides)


def _decision(config: dict[str, Any]) -> Callable[[Sides], Verdict]:
    kind = config["type"]
    if kind == "Split":
        behavior = config["behavior"]
        if config.get("invert") and behavior not in ("Isolated", "Removed"):
            raise unsupported(f"an inverted Split of behavior {behavior}")
        return _matches(Pattern.described(config["pattern"]), behavior)
    if kind == "Whitespace":
        return _matches(Pattern(r"\w+|[^\w\s]+"), "Removed")
    if kind == "WhitespaceSplit":
        return _single(characters.space, "Removed")
    if kind == "BertPreTokenizer":
        return _single(_bert, "Isolated")
    if kind == "Punctuation":
        return _single(characters.punctuation, config.get("behavior", "Isolated"))
    if kind == "Digits":
        behavior = "Isolated" if config["individual_digits"] else "Contiguous"
        return _single(lambda char: characters.category(char, "N"), behavior)
    if kind == "CharDelimiterSplit":
        delimiter = config["delimiter"]
        return _single(lambda char: Bounds(char == delimiter, char == delimiter), "Removed")
    raise unsupported(f"the pre-tokenizer {kind}")


def _bert(char: str) -> Bounds:
    space, mark = characters.space(char), characters.punctuation(char)
    return Bounds(space.sure or mark.sure, space.possible or mark.possible)


def _byte_level(config: dict[str, Any]) -> Rule:
    if not config.get("use_regex", True):
        return lambda sides: (Verdict.WHOLE, bytes_of(sides))
    decide = _matches(Pattern(_GPT2), "Isolated")
    return lambda sides: (decide(sides), bytes_of(sides))


def _metaspace(config: dict[str, Any]) -> Rule:
    mark, splits = config["replacement"], config.get("split", True)

    def decide(sides: Sides) -> tuple[Verdict, Sides]:
        left, right = (frozenset(mark if c == " " else c for c in side) for side in sides)
        sides = Sides(left, right)
        if not splits or mark not in left | right:
            return Verdict.WHOLE, sides
        return Verdict.CUT if right == {mark} else Verdict.UNKNOWN, sides

    return decide


def _single(takes: Callable[[str], Bounds], behavior: str) -> Callable[[Sides], Verdict]:
    """The decision of a split at single characters, each of them a match."""

    def decide(sides: Sides) -> Verdict:
        left, right = ([takes(char) for char in side] for side in sides)
        if not any(bounds.possible for bounds in left + right):
            return Verdict.WHOLE
        sure_left, sure_right = (all(bounds.sure for bounds in side) for side in (left, right))
        if behavior in ("Isolated", "Removed"):
            return Verdict.CUT if sure_left or sure_right else Verdict.UNKNOWN
        if behavior == "Contiguous":
            alone = (sure_left and not any(bounds.possible for bounds in right)) or (
                sure_right and not any(bounds.possible for bounds in left)
            )
            return Verdict.CUT if alone else Verdict.UNKNOWN
        return Verdict.UNKNOWN

    return decide


def _matches(pattern: Pattern, behavior: str) -> Callable[[Sides], Verdict]:
    """The decision of a split at the matches of a regular expression."""

    def decide(sides: Sides) -> Verdict:
        if any(pattern.joins(a, b) for a in sides.left for b in sides.right):
            return Verdict.UNKNOWN
        ends = any(map(pattern.may_end, sides.left))
        starts = any(map(pattern.may_start, sides.right))
        if not ends and not starts:
            return Verdict.WHOLE
        merged = {"MergedWithPrevious": starts, "MergedWithNext": ends}
        if merged.get(behavior, ends and starts and behavior == "Contiguous"):
            return Verdict.UNKNOWN
        sure = any(all(map(pattern.covers, side)) for side in sides)
        return Verdict.CUT if sure else Verdict.UNKNOWN

    return decide
