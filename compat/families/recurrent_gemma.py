"""RecurrentGemma: its state lives on the modules; set it before a chunk, read it after.

As of transformers 5.24.0 the recurrent blocks keep their state as attributes, so that it leaks from
one text into the next. A chunk of several tokens overwrites the convolution's state without reading
it, and the model does not return its cache.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from compat.errors import UnsupportedVersionError
from compat.families.base import Family
from compat.installed.recurrent_cache import forward_of, state_argument

# Two threads must not set the state of the same module at once.
_lock = threading.RLock()


@dataclass
class _State:
    """The attention layers' cache, and each recurrent block's convolution and recurrent state."""

    cache: DynamicCache
    blocks: list[tuple[Tensor, Tensor]]


class RecurrentGemma(Family):
    """RecurrentGemma of transformers; after each chunk the modules have their own state back."""

    def forward(
        self, backbone: PreTrainedModel, input_ids: Tensor, start: int, state: Any
    ) -> tuple[Tensor, Any]:
        """Run one chunk; see `Family.forward`."""
        blocks = [
            layer.temporal_block
            for layer in backbone.layers  # type: ignore[union-attr]
            if hasattr(layer.temporal_block, "rg_lru")
        ]
        if not any(hasattr(block, "conv1d_state") for block in blocks):
            return super().forward(backbone, input_ids, start, state)  # The state is in its cache.
        if state is None:
            if not hasattr(backbone.config, "layer_types"):
                raise UnsupportedVersionError(
                    f"transformers {transformers.__version__}: RecurrentGemma's cache takes every "
                    "layer for an attention layer",
                    "a release whose RecurrentGemmaConfig has layer_types",
                    'pip install --upgrade "transformers>=5.23"',
                )
            zeros = [_zeros(block, input_ids) for block in blocks]
            state = _State(DynamicCache(config=backbone.config), zeros)
        positions = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
        with _lock, ExitStack() as stack:
            after = [
                stack.enter_context(_continued(block, *carried))
                for block, carried in zip(blocks, state.blocks, strict=True)
            ]
            output = backbone(
                input_ids=input_ids,
                position_ids=positions.expand(len(input_ids), -1),
                use_cache=True,
                return_dict=True,
                **{state_argument(forward_of(backbone)): state.cache},
            )
            state.blocks = [read() for read in after]
        return output.last_hidden_state, state

    def select_rows(self, state: Any, rows: Tensor) -> Any:
        """Return the state of some rows; rows is (n,) int64."""
        if not isinstance(state, _State):
            return super().select_rows(state, rows)
        state.cache = super().select_rows(state.cache, rows)
        state.blocks = [(conv[rows], recurrent[rows]) for conv, recurrent in state.blocks]
        return state


def _zeros(block: Any, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    batch, weight = len(input_ids), block.conv_1d.weight
    # Offloaded weights, which are loaded when they are used, are on the meta device before.
    device = input_ids.device if weight.is_meta else weight.device
    conv = torch.zeros(batch, block.lru_width, block.conv1d_width - 1, dtype=weight.dtype)
    return conv.to(device), torch.zeros(batch, block.lru_width, device=device, dtype=torch.float32)


@contextmanager
def _continued(block: Any, conv: Tensor, recurrent: Tensor) -> Iterator[Any]:
    """Let a recurrent block begin from a state; yield a function that returns the later state."""
    before = block.conv1d_state, block.rg_lru.recurrent_states
    width = conv.shape[-1]
    seen = None

    def prepend(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        nonlocal seen
        seen = torch.cat([conv, inputs[0]], dim=-1)
        return (seen,)

    def cut(_: nn.Module, __: tuple[Tensor], output: Tensor) -> Tensor:
        return output[..., width:]

    def read() -> tuple[Tensor, Tensor]:
        # A single token does not pass through the convolution's module, and its state stays right.
        state = block.conv1d_state if seen is None else seen[..., -width:]
        return state, block.rg_lru.recurrent_states

    hooks = [
        block.conv_1d.register_forward_pre_hook(prepend),
        block.conv_1d.register_forward_hook(cut),
    ]
    block.conv1d_state, block.rg_lru.recurrent_states = conv, recurrent
    try:
        yield read
    finally:
        for hook in hooks:
            hook.remove()
        block.conv1d_state, block.rg_lru.recurrent_states = before
