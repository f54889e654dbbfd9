"""Choose the mixers that run on the ops instead of the released code while a chunk is run."""

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
    """Mark this context as running a chunk of compat's, for the length of a `with` block."""
    token = _in_chunk.set(True)
    try:
        yield
    finally:
        _in_chunk.reset(token)


def is_in_chunk() -> bool:
    """Return True while the chunk loop runs the model.

    A state in the cache may also come from `generate`, and the tokens that it makes must not
    change.
    """
    return _in_chunk.get()


def replace_released(tensor: Tensor) -> bool:
    """Return whether a mixer that is given this tensor runs on the ops, not on its own torch code.

    It does on a CPU, without gradients, in eager mode and in the model's own dtypes. Everywhere
    else the released code is left alone.
    """
    return (
        ops.backend() != "released"
        and tensor.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
    )
