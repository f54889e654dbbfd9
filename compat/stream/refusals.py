"""The error for a part of a tokenizer that looks at more than can be told."""

from __future__ import annotations

from compat.errors import UnsupportedTokenizerError


def unsupported(part: str) -> UnsupportedTokenizerError:
    """The error for a tokenizer that has this part."""
    return UnsupportedTokenizerError(
        f"a tokenizer with {part}",
        "parts of which it is known that they look at a few characters of the text at a time",
        "tokenize the text as a whole",
    )
