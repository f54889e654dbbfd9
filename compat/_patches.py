"""Replacing attributes of released libraries, and putting the very same objects back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

Patch = tuple[Any, str, object]
"""A class or module, the name of an attribute, and what to put there."""


class Patches:
    """Attributes that were replaced, and what they were.

    Args:
        planned: The patches; where one of them fails, those before it are undone.
    """

    def __init__(self, planned: Sequence[Patch]) -> None:
        self._undo: list[Patch] = []
        try:
            for owner, name, value in planned:
                self._set(owner, name, value)
        except BaseException:
            self.undo()
            raise

    def __len__(self) -> int:
        return len(self._undo)

    def _set(self, owner: Any, name: str, value: object) -> None:
        # An inherited attribute is overridden, and later deleted again.
        before = vars(owner).get(name, self)
        setattr(owner, name, value)
        self._undo.append((owner, name, before))

    def undo(self) -> None:
        """Put the very objects back that were there."""
        while self._undo:
            owner, name, before = self._undo.pop()
            if before is self:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


class Held:
    """Patches that are in place while anybody holds them, in any thread."""

    def __init__(self, plan: Callable[[], Sequence[Patch]]) -> None:
        self._plan = plan
        self._lock = threading.Lock()
        self._holders = 0
        self._patches: Patches | None = None

    @property
    def patched(self) -> bool:
        """Whether anything is replaced at this moment."""
        return bool(self._patches)

    def __enter__(self) -> None:
        with self._lock:
            if self._patches is None:
                self._patches = Patches(self._plan())
            self._holders += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._holders -= 1
            if not self._holders and self._patches is not None:
                self._patches.undo()
                self._patches = None
