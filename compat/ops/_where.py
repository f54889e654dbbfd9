"""Where the ops run: in place of a released model's own code, and on the native kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from compat import ops

_in_chunk: ContextVar[bool] = ContextVar("compat_in_chunk", default=False)


@contextmanager
def in_chunk() -> Iterator[None]:
    """While one of our chunks goes through a model."""
    token = _in_chunk.set(True)
    try:
        yield
    finally:
        _in_chunk.reset(token)


def is_in_chunk() -> bool:
    """Whether it is one of our chunks that goes through: a state may be that of `generate`.

    The tokens that it makes must not change.
    """
    return _in_chunk.get()


def replace_released(tensor: Tensor) -> bool:
    """Whether a mixer that is given this tensor runs on the ops, not on its own torch code.

    On a CPU, without gradients, in eager mode and in the model's own dtypes; elsewhere the released
    code is left alone.
    """
    return (
        ops.backend() != "released"
        and tensor.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
    )


def is_native(*tensors: Tensor | None) -> bool:
    """Whether the native kernels are chosen, and can be given these tensors."""
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        ops.backend() == "native"
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given))
        and all(
            type(tensor) in (Tensor, nn.Parameter)  # Others need not have their data in memory.
            and tensor.device.type == "cpu"
            and tensor.dtype in (torch.float32, torch.bfloat16)
            for tensor in given
        )
    )
