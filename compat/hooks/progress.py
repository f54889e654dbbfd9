"""One progress bar over a whole job, in characters of text, that moves with every chunk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm.auto import tqdm

_outer: ContextVar[Any] = ContextVar("compat_progress_bar", default=None)


@contextmanager
def into(bar: Any) -> Iterator[None]:
    """Let `encode` move `bar` (a tqdm, in characters) instead of opening a bar of its own."""
    token = _outer.set(bar)
    try:
        yield
    finally:
        _outer.reset(token)


@contextmanager
def opened(total: int | None, show: bool) -> Iterator[Any]:
    """The bar of `into`, or else a new one over `total` characters (None: unknown), if `show`."""
    if (outer := _outer.get()) is not None:
        yield outer
        return
    with tqdm(total=total, unit="char", unit_scale=True, desc="Chunks", disable=not show) as bar:
        yield bar
