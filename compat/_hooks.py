"""Turning vertical chunking on and off in the installed libraries, all of it or nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from compat import _fused, _sentence_transformers, _transformers
from compat._errors import UnsupportedVersionError
from compat._families import family_patches
from compat._patches import Patches

State = Literal["native", "patched", "absent"]

_lock = threading.RLock()
_patches: Patches | None = None
_models = ExitStack()


@dataclass(frozen=True)
class LibraryStatus:
    """Vertical chunking in one library.

    Attributes:
        library: The distribution's name.
        version: Its installed version; None where it is not installed.
        state: `native` where the library does it itself, `patched` where compat's hooks do it,
            `absent` where it is not to be had.
        reason: Why it is in that state.
    """

    library: str
    version: str | None
    state: State
    reason: str


@dataclass(frozen=True)
class Report:
    """The status of each library, and what models run on; as a string, a table and two lines.

    Attributes:
        libraries: What is native, patched or absent, and why.
        fused: What the Mamba2 mixers of a model on a GPU run on, or why on nothing of their own.
        cpu: What Mamba2, Mamba-1 and RWKV on a CPU run on: the native kernels and how they were
            built, or plain torch and why.
    """

    libraries: tuple[LibraryStatus, ...]
    fused: str
    cpu: str

    def __str__(self) -> str:
        head = ("library", "version", "state", "reason")
        rows = [head] + [(s.library, s.version or "-", s.state, s.reason) for s in self.libraries]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        ]
        runs = [f"fused path of Mamba2 on a GPU: {self.fused}", f"on a CPU: {self.cpu}"]
        return "\n".join([*lines, "", *runs])


def enable_vertical_chunking() -> Report:
    """Let `SentenceTransformer.encode` take `vertical_chunk_size`, in this process.

    Everything that the hooks need is looked at before anything is patched; calling it again does
    nothing. Models that were loaded before take part as well, except that a default chunk size
    stored with a model is read when the model is loaded.

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
    libraries = (_transformers_status(), _sentence_transformers_status())
    return Report(libraries, _fused.describe(), _fused.describe_on_cpu())


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _transformers_status() -> LibraryStatus:
    name = "transformers"
    if reason := _transformers.probe():
        return LibraryStatus(name, _installed(name), "absent", reason)
    if _patches is not None and any(held.patched for held in family_patches()):
        reason = "Mamba-1, RWKV and xLSTM are patched; the others continue from their cache"
        return LibraryStatus(name, _installed(name), "patched", reason)
    reason = "models continue from their cache; compat.iter_chunks feeds them"
    return LibraryStatus(name, _installed(name), "native", reason)


def _sentence_transformers_status() -> LibraryStatus:
    name = "sentence-transformers"
    if not _sentence_transformers.installed():
        return LibraryStatus(name, None, "absent", "not installed")
    if _patches:
        reason = "encode takes vertical_chunk_size; Transformer and Pooling work on chunks"
        return LibraryStatus(name, _installed(name), "patched", reason)
    if _sentence_transformers.is_native():
        reason = "this release has vertical_chunk_size itself"
        return LibraryStatus(name, _installed(name), "native", reason)
    reason = "hooks not installed: call compat.enable_vertical_chunking()"
    try:
        _sentence_transformers.plan()
    except UnsupportedVersionError as error:
        reason = error.found
    return LibraryStatus(name, _installed(name), "absent", reason)
