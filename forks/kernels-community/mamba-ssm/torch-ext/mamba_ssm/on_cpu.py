"""Mamba-1 and Mamba-2 on a CPU: native kernels where they can be built, and plain torch.

`portable` has the fused op of Mamba-2 and the scan of Mamba-1, native without gradients; the rest
is plain torch. Arithmetic and states are in float32 (float64 where the inputs are), and all of it
is differentiable. Arguments as the functions for a GPU have them; what a CPU does not have, raises.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu, softplus

from . import portable
from ._causal_conv1d.on_cpu import causal_conv1d_fn
from .portable import mamba1, mamba2, mamba2_scan

_logger = logging.getLogger(__name__)


def describe() -> str:
    """In one line: the native kernels and how they were built, or plain torch and why."""
    return portable.describe()


@functools.cache
def _say_what_runs() -> None:
    """Tell, once, where the native kernels are not to be had."""
    if portable._native.library() is None:
        _logger.warning(
            "mamba-ssm on a CPU runs in %s. The results are the same, and slower; install a C++ "
            "compiler for the native kernels.",
            describe(),
        )


def _only_on_gpu(function: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None and value is not False:
            raise NotImplementedError(
                f"{function}: found {name} with tensors on a CPU; that is for a GPU only. Needed: "
                "a row for each sequence, or seq_idx where the function takes it."
            )


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    initial_conv_states: Tensor | None = None,
    return_final_conv_states: bool = False,
) -> Any:
    """What a Mamba-2 layer does after its in_proj; see `portable.mamba2`."""
    _say_what_runs()
    return mamba2.mamba_split_conv1d_scan_combined(
        zxbcdt,
        conv1d_weight,
        conv1d_bias,
        dt_bias,
        A,
        D,
        chunk_size,
        initial_states=initial_states,
        seq_idx=seq_idx,
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
        initial_conv_states=initial_conv_states,
        return_final_conv_states=return_final_conv_states,
    )


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2's scan alone.

    Args:
        x: (batch, seqlen, nheads, headdim).
        dt: (batch, seqlen, nheads).
        A: (nheads,), negative.
        B: (batch, seqlen, ngroups, dstate).
        C: As B.
        chunk_size: Tokens in an inner chunk, 64 at most; the result does not depend on it.
        D: (nheads,) or (nheads, headdim).
        z: (batch, seqlen, nheads, headdim), the gate before silu.
        dt_bias: (nheads,).
        initial_states: (batch, nheads, headdim, dstate), of the sequence of the row's first token.
        seq_idx: (batch, seqlen) integers; negative ids are padding, at a row's ends only.
        cu_seqlens: Not on a CPU.
        dt_softplus: Whether dt goes through softplus.
        dt_limit: What dt is clamped to.
        return_final_states: Whether to return the final states.
        return_varlen_states: Not on a CPU.

    Returns:
        The outputs as x, 0 at padding; with return_final_states also the states (batch, nheads,
        headdim, dstate), float32, after the last token of each row's last sequence.

    Raises:
        NotImplementedError: What is not on a CPU is given.
        ValueError: Shapes do not fit.
    """
    _only_on_gpu(
        "mamba_chunk_scan_combined",
        cu_seqlens=cu_seqlens,
        return_varlen_states=return_varlen_states,
    )
    return mamba2_scan.mamba_chunk_scan_combined(
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=D,
        z=z,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
    )


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One token of Mamba-1 or Mamba-2; all arguments without (nheads,) or with it.

    Args:
        state: (batch, nheads, dim, dstate). Written to.
        x: (batch, nheads, dim).
        dt: As x.
        A: (nheads, dim, dstate), negative.
        B: (batch, ngroups, dstate), or (batch, dstate) where there are no heads.
        C: As B.
        D: (nheads, dim).
        z: As x, the gate before silu.
        dt_bias: (nheads, dim).
        dt_softplus: Whether dt goes through softplus.
        state_batch_indices: Not on a CPU.

    Returns:
        The outputs, as x.

    Raises:
        NotImplementedError: What is not on a CPU is given.
        ValueError: Shapes do not fit.
    """
    _only_on_gpu("selective_state_update", state_batch_indices=state_batch_indices)
    heads = state.shape[1:-2]
    for name, found, shape in (
        ("x", x, state.shape[:-1]),
        ("dt", dt, state.shape[:-1]),
        ("A", A, state.shape[1:]),
        ("D", D, state.shape[1:-1]),
        ("z", z, state.shape[:-1]),
        ("dt_bias", dt_bias, state.shape[1:-1]),
        ("B", B, (len(state), *B.shape[1:-1], state.shape[-1])),
        ("C", C, B.shape),
    ):
        if found is not None and found.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)}; found {tuple(found.shape)}.")
    dtype = torch.promote_types(torch.promote_types(x.dtype, state.dtype), torch.float32)
    if heads:
        B, C = (part.repeat_interleave(heads[0] // B.shape[1], dim=1) for part in (B, C))
    B, C = B.to(dtype)[..., None, :], C.to(dtype)[..., None]
    inputs, dt = x.to(dtype), dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = softplus(dt)
    decay = torch.exp(dt[..., None] * A.to(dtype))
    new = torch.addcmul((dt * inputs)[..., None] * B, decay, state.to(dtype))
    state.copy_(new)
    out = (new @ C)[..., 0]
    if D is not None:
        out = out + D.to(dtype) * inputs
    if z is not None:
        out = out * silu(z.to(dtype))
    return out.to(x.dtype)


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    initial_states: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-1's scan; see `portable.mamba1`."""
    _say_what_runs()
    return mamba1.selective_scan_fn(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, initial_states
    )


def mamba_inner_fn(
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
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """What a Mamba-1 layer does after its in_proj, without states.

    Args:
        xz: (batch, 2 * dim, seqlen).
        conv1d_weight: (dim, 1, width).
        conv1d_bias: (dim,).
        x_proj_weight: (rank + 2 * dstate, dim); less dstate for each of B and C that is given.
        delta_proj_weight: (dim, rank).
        out_proj_weight: (out_dim, dim).
        out_proj_bias: (out_dim,).
        A: (dim, dstate), real and negative.
        B: Of any form that `selective_scan_fn` takes; by default it depends on the input.
        C: As B.
        D: (dim,).
        delta_bias: (dim,).
        B_proj_bias: (dstate,).
        C_proj_bias: (dstate,).
        delta_softplus: Whether delta goes through softplus.
        checkpoint_lvl: Of no effect on a CPU.
        b_rms_weight: (dstate,), of a norm of B.
        c_rms_weight: (dstate,), of a norm of C.
        dt_rms_weight: (dim,), of a norm of delta.
        b_c_dt_rms_eps: Added to the mean squares of these norms.

    Returns:
        (batch, seqlen, out_dim).

    Raises:
        ValueError: Shapes do not fit, or A is complex.
    """
    x, z = xz.chunk(2, dim=1)
    x = causal_conv1d_fn(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    rank, dstate = delta_proj_weight.shape[1], A.shape[-1]
    projected = linear(x.transpose(1, 2), x_proj_weight)
    if B is None:
        B = projected[..., rank : rank + dstate]
        B = _normed(B if B_proj_bias is None else B + B_proj_bias, b_rms_weight, b_c_dt_rms_eps)
        B = B.transpose(1, 2)
    if C is None:
        C = projected[..., -dstate:]
        C = _normed(C if C_proj_bias is None else C + C_proj_bias, c_rms_weight, b_c_dt_rms_eps)
        C = C.transpose(1, 2)
    delta = linear(projected[..., :rank], delta_proj_weight)
    delta = _normed(delta, dt_rms_weight, b_c_dt_rms_eps).transpose(1, 2)
    y = selective_scan_fn(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def _normed(inputs: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The inputs (..., channels) over their root mean square, times a weight, if there is one."""
    if weight is None:
        return inputs
    wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * scale * weight).to(inputs.dtype)
