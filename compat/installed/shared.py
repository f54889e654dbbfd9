"""Open something for whoever holds it at a time, in any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Generic, TypeVar

T = TypeVar("T")


class Shared(Generic[T]):
    """A context that all holders share: the first one opens it, and the last one closes it.

    Args:
        opening: Makes the context anew, each time that nobody holds it.
    """

    def __init__(self, opening: Callable[[], AbstractContextManager[T]]) -> None:
        self._opening = opening
        self._lock = threading.RLock()
        self._holders = 0
        self._stack = ExitStack()
        self._value: T | None = None

    @property
    def value(self) -> T | None:
        """Return what the open context gave; None while nobody holds it."""
        return self._value

    def __enter__(self) -> None:
        with self._lock:
            if not self._holders:
                self._value = self._stack.enter_context(self._opening())
            self._holders += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._holders -= 1
            if not self._holders:
                self._value = None
                self._stack.close()
