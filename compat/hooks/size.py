"""The vertical chunk size on its way to other processes: it brings the hooks along."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

encoding: ContextVar[bool] = ContextVar("compat_encoding", default=False)
"""Whether a call of `encode` in chunks is under way, which holds the hooks."""


class Size(int):
    """A vertical chunk size that turns the hooks on in the process that unpickles it.

    Without it a worker process would take the argument, ignore it, and read the whole text at once.
    """

    def __reduce__(self) -> tuple[Callable[..., Size], tuple[type[Size], int]]:
        return _receive, (type(self), int(self))


class Share(Size):
    """The size with a worker's share of the texts, which asks for word of what was cut."""


def _receive(kind: type[Size], size: int) -> Size:
    from compat.hooks.switch import enable_vertical_chunking

    if not encoding.get():  # Else the running call holds the hooks, and they end with it.
        enable_vertical_chunking()
    return kind(size)
