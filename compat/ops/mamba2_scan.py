"""Mamba-2's scan alone in plain torch, with states: mamba-ssm's `mamba_chunk_scan_combined`.

The mathematics is that of `mamba2`, whose pieces it runs. It is differentiable, on any device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from compat.ops import mamba2


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
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute Mamba-2's scan alone.

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
        dt_softplus: Whether dt goes through softplus.
        dt_limit: What dt is clamped to.
        return_final_states: Whether to return the final states.

    Returns:
        The outputs as x, 0 at padding; with return_final_states also the states (batch, nheads,
        headdim, dstate), float32, after the last token of each row's last sequence.

    Raises:
        ValueError: Shapes do not fit.
    """
    batch, seqlen, nheads, headdim = x.shape
    ngroups, dstate = B.shape[2:]
    for name, found, shapes in (
        ("dt", dt, [(batch, seqlen, nheads)]),
        ("A", A, [(nheads,)]),
        ("B", B, [(batch, seqlen, ngroups, dstate)]),
        ("C", C, [tuple(B.shape)]),
        ("D", D, [(nheads,), (nheads, headdim)]),
        ("z", z, [tuple(x.shape)]),
        ("dt_bias", dt_bias, [(nheads,)]),
        ("initial_states", initial_states, [(batch, nheads, headdim, dstate)]),
        ("seq_idx", seq_idx, [(batch, seqlen)]),
    ):
        if found is not None and tuple(found.shape) not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"{name} must be {wanted}; found {tuple(found.shape)}.")
    if nheads % ngroups or not seqlen:
        raise ValueError(
            f"found {seqlen} tokens and {ngroups} groups of {nheads} heads; needed: a token, and "
            "groups that divide the heads."
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    A = A.to(dtype)
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    dt = (softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    rows = None
    if seq_idx is not None:
        rows = mamba2._rows_of(seq_idx)
        dt = dt.masked_fill(~rows.real[..., None], 0.0)
        x = x.masked_fill(~rows.real[..., None, None], 0.0)
        B, C = (part.masked_fill(~rows.real[..., None, None], 0.0) for part in (B, C))
    if initial_states is None:
        initial_states = x.new_zeros(batch, nheads, headdim, dstate, dtype=dtype)
    # A group's heads lie side by side: (batch, ngroups, dstate, nheads / ngroups * headdim).
    state = initial_states.to(dtype).unflatten(1, (ngroups, -1)).permute(0, 1, 4, 2, 3).flatten(3)
    piece = min(chunk_size, mamba2._PIECE)
    outs = []
    for start in range(0, seqlen, piece):
        end = min(start + piece, seqlen)
        owners = None if rows is None else rows.ids[:, [max(start - 1, 0), *range(start, end)]]
        now = x[:, start:end].to(dtype)
        by_group = (
            part.transpose(1, 2)
            for part in (
                now.flatten(2).unflatten(-1, (ngroups, -1)),
                B[:, start:end].to(dtype),
                C[:, start:end].to(dtype),
            )
        )
        x_, B_, C_ = by_group
        y, state = mamba2._scan(x_, dt[:, start:end], A, B_, C_, state, owners)
        y = y.transpose(1, 2).flatten(2).unflatten(-1, (nheads, headdim))
        if D is not None:
            y = y + (D if D.dim() == 2 else D[:, None]).to(dtype) * now
        if z is not None:
            y = y * silu(z[:, start:end].to(dtype))
        outs.append(y.to(x.dtype))
    out = torch.cat(outs, dim=1)
    if rows is not None:
        out = out.masked_fill(~rows.real[..., None, None], 0.0)
    if not return_final_states:
        return out
    final = state.unflatten(3, (-1, headdim)).permute(0, 1, 3, 4, 2).flatten(1, 2)
    return out, final.contiguous()
