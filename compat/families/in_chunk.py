"""Choose the mixers that run on the ops instead of the released code while a chunk is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compat import ops
from compat.families.base import Family
from compat.installed.patches import Held

_in_chunk: ContextVar[bool] = ContextVar("compat_in_chunk", default=False)
_differentiable: ContextVar[bool] = ContextVar("compat_differentiable", default=False)


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


@contextmanager
def differentiable() -> Iterator[None]:
    """Mark this context as one in which a chunk's gradient reaches the state that it began from.

    The ops carry gradients and autocast; released kernels may not hand the gradient of a state on.
    """
    token = _differentiable.set(True)
    try:
        yield
    finally:
        _differentiable.reset(token)


def is_differentiable() -> bool:
    """Return True while chunks are run whose gradient is wanted, in both of their runs."""
    return _differentiable.get()


def replace_released(tensor: Tensor) -> bool:
    """Return whether a mixer that is given this tensor runs on the ops, not on its own torch code.

    It does on a CPU, without gradients, in eager mode and in the model's own dtypes; and where
    chunks carry gradients, on any device that records them. Everywhere else the released code is
    left alone.
    """
    if (
        ops.backend() == "released"
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
    ):
        return False
    if _differentiable.get() and (torch.is_grad_enabled() or tensor.device.type == "cpu"):
        return True
    return (
        tensor.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


class OnOps(Family):
    """Models whose mixers are patched while a chunk is run, except for gradients of other kinds.

    Attributes:
        patched: The patches of each model type.
    """

    patched: ClassVar[Mapping[str, Held]]

    def forward(
        self, backbone: PreTrainedModel, input_ids: Tensor, start: int, state: Any
    ) -> tuple[Tensor, Any]:
        """Run one chunk; see `Family.forward`."""
        if torch.is_grad_enabled() and not is_differentiable():
            return super().forward(backbone, input_ids, start, state)
        with self.patched[backbone.config.model_type], in_chunk():
            return super().forward(backbone, input_ids, start, state)
