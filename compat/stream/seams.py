"""Seams: places where a text may be cut, so that both sides have the token ids of the whole.

A tokenizer goes over a text in steps: added tokens are found, the rest is normalized, added tokens
are found again in what is normal, pre-tokenizers cut it into words, and the model cuts words into
tokens. A place is a seam if none of these can reach across it, whatever the text is farther away.
That is decided from the tokenizer's own description (tokenizer.json) and the two characters on
either side; see `Seams.at` for the rules.

A seam is no promise about the beginning of what comes after it: there a tokenizer may prepend a
space, or strip one. That goes no farther than the next seam.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer

from compat.stream.characters import plain, space
from compat.stream.normalizers import COMPOSING, STARTING, Sides, flat, steps
from compat.stream.pre_tokenizers import Verdict, rule
from compat.stream.refusals import unsupported

# A tokenizer that is cut between no two of these is cut nowhere in ordinary text.
_ORDINARY = "aZ1 \n,.(-\u4e2d\uff0c\u3002\u0431"


class Seams:
    """The places where the texts of a tokenizer may be cut.

    Args:
        config: The description of the tokenizer, as in tokenizer.json.
        tokenizer: The tokenizer.

    Raises:
        UnsupportedTokenizerError: A part may look at any distance, or is not known.
    """

    def __init__(self, config: dict[str, Any], tokenizer: Tokenizer) -> None:
        normalizers = flat(config["normalizer"], "normalizers")
        self._steps = steps(normalizers)
        self._composing = any(part["type"] in COMPOSING for part in normalizers)
        parts = flat(config["pre_tokenizer"], "pretokenizers")
        self._rules = [rule(part) for part in parts]
        self._added = _AddedTokens(config["added_tokens"], normalizers, tokenizer)
        self._never_merged = _merges(config["model"])
        # Between two characters the answer is always the same, and a text has few pairs of them.
        self._between = lru_cache(maxsize=16384)(self._is_between)
        self._kept = lru_cache(maxsize=16384)(self._keeps_apart)
        if not any(self._between(a, b) for a in _ORDINARY for b in _ORDINARY):
            names = " and ".join(part["type"] for part in parts) or "none"
            raise unsupported(
                f"the model {config['model']['type']}, which needs all of a word, and "
                f"pre-tokenizers ({names}) that cut no words of ordinary text"
            )

    def at(self, text: str, place: int) -> bool:
        """Return whether there is a seam before text[place]; 2 <= place < len(text) - 1."""
        return (
            self._between(text[place - 1], text[place])
            and self._kept(text[place - 2], True)
            and self._kept(text[place + 1], False)
        )

    def last(self, text: str, low: int, high: int) -> int | None:
        """The last seam among the places from low to high - 1; None if there is none."""
        places = range(min(high, len(text) - 1) - 1, max(low, 2) - 1, -1)
        return next((place for place in places if self.at(text, place)), None)

    def _keeps_apart(self, char: str, on_left: bool) -> bool:
        """Return whether a neighbour's neighbour keeps what is behind it from composing."""
        if not self._composing:
            return True
        one, none = frozenset(char), frozenset[str]()
        sides = Sides(one, none) if on_left else Sides(none, one)
        for step in self._steps:
            if (stepped := step(sides)) is None:
                return False
            sides = stepped
        return plain(char)

    def _is_between(self, left: str, right: str) -> bool:
        """Return whether there is a seam between two characters, if their neighbours keep it."""
        # A token that strips the spaces on its right would strip those behind the place too.
        if not plain(left) or not plain(right) or space(left).possible:
            return False
        sides = Sides(frozenset(left), frozenset(right))
        if self._added.cross(sides):
            return False
        for step in self._steps:
            if (stepped := step(sides)) is None:
                return False
            sides = stepped
        if self._added.cross(sides):
            return False
        for decide in self._rules:
            verdict, sides = decide(sides)
            if verdict is not Verdict.WHOLE:
                return verdict is Verdict.CUT
        return self._never_merged(sides)


class _AddedTokens:
    """The added tokens, which are found in the text before and after it is normalized."""

    def __init__(
        self, tokens: list[dict[str, Any]], normalizers: list[dict[str, Any]], tokenizer: Tokenizer
    ) -> None:
        normalize = tokenizer.normalizer.normalize_str if tokenizer.normalizer else str
        normal = [normalize(token["content"]) for token in tokens if token["normalized"]]
        if len(set(normal)) < len(normal) or "" in normal:
            raise unsupported("added tokens that are normalized to the same, or to nothing")
        starting = any(part["type"] in STARTING for part in normalizers)
        self._pairs: set[str] = set()
        self._lasts: set[str] = set()
        self._firsts: set[str] = set()
        self._strips_normal = False
        for token in tokens:
            strips = token["lstrip"] or token["rstrip"]
            self._strips_normal |= strips and token["normalized"]
            # Whether it is one may depend on its neighbours, or on where the text begins.
            wary = strips or token["single_word"] or (token["normalized"] and starting)
            forms = {token["content"]}
            if token["normalized"]:
                forms.add(normalize(token["content"]))
            for form in filter(None, forms):
                self._pairs.update(a + b for a, b in pairwise(form))
                if wary:
                    self._lasts.add(form[-1])
                    self._firsts.add(form[0])

    def cross(self, sides: Sides) -> bool:
        """Return whether a token may reach across the place, or depend on the other side."""
        if sides.left & self._lasts or sides.right & self._firsts:
            return True
        if self._strips_normal and any(space(char).possible for char in sides.left):
            return True
        return any(a + b in self._pairs for a in sides.left for b in sides.right)


def _merges(model: dict[str, Any]) -> Callable[[Sides], bool]:
    """The rule of a model: whether it never makes one token of both sides within a word.

    Raises:
        UnsupportedTokenizerError: The model is not known, or draws lots.
    """
    kind = model["type"]
    if kind not in ("BPE", "WordPiece", "WordLevel", "Unigram"):
        raise unsupported(f"the model {kind}")
    if model.get("dropout"):
        raise unsupported("a BPE of which merges drop out at random")
    # Words of these are cut by their beginnings, or known as a whole; Unigram sums up scores from
    # a word's beginning on, and rounds.
    whole = ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
    if kind != "BPE" or any(map(model.get, whole)):
        return lambda _: False
    vocabulary = model["vocab"]
    characters = {token for token in vocabulary if len(token) == 1}
    inside = {a + b for token in vocabulary for a, b in pairwise(token)}

    def never(sides: Sides) -> bool:
        # An unknown character may become bytes, or one token with those beside it.
        known = sides.left | sides.right <= characters
        return known and not any(a + b in inside for a in sides.left for b in sides.right)

    return never
