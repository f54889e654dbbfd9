"""Turn vertical chunking on and off in the installed libraries, completely or not at all."""

from __future__ import annotations

import atexit
import copyreg
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress

from compat.errors import UnsupportedVersionError
from compat.families import delta, mamba2
from compat.families.lookup import family_patches
from compat.hooks import encoder
from compat.hooks.report import Report, sentence_transformers_status, transformers_status
from compat.hooks.size import Share, Size, encoding
from compat.installed import recurrent_cache
from compat.installed.patches import Patches
from compat.installed.shared import Shared

# A worker process without the hooks would take the argument, ignore it, and read whole texts.
for _kind in (Size, Share):
    copyreg.pickle(_kind, lambda size: (_receive, (type(size), int(size))))

_lock = threading.RLock()
_lasting = ExitStack()
# Otherwise the hooks might be let go of after the module that knows how.
atexit.register(_lasting.close)
_is_lasting = False


def held() -> AbstractContextManager[None]:
    """Return what keeps the hooks in for the length of a `with` block, whoever else holds them.

    The first holder puts them in, and the last one takes them out. A call of `encode` in chunks is
    a holder too.
    """
    return _hooks


@contextmanager
def _put_in() -> Iterator[Patches]:
    """Replace attributes of the libraries: all that are planned, or none."""
    recurrent_cache.require_support()
    with ExitStack() as stack:
        for family in family_patches():
            with suppress(UnsupportedVersionError):  # Chunks of that family raise the error.
                stack.enter_context(family)
        stack.enter_context(mamba2.full_passes())
        for rule in delta.PATCHED.values():
            stack.enter_context(rule)
        yield stack.enter_context(Patches(encoder.plan(held)))


_hooks = Shared(_put_in)


def enable_vertical_chunking() -> Report:
    """Let `SentenceTransformer.encode` take `vertical_chunk_size`, in this process.

    All that the hooks need is checked before anything is patched; calling it again does nothing.
    Models that were loaded before take part as well, except that a default chunk size stored with a
    model is read only when the model is loaded.

    A family of models that cannot be hooked is left out, and `status()` says so; reading chunks
    with it raises.

    Returns:
        The report of `status()`: what was found in each library, and what was done.

    Raises:
        UnsupportedVersionError: A library is installed but is not what the hooks expect; nothing
            is patched then.
    """
    global _is_lasting
    with _lock:
        if not _is_lasting:
            _lasting.enter_context(held())
            _is_lasting = True
        return status()


def disable_vertical_chunking() -> None:
    """Let go of the hooks that `enable_vertical_chunking()` holds, however often it was called.

    As soon as nobody else holds the hooks, every patched attribute is the very object again that it
    was. Other holders are a `with vertical_chunking()` block, and a call of `encode` in chunks that
    is still running in another thread. Where there are no hooks, nothing happens.
    """
    global _is_lasting
    with _lock:
        _is_lasting = False
        _lasting.close()


@contextmanager
def vertical_chunking() -> Iterator[Report]:
    """Turn vertical chunking on for the length of a `with` block, in all threads.

    Each block holds the hooks for itself: neither the end of another block nor
    `disable_vertical_chunking()` takes them away, and where chunking was on before, it stays on
    afterwards.
    """
    with held():
        yield status()


def _receive(kind: type[Size], size: int) -> Size:
    if not encoding.get():  # Otherwise the running call holds the hooks until it ends.
        enable_vertical_chunking()
    return kind(size)


def status() -> Report:
    """Report the state of vertical chunking in each library, without changing anything."""
    patches = _hooks.value
    in_models = patches is not None and any(held.patched for held in family_patches())
    return Report((transformers_status(in_models), sentence_transformers_status(bool(patches))))
