"""The project's exceptions."""

from __future__ import annotations

from compat.errors.own import (
    UnsupportedModelError,
    UnsupportedPipelineError,
    UnsupportedVersionError,
    VerticalChunkingError,
)


class UnsupportedTokenizerError(VerticalChunkingError):
    """A tokenizer has a part that may look at a text's far ends: it must have the text whole."""


__all__ = [
    "UnsupportedModelError",
    "UnsupportedPipelineError",
    "UnsupportedTokenizerError",
    "UnsupportedVersionError",
    "VerticalChunkingError",
]
