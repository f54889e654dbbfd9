"""The functions as layers that `kernels` puts in the place of a model's own.

A layer has the parameters of what it replaces; what the functions take besides goes through
`**kwargs`.
"""

from typing import Any

from torch import Tensor, nn

from . import causal_conv1d_fn as _fn
from . import causal_conv1d_update as _update
from ._serve import further


class causal_conv1d_fn(nn.Module):  # noqa: D101
    def forward(
        self,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """`causal_conv1d_fn` of this kernel.

        Args:
            hidden_states: (batch, dim, seqlen).
            weight: (dim, width).
            bias: (dim,).
            activation: "silu" (or "swish"), or None.
            **kwargs: `seq_idx`, `initial_states`, `return_final_states`, `final_states_out`.
        """
        others = further("causal_conv1d_fn", kwargs)
        return _fn(hidden_states, weight, bias, activation=activation, **others)


class causal_conv1d_update(nn.Module):  # noqa: D101
    def forward(
        self,
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """`causal_conv1d_update` of this kernel, which writes to conv_state.

        Args:
            hidden_states: (batch, dim, seqlen).
            conv_state: (batch, dim, at least width - 1).
            weight: (dim, width).
            bias: (dim,).
            activation: "silu" (or "swish"), or None.
        """
        return _update(hidden_states, conv_state, weight, bias, activation)


__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]
