"""Turning vertical chunking on and off in the installed libraries, all of it or nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from compat import _fused, _sentence_transformers, _transformers
from compat._errors import UnsupportedVersionError
from compat._families import family_patches
from compat._patches import Patches
from compat._report import Report, sentence_transformers_status, transformers_status

_lock = threading.RLock()
_patches: Patches | None = None
_models = ExitStack()


def enable_vertical_chunking() -> Report:
    """Let `SentenceTransformer.encode` take `vertical_chunk_size`, in this process.

    Everything that the hooks need is looked at before anything is patched; calling it again does
    nothing. Models that were loaded before take part as well, except that a default chunk size
    stored with a model is read when the model is loaded.

    A family of models that cannot be hooked is left out, as `status()` says; chunks of it raise.

    Returns:
        What was found in each library, and what was done.

    Raises:
        UnsupportedVersionError: A library is installed but is not what the hooks expect; nothing
            is patched then.
    """
    global _models, _patches
    with _lock:
        if _patches is None:
            _transformers.require_support()
            with ExitStack() as stack:
                for held in family_patches():
                    with suppress(UnsupportedVersionError):  # Chunks of that family raise it.
                        stack.enter_context(held)
                stack.enter_context(_fused.full_passes())
                _patches = Patches(_sentence_transformers.plan())
                _models = stack.pop_all()
        return status()


def disable_vertical_chunking() -> None:
    """Put every patched attribute back to the object that it was; without hooks, do nothing."""
    global _patches
    with _lock:
        if _patches is not None:
            _patches.undo()
            _patches = None
            _models.close()


@contextmanager
def vertical_chunking() -> Iterator[Report]:
    """`enable_vertical_chunking()` for the length of a `with` block.

    Where it is on already, it stays on afterwards.
    """
    was_enabled = _patches is not None
    report = enable_vertical_chunking()
    try:
        yield report
    finally:
        if not was_enabled:
            disable_vertical_chunking()


def status() -> Report:
    """The state of vertical chunking in each library; changes nothing."""
    in_models = _patches is not None and any(held.patched for held in family_patches())
    return Report(
        (transformers_status(in_models), sentence_transformers_status(bool(_patches))),
    )
