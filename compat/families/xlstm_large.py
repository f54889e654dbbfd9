"""xLSTM-large of the xlstm package: not a transformers model, and its forward gives logits.

Its hidden states are the inputs of its head: `model.backbone(model.embedding(input_ids), state)`,
after the last norm. Its state, as of xlstm 2.0.6, is a dict with the tensors (c, n, m) of each
block: (batch, nheads, qk_head_dim, v_head_dim), (batch, nheads, qk_head_dim) and (batch, nheads,
1). The model updates them in place.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from compat.errors import UnsupportedModelError
from compat.families.base import Family
from compat.installed.eager import eager


class XLstmLarge(Family):
    """`xLSTMLarge`, whose native kernels are run in float32 whatever the model's dtype."""

    @eager
    def forward(
        self, backbone: Any, input_ids: Tensor, start: int, state: Any
    ) -> tuple[Tensor, Any]:
        """Run one chunk; see `Family.forward`."""
        embedding = backbone.embedding(input_ids)
        with ExitStack() as hooks:
            # The kernels' own state is in float32, and inputs of a lower dtype beside it raise.
            if embedding.dtype != torch.float32 and "native" in backbone.config.chunkwise_kernel:
                for block in backbone.backbone.blocks:
                    _run_in_float32(block.mlstm_layer.mlstm_backend, embedding.dtype, hooks)
            hidden, state = backbone.backbone(embedding, state)
        return hidden, state

    def select_rows(self, state: Any, rows: Tensor) -> dict[int, tuple[Tensor, ...]]:
        """Return the state of some rows; rows is (n,) int64."""
        return {block: tuple(part[rows] for part in parts) for block, parts in state.items()}


def is_xlstm_large(model: object) -> bool:
    """Return whether a model is an `xLSTMLarge`, without importing the package."""
    module = sys.modules.get("xlstm.xlstm_large.model")
    return module is not None and isinstance(model, module.xLSTMLarge)


def family_of(model: Any) -> Family:
    """Return the way in which an `xLSTMLarge` carries its state.

    Raises:
        UnsupportedModelError: The mode is a training mode, the kernel takes no state, or the state
            is kept in a lower dtype than float32.
    """
    kernel = model.config.chunkwise_kernel
    carries = kernel.startswith("chunkwise--") and "siging" not in kernel
    settings = {
        "mode": (model.config.mode, "inference"),
        "chunkwise_kernel": (kernel, kernel if carries else "chunkwise--native_autograd"),
        "inference_state_dtype": (model.config.inference_state_dtype, "float32"),
    }
    for name, (found, needed) in settings.items():
        if found != needed:
            raise UnsupportedModelError(
                f"an xLSTMLarge with {name}={found!r}",
                f"{name}={needed!r}, with which the state is carried exactly",
                f"build xLSTMLarge(dataclasses.replace(model.config, {name}={needed!r})) and give "
                "it model.state_dict()",
            )
    return XLstmLarge(grows=False)


def _run_in_float32(kernels: nn.Module, dtype: torch.dtype, hooks: ExitStack) -> None:
    """Give the kernels float32 inputs, and the layer its own dtype, until the hooks are closed."""

    def raise_inputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {k: v.float() if isinstance(v, Tensor) else v for k, v in kwargs.items()}

    def lower_output(_: nn.Module, __: tuple[Any, ...], output: tuple[Tensor, Any]) -> Any:
        return output[0].to(dtype), output[1]

    hooks.enter_context(kernels.register_forward_pre_hook(raise_inputs, with_kwargs=True))
    hooks.enter_context(kernels.register_forward_hook(lower_output))
