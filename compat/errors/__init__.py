"""The project's exceptions; where sentence-transformers has them itself, they are its classes."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

NATIVE = "sentence_transformers.base.vertical_chunks"


def _home() -> str:
    """Return the name of the module that defines the exceptions.

    Importing sentence-transformers takes seconds, so its files are looked at instead.
    """
    package, *folders = NATIVE.split(".")
    spec = find_spec(package)
    places = (spec.submodule_search_locations if spec else None) or ()
    native = any(Path(place, *folders, "_errors.py").is_file() for place in places)
    return f"{NATIVE}._errors" if native else "compat.errors.own"


if TYPE_CHECKING:
    from compat.errors.own import (
        UnsupportedModelError,
        UnsupportedPipelineError,
        UnsupportedVersionError,
        VerticalChunkingError,
    )
else:
    _module = import_module(_home())
    UnsupportedModelError = _module.UnsupportedModelError
    UnsupportedPipelineError = _module.UnsupportedPipelineError
    UnsupportedVersionError = _module.UnsupportedVersionError
    VerticalChunkingError = _module.VerticalChunkingError


class UnsupportedTokenizerError(VerticalChunkingError):
    """A tokenizer has a part that may look at a text's far ends: it must have the text whole."""


__all__ = [
    "UnsupportedModelError",
    "UnsupportedPipelineError",
    "UnsupportedTokenizerError",
    "UnsupportedVersionError",
    "VerticalChunkingError",
]
