"""A tokenizer's normalizers, asked what they make of the characters beside a place.

Each normalizer is a step from the characters that may stand on the left and on the right of the
place before it, to those after it. There is no such step where a normalizer may read across.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from compat.stream.characters import as_bytes, plain, space
from compat.stream.patterns import Pattern
from compat.stream.refusals import unsupported


class Sides(NamedTuple):
    """The characters that may stand on the left and on the right of a place."""

    left: frozenset[str]
    right: frozenset[str]


Step = Callable[[Sides], Sides | None]

# One character becomes what it becomes alone.
_ONE_BY_ONE = frozenset({"Lowercase", "StripAccents", "Nmt", "BertNormalizer"})
# Characters compose with their neighbours, or graphemes are looked up.
COMPOSING = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Precompiled"})
# Something is done at the beginning of what is normalized.
STARTING = frozenset({"Prepend", "Strip"})


def flat(config: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The parts of a description of tokenizer.json, of sequences within sequences."""
    if config is None:
        return []
    if config["type"] == "Sequence":
        return [part for inner in config[key] for part in flat(inner, key)]
    return [config]


def steps(parts: list[dict[str, Any]]) -> list[Step]:
    """The steps of normalizers that are applied one after the other.

    Raises:
        UnsupportedTokenizerError: It is not known what one of them looks at.
    """
    composing = [part["type"] in COMPOSING for part in parts]
    return [_step(part, any(composing[at + 1 :])) for at, part in enumerate(parts)]


def _step(config: dict[str, Any], composed_later: bool) -> Step:
    kind = config["type"]
    if kind in COMPOSING or kind in _ONE_BY_ONE:
        return _one_by_one(config, composed_later)
    if kind == "Strip":
        # A window ends on the left, where no space may be stripped that is not at the text's end.
        return lambda sides: None if any(space(c).possible for c in sides.left) else sides
    if kind == "Prepend":
        return lambda sides: sides
    if kind == "ByteLevel":
        return bytes_of
    if kind == "Replace":
        return _replace(config, composed_later)
    raise unsupported(f"the normalizer {kind}")


def bytes_of(sides: Sides) -> Sides:
    """The bytes that meet at the place, as a byte-level vocabulary writes them."""
    return Sides(
        frozenset(as_bytes(char)[-1] for char in sides.left),
        frozenset(as_bytes(char)[0] for char in sides.right),
    )


def _one_by_one(config: dict[str, Any], composed_later: bool) -> Step:
    alone, composing = _alone(config), config["type"] in COMPOSING

    def step(sides: Sides) -> Sides | None:
        if composing and not all(map(plain, sides.left | sides.right)):
            return None
        if config["type"] == "Precompiled" and "\r" in sides.right:
            return None  # With a line feed it is one grapheme.
        if composed_later and not all(plain(c) for side in sides for x in side for c in alone(x)):
            return None  # What falls into parts may come together again.
        left = frozenset(alone(char)[-1:] for char in sides.left)
        right = frozenset(alone(char)[:1] for char in sides.right)
        return None if "" in left | right else Sides(left, right)

    return step


def _alone(config: dict[str, Any]) -> Callable[[str], str]:
    """The normalizer as a function of a string."""
    shell = Tokenizer(WordLevel({"a": 0}, "a"))
    described = json.loads(shell.to_str())
    described["normalizer"] = config
    normalizer = Tokenizer.from_str(json.dumps(described)).normalizer
    return lru_cache(maxsize=4096)(normalizer.normalize_str)


def _replace(config: dict[str, Any], composed_later: bool) -> Step:
    pattern, content = Pattern.described(config["pattern"]), config["content"]

    def step(sides: Sides) -> Sides | None:
        if any(pattern.joins(a, b) for a in sides.left for b in sides.right):
            return None
        ends = any(map(pattern.may_end, sides.left))
        starts = any(map(pattern.may_start, sides.right))
        # What is taken out brings others together; what is put in composes with what follows.
        if (ends or starts) and (composed_later or not content):
            return None
        left = frozenset(char for char in sides.left if not pattern.covers(char))
        right = frozenset(char for char in sides.right if not pattern.covers(char))
        return Sides(left | set(content[-1:] * ends), right | set(content[:1] * starts))

    return step
