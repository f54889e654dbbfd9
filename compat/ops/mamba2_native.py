"""Mamba-2's fused op on the native kernels; `compat.ops.mamba2` calls it where it can."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from compat.ops import compiled
from compat.ops.chosen import is_native

_POINTERS = [
    "zxbcdt", "out", "seq_idx", "state", "conv_before", "conv_after", "conv_weight", "conv_bias",
    "dt_bias", "A", "D", "norm_weight",
]  # fmt: skip
_COUNTS = [
    "batch", "seqlen", "row_stride", "token_stride", "nheads", "headdim", "dstate", "ngroups",
    "width", "is_bf16", "norm_before_gate", "threads",
]  # fmt: skip


class _Arguments(ctypes.Structure):
    """The struct `Mamba2` of native/mamba2.cpp."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in _POINTERS]
        + [(name, ctypes.c_int64) for name in _COUNTS]
        + [(name, ctypes.c_float) for name in ("dt_min", "dt_max", "eps")]
    )


def forward(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    dt_limit: tuple[float, float],
    activation: str | None,
    rmsnorm_weight: Tensor | None,
    rmsnorm_eps: float,
    headdim: int,
    ngroups: int,
    norm_before_gate: bool,
    initial_conv_states: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Run the op between the projections, without gradients, on a CPU, in float32 or bfloat16.

    Returns:
        None where the kernels are not chosen, or do not serve these arguments. Else the output
        (batch, seqlen, nheads * headdim), the final SSM states (batch, nheads, headdim, dstate)
        float32, and the final conv states (batch, conv_dim, width - 1), both as views of tensors
        whose last two dimensions are the other way round.
    """
    library = compiled.library()
    conv_dim, width = conv1d_weight.shape
    weights = (conv1d_weight, conv1d_bias, dt_bias, A, D, rmsnorm_weight)
    served = activation and 2 <= width <= 4 and D.dim() == 1 and zxbcdt.numel()
    if library is None or not served:
        return None
    if not is_native(zxbcdt, *weights, initial_states, initial_conv_states):
        return None
    batch, seqlen, _ = zxbcdt.shape
    nheads = len(dt_bias)
    dstate = (conv_dim - nheads * headdim) // ngroups // 2
    if zxbcdt.stride(2) != 1:
        zxbcdt = zxbcdt.contiguous()
    lanes = library.compat_lanes()
    padded = (headdim + lanes - 1) // lanes * lanes
    # Beyond a head's channels the kernel needs zeros.
    filled = initial_states is not None and padded == headdim
    make = zxbcdt.new_empty if filled else zxbcdt.new_zeros
    state = make(batch, nheads, dstate, padded, dtype=torch.float32)
    final_states = state[..., :headdim].transpose(2, 3)
    if initial_states is not None:
        final_states.copy_(initial_states)
    before = zxbcdt.new_zeros(batch, width - 1, conv_dim)
    if initial_conv_states is not None:
        before.copy_(initial_conv_states.transpose(1, 2))
    after = torch.empty_like(before)
    out = zxbcdt.new_empty(batch, seqlen, nheads * headdim)
    bias = zxbcdt.new_zeros(conv_dim) if conv1d_bias is None else conv1d_bias
    tensors = {
        "zxbcdt": zxbcdt,
        "out": out,
        "seq_idx": None if seq_idx is None else seq_idx.to(torch.int32).contiguous(),
        "state": state,
        "conv_before": before,
        "conv_after": after,
        "conv_weight": conv1d_weight.t().float().contiguous(),
        "conv_bias": bias.float().contiguous(),
        "dt_bias": dt_bias.float().contiguous(),
        "A": A.float().contiguous(),
        "D": D.float().contiguous(),
        "norm_weight": None if rmsnorm_weight is None else rmsnorm_weight.float().contiguous(),
    }
    arguments = _Arguments(
        **{name: None if t is None else t.data_ptr() for name, t in tensors.items()},
        batch=batch,
        seqlen=seqlen,
        row_stride=zxbcdt.stride(0),
        token_stride=zxbcdt.stride(1),
        nheads=nheads,
        headdim=headdim,
        dstate=dstate,
        ngroups=ngroups,
        width=width,
        is_bf16=zxbcdt.dtype == torch.bfloat16,
        norm_before_gate=norm_before_gate,
        threads=torch.get_num_threads(),
        dt_min=dt_limit[0],
        dt_max=dt_limit[1],
        eps=rmsnorm_eps,
    )
    library.compat_mamba2(ctypes.byref(arguments))
    return out, final_states, after.transpose(1, 2)
