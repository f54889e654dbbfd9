"""Texts that are hard to cut, and random pieces of them."""

# ruff: noqa: RUF001 (that characters look like others is what they are here for)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

_WORDS = ["the", "of", "and", "tokenizers", "isn't", "I'll", "WE'VE", "don'T", "state-space", "I"]
_WORDS += [
    "model",
    "a",
    "x",
    "naïve",
    "Straße",
    "Москва",
    "это",
    "ΣΊΣΥΦΟΣ",
    "東京",
    "中文",
    "日本語",
]
_WORDS += ["한국어", "العربية", "हिन्दी", "ไทยคำ", "İi", "ſs"]
_SIGNS = [
    *".,;:!?'\"-_()[]{}<>=+*/\\|@#$%^&~`…—“”«»。，、！？·",
    "--",
    "...",
    "''",
    "``",
    "!=",
    "::",
]
_SPACES = [" ", " ", " ", "  ", "   ", " " * 9, "\n", "\n\n", "\r\n", "\r", "\t", " \n ", "\xa0"]
_SPACES += ["\u3000", "\u2003", "\u2028", "\x85", "\x0b", "\x1c"]
_NUMBERS = ["0", "1", "42", "2026", "123456", "3.14", "½", "²", "Ⅷ", "١٢", "①"]
# Combining marks, jamo, joiners, flags, what vanishes, what composes with what is before it.
_MARKS = ["e\u0301", "\u0301", "=\u0338", "\u0338", "a\u0323\u0302", "\u1112\u1161\u11ab", "\u1161"]
_MARKS += [
    "\u200d",
    "\u200b",
    "\xad",
    "\ufe0f",
    "👩\u200d🚀",
    "👍🏽",
    "🇩🇪",
    "🇫",
    "\u304b\u3099",
    "ｶﾞ",
]
_MARKS += ["ﬁ", "\u0f71\u0f72", "\u0903", "\u0e33", "Å", "\ufeff", "\u0600", "\U00016d67", "\x00"]
_MARKS += ["▁", "Ġ", "▁▁", "\u0345"]


def text(draw: Random, tokens: Sequence[str], length: int) -> str:
    """A text of about so many characters, with some of the added tokens, whole and cut in two."""
    kinds: list[Sequence[str]] = [_WORDS, _SIGNS, _SPACES, _NUMBERS, _MARKS]
    weights = [draw.choice([0, 1, 3, 9]) for _ in kinds]
    if tokens:
        halves = [token[at:] for token in tokens for at in range(1, len(token))]
        halves += [token[:at] for token in tokens for at in range(1, len(token))]
        kinds += [list(tokens), halves or list(tokens)]
        weights += [draw.choice([0, 1, 6]) for _ in range(2)]
    if not any(weights):
        weights[0] = 1
    made = ""
    while len(made) < length:
        made += draw.choice(draw.choices(kinds, weights)[0])
        if weights[4] and draw.random() < 0.1:
            made += draw.choice("\u0301\u0338\u0308\u3099\u200b")
        if draw.random() < 0.01:
            made += draw.choice(["ab", "x", "中", "1", " ", "=", "▁"]) * draw.randrange(200)
        elif weights[0] and draw.random() < 0.5:
            made += " "
    return made


def pieces(draw: Random, whole: str) -> Iterator[str]:
    """The text in pieces of random lengths, of which some are empty."""
    at = 0
    while at < len(whole):
        size = draw.choice([0, 1, 2, 7, 50, 1000])
        yield whole[at : at + size]
        at += size
