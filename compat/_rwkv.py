"""RWKV-4: the state is a list of five tensors, (batch, hidden_size, layers)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compat._family import Family


class Rwkv(Family):
    """RWKV-4 of transformers, which ignores attention masks: the chunk loop needs none."""

    def forward(
        self, backbone: PreTrainedModel, input_ids: Tensor, start: int, state: Any
    ) -> tuple[Tensor, Any]:
        """Run one chunk; see `Family.forward`."""
        if input_ids.shape[1] > 1 or len(input_ids) == 1:
            return super().forward(backbone, input_ids, start, state)
        # As of transformers 5.23.0 the token shift of a single token mixes the rows of a batch.
        results = []
        for index, row in enumerate(input_ids):
            own = None if state is None else [part[index : index + 1] for part in state]
            results.append(super().forward(backbone, row[None], start, own))
        hidden, states = zip(*results, strict=True)
        return torch.cat(hidden), [torch.cat(parts) for parts in zip(*states, strict=True)]

    def select_rows(self, state: Any, rows: Tensor) -> list[Tensor]:
        """The state of some rows."""
        return [part[rows] for part in state]
