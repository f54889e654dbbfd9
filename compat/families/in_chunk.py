"""Which mixers run on the ops in place of the released code, and while what goes through them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

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
