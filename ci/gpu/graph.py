"""Capture the step of one chunk as a CUDA graph: shapes are constant, as a state does not grow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compat.families.lookup import backbone_of


class GraphedStep:
    """A model's step from state to state, for chunks of one size.

    It is for measuring: nothing in compat takes it. The first chunk is run as it is, since it makes
    the state; what the captured step leaves is copied to where it reads the state from.

    Raises:
        ValueError: The model keeps more than a recurrent state, or a chunk has another shape.
        RuntimeError: CUDA cannot capture the step.
    """

    def __init__(self, model: PreTrainedModel, rows: int, size: int) -> None:
        self._backbone, self._family = backbone_of(model)
        if self._family.grows:
            raise ValueError(
                f"Found {type(self._backbone).__name__}, whose attention layers keep the keys of "
                "the whole text; needed: a model with a recurrent state alone."
            )
        self._ids = torch.zeros(rows, size, dtype=torch.int64, device=self._backbone.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._state: Any = None
        self._out: Tensor | None = None

    def __call__(self, ids: Tensor) -> Tensor:
        """Run the next chunk; ids is (rows, size). The result is overwritten by the next call."""
        if ids.shape != self._ids.shape:
            raise ValueError(f"Found ids of {tuple(ids.shape)}; needed: {tuple(self._ids.shape)}.")
        self._ids.copy_(ids)
        if self._state is None:
            out, self._state = self._family.forward(self._backbone, self._ids, 0, None)
            return out
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        assert self._out is not None
        self._graph.replay()
        return self._out

    def _capture(self) -> None:
        size = self._ids.shape[1]
        kept = [(held[key], held[key].clone()) for held, key in slots(self._state)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # Once beside, so that all is compiled and tuned.
            self._step(size)
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, before in kept:
            tensor.copy_(before)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._out = self._step(size)

    def _step(self, start: int) -> Tensor:
        """Run one chunk, and leave its state in the tensors from which it was read."""
        before = [held[key] for held, key in slots(self._state)]
        out, self._state = self._family.forward(self._backbone, self._ids, start, self._state)
        for (held, key), tensor in zip(slots(self._state), before, strict=True):
            if held[key] is not tensor:
                tensor.copy_(held[key])
                held[key] = tensor
        return out


def slots(cache: Any) -> Iterator[tuple[Any, Any]]:
    """Yield where the tensors of the recurrent states are, as a container and a key."""
    for layer in cache.layers:
        for name in ("conv_states", "recurrent_states"):
            held = getattr(layer, name, None)
            if isinstance(held, Tensor):
                yield vars(layer), name
            elif isinstance(held, dict):
                yield from ((held, key) for key in held)
            elif isinstance(held, list):
                yield from ((held, key) for key in range(len(held)))
