"""RWKV-4: the state is a list of five tensors, (batch, hidden_size, layers)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from compat._family import Family


class Rwkv(Family):
    """RWKV-4 of transformers, which ignores attention masks: the chunk loop needs none."""

    def select_rows(self, state: Any, rows: Tensor) -> list[Tensor]:
        """The state of some rows."""
        return [part[rows] for part in state]
