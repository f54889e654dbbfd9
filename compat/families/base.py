"""Carry a model's state from one vertical chunk to the next, in the way that most families need."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compat.errors import UnsupportedModelError
from compat.installed.eager import eager
from compat.installed.recurrent_cache import forward_of, parameters, state_argument, state_of


@dataclass(frozen=True)
class Family:
    """Models that give out their state as a cache, and continue exactly from it.

    Families that differ have a subclass in a module of their own.

    Attributes:
        grows: True where attention layers keep keys and values of the whole text beside the state.
    """

    grows: bool

    @eager
    def forward(
        self, backbone: PreTrainedModel, input_ids: Tensor, start: int, state: Any
    ) -> tuple[Tensor, Any]:
        """Run one chunk through all layers.

        Args:
            backbone: The model without its head.
            input_ids: (batch, chunk) int64, without padding before any token.
            start: How many tokens of the text came before the chunk.
            state: The state that the previous chunk returned; None for the first chunk.

        Returns:
            The last hidden state, (batch, chunk, hidden_size), and the state after the chunk.

        Raises:
            UnsupportedVersionError: The installed model takes or gives no state under a known name.
        """
        forward = forward_of(backbone)
        extra = {state_argument(forward): state}
        if "position_ids" in parameters(forward):
            positions = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
            extra["position_ids"] = positions.expand(len(input_ids), -1)
        # A kernel for single tokens may write in place without a trace.
        before = _states(state) if input_ids.shape[1] > 1 else []
        output = backbone(input_ids=input_ids, use_cache=True, return_dict=True, **extra)
        _require_written(backbone, before, _states(state_of(output)) if before else [])
        return output.last_hidden_state, state_of(output)

    def backward(self) -> AbstractContextManager[None]:
        """Hold what the backward of a chunk needs that its forward has not recorded."""
        return nullcontext()

    def select_rows(self, state: Any, rows: Tensor) -> Any:
        """Return the state of some rows of the batch; rows is (n,) int64."""
        if isinstance(state, list):  # A list holds tensors without a cache around them.
            return [part[rows] for part in state]
        state.reorder_cache(rows)
        return state


_State = tuple[Tensor, int, Tensor]
"""A tensor, how often it was written to, and some of its numbers."""


def _states(cache: Any) -> list[list[_State]]:
    """Return the states of the recurrent layers in a cache."""
    found = []
    for layer in getattr(cache, "layers", ()):
        held: list[Any] = [getattr(layer, name, ()) for name in ("conv_states", "recurrent_states")]
        parts = [part for states in held for part in getattr(states, "values", states.__iter__)()]
        found.append([_seen(part) for part in parts if isinstance(part, Tensor)])
    return found


def _seen(part: Tensor) -> _State:
    return part, part._version, part.detach()[..., -1:].flatten()[-64:].clone()


def _require_written(
    backbone: PreTrainedModel, before: list[list[_State]], after: list[list[_State]]
) -> None:
    """Raise where a layer that had a state has returned none, whatever the cause."""
    for index, (old, new) in enumerate(zip(before, after, strict=False)):
        if old and all(map(_is_same, old, new)):
            raise UnsupportedModelError(
                f"a {type(backbone).__name__} whose layer {index} gave no state after a chunk",
                "layers that take their state from the cache, and give it",
                "remove what replaces the layer's forward, or encode it without "
                "vertical_chunk_size",
            )


def _is_same(old: _State, new: _State) -> bool:
    return old[0] is new[0] and old[1] == new[1] and torch.equal(old[2], new[2])
