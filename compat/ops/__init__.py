"""Operators of recurrent models that are fast on a CPU, and what they run on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

from compat.ops import _native, _native_mamba2, mamba2

Backend = Literal["native", "torch", "released"]

_chosen: ContextVar[Backend | None] = ContextVar("compat_ops_chosen", default=None)


@contextmanager
def using(backend: Backend) -> Iterator[None]:
    """Choose what the mixers of a model on a CPU run on, in this context.

    Args:
        backend: "native", the ops on compiled kernels; "torch", the ops in plain torch;
            "released", transformers' own path.

    Raises:
        ValueError: There is no such backend.
        RuntimeError: The native kernels are not to be had.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)}; found {backend!r}.")
    if backend == "native" and _native.library() is None:
        raise RuntimeError(
            f"The native kernels are not to be had: {_native.reason()}. Install a C++ compiler, or "
            'use "torch".'
        )
    token = _chosen.set(backend)
    try:
        yield
    finally:
        _chosen.reset(token)


def backend() -> Backend:
    """What was chosen; else "native" where it is to be had, and "torch" where it is not."""
    return _chosen.get() or ("torch" if _native.library() is None else "native")


def describe() -> str:
    """In one line: the native kernels and how they were built, or plain torch and why."""
    if _native.library() is None:
        return f"plain torch, as the native kernels are not to be had: {_native.reason()}"
    return f"{'native kernels' if backend() == 'native' else 'plain torch'}, {_native.reason()}"


mamba2.accelerated = _native_mamba2.forward
