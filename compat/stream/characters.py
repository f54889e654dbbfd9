"""Properties of single characters on which all of a tokenizer's libraries agree.

A tokenizer asks Unicode's tables of Oniguruma, of Rust and of its own crates, each of another
version. A property therefore has two bounds: whether a character has it for certain, and whether it
may have it. They are the same for characters whose category has not changed since Unicode 3.2.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import NamedTuple


class Bounds(NamedTuple):
    """A lower and an upper bound: is something so for certain, and may it be so?"""

    sure: bool
    possible: bool

    def __invert__(self) -> Bounds:
        return Bounds(not self.possible, not self.sure)


YES, NO, UNKNOWN = Bounds(True, True), Bounds(False, False), Bounds(False, True)

# White_Space of Unicode; Python's isspace() takes four separators of ASCII besides.
_WHITE_SPACE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {
    chr(code) for code in range(0x2000, 0x200B)
}


@lru_cache(maxsize=65536)
def settled(char: str) -> bool:
    """Return whether the character has one category in all versions of Unicode from 3.2 on."""
    return unicodedata.ucd_3_2_0.category(char) == unicodedata.category(char)


@lru_cache(maxsize=65536)
def plain(char: str) -> bool:
    """Return whether nothing that comes before the character can change it, nor it that.

    It is settled, a grapheme of its own beside others that are plain too, and composes in no
    normalization form with what comes before it.
    """
    if char in "\t\n\r":
        return True
    if not settled(char) or unicodedata.category(char)[0] not in "LNPSZ" or char in "\u2028\u2029":
        return False
    for form in ("NFC", "NFKD"):
        first = unicodedata.normalize(form, char)[0]
        if unicodedata.category(first)[0] == "M" or unicodedata.combining(first):
            return False
        if 0x1100 <= ord(first) <= 0x11FF:  # Jamo of Hangul compose with one another.
            return False
    return True


def _known(char: str, so: bool) -> Bounds:
    return (YES if so else NO) if settled(char) else UNKNOWN


def category(char: str, name: str) -> Bounds:
    """Return whether the character is of a general category, such as L or Lu."""
    return _known(char, unicodedata.category(char).startswith(name))


def space(char: str) -> Bounds:
    """Return whether the character is white space."""
    so = char in _WHITE_SPACE
    return Bounds(so, so or char.isspace() or not settled(char))


def word(char: str) -> Bounds:
    r"""Return whether a regular expression's \w takes the character."""
    kind = unicodedata.category(char)
    if not settled(char):
        return UNKNOWN
    sure = kind[0] in "LM" or kind in ("Nd", "Pc")
    # Some more are alphabetic, such as letters in circles; some libraries take joiners in.
    return Bounds(sure, sure or kind in ("Nl", "No", "So", "Cf"))


def punctuation(char: str) -> Bounds:
    """Return whether BERT takes the character for punctuation: Unicode's, and ASCII's symbols."""
    kind = unicodedata.category(char)[0]
    return _known(char, kind == "P" or (char.isascii() and kind == "S"))


def _byte_characters() -> list[str]:
    """The characters by which a byte-level vocabulary of GPT-2's kind writes bytes 0 to 255."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte if byte in shown else next(hidden)) for byte in range(256)]


_BYTES = _byte_characters()


def as_bytes(char: str) -> str:
    """Write the character's bytes of UTF-8 as a byte-level vocabulary does."""
    return "".join(_BYTES[byte] for byte in char.encode())
