"""How a model carries its state from one vertical chunk to the next: what most families need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ._transformers import forward_of, parameters, state_argument, state_of


@dataclass(frozen=True)
class Family:
    """Models that give out their state as a cache, and continue exactly from it.

    Families that differ have a subclass in a module of their own.

    Attributes:
        grows: Whether attention layers keep keys and values of the whole text beside the state.
    """

    grows: bool

    def forward(
        self, backbone: PreTrainedModel, input_ids: Tensor, start: int, state: Any
    ) -> tuple[Tensor, Any]:
        """Run one chunk through all layers.

        Args:
            backbone: The model without its head.
            input_ids: (batch, chunk) int64, without padding before any token.
            start: How many tokens of the text came before the chunk.
            state: What the chunk before gave; None for the first.

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
        output = backbone(input_ids=input_ids, use_cache=True, return_dict=True, **extra)
        return output.last_hidden_state, state_of(output)

    def select_rows(self, state: Any, rows: Tensor) -> Any:
        """The state of some rows of the batch; rows is (n,) int64."""
        if isinstance(state, list):  # Tensors without a cache around them.
            return [part[rows] for part in state]
        state.reorder_cache(rows)
        return state
