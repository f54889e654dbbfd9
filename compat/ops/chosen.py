"""Choose what the ops run on: the native kernels or plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from compat.ops import compiled

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
        RuntimeError: The native kernels are not available.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)}; found {backend!r}.")
    if backend == "native" and compiled.library() is None:
        raise RuntimeError(
            f"The native kernels are not available: {compiled.reason()}. Install a C++ compiler, "
            'or use "torch".'
        )
    token = _chosen.set(backend)
    try:
        yield
    finally:
        _chosen.reset(token)


def backend() -> Backend:
    """Return what was chosen; by default "native" where it is available, else "torch"."""
    return _chosen.get() or ("torch" if compiled.library() is None else "native")


def describe() -> str:
    """Describe in one line the native kernels and how they were built, or why torch is used."""
    if compiled.library() is None:
        return f"plain torch, as the native kernels are not available: {compiled.reason()}"
    return f"{'native kernels' if backend() == 'native' else 'plain torch'}, {compiled.reason()}"


def is_native(*tensors: Tensor | None) -> bool:
    """Return whether the native kernels are chosen and accept these tensors."""
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        backend() == "native"
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given))
        and all(
            type(tensor) in (Tensor, nn.Parameter)  # Other kinds may not have data in memory.
            and tensor.device.type == "cpu"
            and tensor.dtype in (torch.float32, torch.bfloat16)
            for tensor in given
        )
    )
