"""The functions as layers that `kernels` puts in the place of a model's own.

A layer has the parameters of what it replaces; what the functions take besides goes through
`**kwargs`. The shapes are those of the functions.
"""

# ruff: noqa: D101

from typing import Any

import torch
from torch import Tensor, nn

from . import mamba_chunk_scan_combined as _chunk_scan
from . import mamba_inner_fn as _inner
from . import mamba_split_conv1d_scan_combined as _split
from . import selective_scan_fn as _scan
from . import selective_state_update as _update
from ._causal_conv1d._serve import OPTIONS, further
from ._causal_conv1d.layers import causal_conv1d_fn, causal_conv1d_update

OPTIONS.add("state_dtype")  # Of the functions of Mamba-2, from the next release of mamba-ssm on.


def _further(layer: str, on: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """As `further`, for a function of Mamba-2; `state_dtype` is looked at here on a CPU.

    It is the dtype in which the states are kept between inner chunks. The functions have it as soon
    as the newest release of mamba-ssm has: where the one for a GPU has not, that raises.

    Raises:
        NotImplementedError: It is another than that of the states on a CPU.
    """
    others = further(layer, given)
    if on.device.type != "cpu" or "state_dtype" not in others:
        return others
    wanted, kept = others.pop("state_dtype"), torch.promote_types(on.dtype, torch.float32)
    if wanted not in (kept, torch.float32):
        raise NotImplementedError(
            f"{layer}: found state_dtype {wanted} with tensors of {on.dtype} on a CPU, where the "
            f"states are kept in {kept}. Leave it out, or move the tensors to a GPU."
        )
    return others


class mamba_split_conv1d_scan_combined(nn.Module):
    def forward(
        self,
        zxbcdt: Tensor,
        conv1d_weight: Tensor,
        conv1d_bias: Tensor | None,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
        chunk_size: int,
        initial_states: Tensor | None = None,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        activation: str = "silu",
        rmsnorm_weight: Tensor | None = None,
        rmsnorm_eps: float = 1e-6,
        outproj_weight: Tensor | None = None,
        outproj_bias: Tensor | None = None,
        headdim: int | None = None,
        ngroups: int = 1,
        norm_before_gate: bool = True,
        **kwargs: Any,
    ) -> Any:
        """`mamba_split_conv1d_scan_combined` of this kernel.

        Further: `seq_idx`, `initial_conv_states`, `return_final_conv_states`, `state_dtype`.
        """
        return _split(
            zxbcdt,
            conv1d_weight,
            conv1d_bias,
            dt_bias,
            A,
            D,
            chunk_size,
            initial_states=initial_states,
            dt_limit=dt_limit,
            return_final_states=return_final_states,
            activation=activation,
            rmsnorm_weight=rmsnorm_weight,
            rmsnorm_eps=rmsnorm_eps,
            outproj_weight=outproj_weight,
            outproj_bias=outproj_bias,
            headdim=headdim,
            ngroups=ngroups,
            norm_before_gate=norm_before_gate,
            **_further("mamba_split_conv1d_scan_combined", zxbcdt, kwargs),
        )


class mamba_chunk_scan_combined(nn.Module):
    def forward(
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`mamba_chunk_scan_combined` of this kernel.

        Further: `z`, `seq_idx`, `state_dtype`, and on a GPU `cu_seqlens`, `return_varlen_states`.
        """
        return _chunk_scan(
            hidden_states,
            dt,
            A,
            B,
            C,
            chunk_size,
            D=D,
            dt_bias=dt_bias,
            initial_states=initial_states,
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            return_final_states=return_final_states,
            **_further("mamba_chunk_scan_combined", hidden_states, kwargs),
        )


class selective_state_update(nn.Module):
    def forward(
        self,
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`selective_state_update` of this kernel, which writes to state.

        Further: on a GPU `state_batch_indices`. A token goes on from its row's state, so that there
        is no `seq_idx`.
        """
        others = further("selective_state_update", kwargs)
        return _update(
            state,
            hidden_states,
            dt,
            A,
            B,
            C,
            D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            **others,
        )


class selective_scan_fn(nn.Module):
    def forward(
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        use_mambapy: bool = False,
        use_associative_scan: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`selective_scan_fn` of this kernel.

        `use_mambapy` and `use_associative_scan` choose among ways in plain torch, and have no
        effect. Further: `initial_states`.
        """
        return _scan(
            hidden_states,
            dt,
            A,
            B,
            C,
            D=D,
            z=z,
            delta_bias=delta_bias,
            delta_softplus=delta_softplus,
            return_last_state=return_last_state,
            **further("selective_scan_fn", kwargs),
        )


class mamba_inner_fn(nn.Module):
    def forward(
        self,
        xz: Tensor,
        conv1d_weight: Tensor,
        conv1d_bias: Tensor | None,
        x_proj_weight: Tensor,
        delta_proj_weight: Tensor,
        out_proj_weight: Tensor,
        out_proj_bias: Tensor | None,
        A: Tensor,
        B: Tensor | None = None,
        C: Tensor | None = None,
        D: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = True,
        b_rms_weight: Tensor | None = None,
        c_rms_weight: Tensor | None = None,
        dt_rms_weight: Tensor | None = None,
        b_c_dt_rms_eps: float = 1e-6,
        **kwargs: Any,
    ) -> Tensor:
        """`mamba_inner_fn` of this kernel, which has no states."""
        return _inner(
            xz,
            conv1d_weight,
            conv1d_bias,
            x_proj_weight,
            delta_proj_weight,
            out_proj_weight,
            out_proj_bias,
            A,
            B,
            C,
            D,
            delta_bias=delta_bias,
            delta_softplus=delta_softplus,
            b_rms_weight=b_rms_weight,
            c_rms_weight=c_rms_weight,
            dt_rms_weight=dt_rms_weight,
            b_c_dt_rms_eps=b_c_dt_rms_eps,
            **further("mamba_inner_fn", kwargs),
        )


__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_split_conv1d_scan_combined",
    "selective_scan_fn",
    "selective_state_update",
]
