"""RWKV-4: the state is a list of five tensors, (batch, hidden_size, layers).

On a CPU, where no gradient is recorded, the released wkv is a loop over tokens; there that of
`compat.ops.rwkv4` takes its place. The fork, which masks padding itself, is left alone.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compat._family import Family
from compat._patches import Held, Patch
from compat._transformers import parameters
from compat.ops._where import in_chunk, is_in_chunk, replace_released
from compat.ops.rwkv4 import rwkv_linear_attention


class Rwkv(Family):
    """RWKV-4 of transformers, which ignores attention masks: the chunk loop needs none."""

    def forward(
        self, backbone: PreTrainedModel, input_ids: Tensor, start: int, state: Any
    ) -> tuple[Tensor, Any]:
        """Run one chunk; see `Family.forward`."""
        with PATCHED, in_chunk():
            return self._rows(backbone, input_ids, start, state)

    def _rows(
        self, backbone: PreTrainedModel, input_ids: Tensor, start: int, state: Any
    ) -> tuple[Tensor, Any]:
        if input_ids.shape[1] > 1 or len(input_ids) == 1:
            return super().forward(backbone, input_ids, start, state)
        # As of transformers 5.23.0 the token shift of a single token mixes the rows of a batch.
        results = []
        for index, row in enumerate(input_ids):
            own = None if state is None else [part[index : index + 1] for part in state]
            results.append(super().forward(backbone, row[None], start, own))
        hidden, states = zip(*results, strict=True)
        return torch.cat(hidden), [torch.cat(parts) for parts in zip(*states, strict=True)]


def _on_ops(released: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(released)
    def attention(
        time_decay: Tensor,
        time_first: Tensor,
        key: Tensor,
        value: Tensor,
        state: Any = None,
        return_state: bool = False,
    ) -> Any:
        ours = is_in_chunk() or (state is None and not return_state)
        run = rwkv_linear_attention if ours and replace_released(key) else released
        return run(time_decay, time_first, key, value, state=state, return_state=return_state)

    return attention


def plan() -> list[Patch]:
    """What to patch in transformers.

    Nothing where its wkv is another function, or where RWKV masks padding: it continues by itself.
    """
    module: Any = importlib.import_module("transformers.models.rwkv.modeling_rwkv")
    released = getattr(module, "rwkv_linear_attention", None)
    if released is None or _masks_padding(module):
        return []
    return [(module, "rwkv_linear_attention", _on_ops(released))]


def _masks_padding(module: Any) -> bool:
    return "attention_mask" in parameters(module.RwkvSelfAttention.forward)


PATCHED = Held(plan)
