"""The project's exceptions: the message of each says what was found and needed, and the remedy."""

from __future__ import annotations


class VerticalChunkingError(RuntimeError):
    """Something cannot be done in vertical chunks.

    Args:
        found: What is there.
        needed: What would have to be there.
        remedy: What the reader can do about it.
    """

    def __init__(self, found: str, needed: str, remedy: str) -> None:
        # All three go to `args`, so that the exception survives pickling between processes.
        super().__init__(found, needed, remedy)
        self.found = found
        self.needed = needed
        self.remedy = remedy

    def __str__(self) -> str:
        return f"Found: {self.found}. Needed: {self.needed}. Remedy: {self.remedy}."


class UnsupportedVersionError(VerticalChunkingError):
    """Raised where an installed library is not what the hooks expect; nothing was patched."""


class UnsupportedModelError(VerticalChunkingError):
    """Raised where a model carries no recurrent state from chunk to chunk, or not exactly."""


class UnsupportedPipelineError(VerticalChunkingError):
    """Raised where a module, backend or setting of a model cannot work on a stream of chunks."""


class UnsupportedTokenizerError(VerticalChunkingError):
    """Raised where a part of a tokenizer may look at a text's far ends: it needs the whole text."""


__all__ = [
    "UnsupportedModelError",
    "UnsupportedPipelineError",
    "UnsupportedTokenizerError",
    "UnsupportedVersionError",
    "VerticalChunkingError",
]
