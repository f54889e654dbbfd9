"""MiniMax: a cache that counts tokens where attention keeps them, and a state in float32.

As of transformers 5.24.0 its cache asks layer 0 for the length of the text, but layer 0 holds no
keys where it is linear. The cache also leaves out the linear layers' state when rows are selected,
and those layers keep their state in the model's dtype.
"""

from __future__ import annotations

import importlib
from contextlib import ExitStack
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from compat.families.base import Family


class MiniMax(Family):
    """MiniMax-01 of transformers, with a cache of compat's own."""

    def forward(
        self, backbone: PreTrainedModel, input_ids: Tensor, start: int, state: Any
    ) -> tuple[Tensor, Any]:
        """Run one chunk; see `Family.forward`."""
        if state is None:
            state = _cache_class()()
        with ExitStack() as hooks:
            layer: Any
            for layer in backbone.modules():
                if hasattr(layer, "qkv_proj") and hasattr(layer, "slope_rate"):
                    # Between these two hooks the layer computes in the dtype that it is given.
                    hooks.enter_context(layer.qkv_proj.register_forward_hook(_widen))
                    hooks.enter_context(layer.out_proj.register_forward_pre_hook(_narrow))
            return super().forward(backbone, input_ids, start, state)


def _widen(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.float()


def _narrow(module: nn.Linear, inputs: tuple[Tensor, ...]) -> Tensor:
    return inputs[0].to(module.weight.dtype)


@cache
def _cache_class() -> type[Any]:
    module: Any = importlib.import_module("transformers.models.minimax.modeling_minimax")
    released: type[Any] = module.MiniMaxCache
    if "reorder_cache" in vars(released):
        return released  # This release counts tokens and reorders rows by itself.

    class ChunkCache(released):  # type: ignore[misc]
        def _counting_layer(self, layer_idx: int) -> int:
            counting = [i for i, layer in enumerate(self.layers) if layer.get_seq_length()]
            return layer_idx if layer_idx in counting or not counting else counting[0]

        def get_seq_length(self, layer_idx: int = 0) -> int:
            length: int = super().get_seq_length(self._counting_layer(layer_idx))
            return length

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
            sizes: tuple[int, int] = super().get_mask_sizes(
                query_length, self._counting_layer(layer_idx)
            )
            return sizes

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self.linear_cache: list[Any] = [
                state[beam_idx] if isinstance(state, Tensor) else state
                for state in self.linear_cache
            ]

    return ChunkCache
