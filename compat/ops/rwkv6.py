"""RWKV-6's wkv with carried state, in chunks of time: plain torch, and native on a CPU.

The recurrence of "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence" (arXiv
2404.05892, Finch's time mixing), per head and with the state S of (head_dim, head_v_dim):

    o_t = r_t . (S_{t-1} + (u k_t) v_t)        S_t = diag(exp(w_t)) S_{t-1} + k_t v_t

A chunk is the matrix products of `compat.ops.rwkv7`, without the removal. The decay has no bound:
exp(w_{s+1} + ... + w_{t-1}) is taken for each pair of tokens and each channel, from sums of their
own. No exponent is positive, and none is a difference of large numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from compat.ops import rwkv7_native
from compat.ops.chosen import is_native
from compat.ops.rwkv7 import (
    CHUNK,
    Chunks,
    check_shapes,
    common_dtype,
    fading,
    joined,
    masked,
    new_state,
    pieces,
)

_PIECE = 4  # Chunks that are read at once; the result does not depend on it.


def wkv6(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute RWKV-6's outputs from a state, and the state after the last token.

    It is differentiable, also in the states, and runs on any device.

    Args:
        r: (batch, seqlen, nheads, head_dim), the receptance.
        w: As r, the logarithm of the decay, not positive.
        k: As r, the key.
        v: (batch, seqlen, nheads, head_v_dim), the value.
        u: (nheads, head_dim), the bonus of a token for its own output.
        initial_state: As for `compat.ops.rwkv7.wkv7`.
        seq_idx: The same.

    Returns:
        Outputs and state, as `compat.ops.rwkv7.wkv7` returns them.

    Raises:
        ValueError: Shapes do not fit.
    """
    check_shapes(r, {"w": w, "k": k}, v, initial_state, seq_idx)
    if u.shape != r.shape[2:]:
        raise ValueError(f"u must be {tuple(r.shape[2:])}; found {tuple(u.shape)}.")
    dtype = common_dtype(r, w, k, v, u)
    state = new_state(k, v, dtype) if initial_state is None else initial_state.to(dtype)
    if not v.numel():
        return torch.zeros_like(v), state
    if is_native(r, w, k, v, u, state):
        return rwkv7_native.wkv({"r": r, "w": w, "k": k, "v": v}, u, state, seq_idx)
    outputs = []
    for (r_, w_, k_, v_), seen in pieces((r, w, k, v), dtype, seq_idx, _PIECE):
        y, state = _piece(r_, w_, k_, v_, u.to(dtype), seen, state)
        outputs.append(y)
    return joined(outputs, v.shape[1]).to(v.dtype), state


def _piece(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, seen: Chunks, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute some chunks; inputs are (batch, nheads, chunks, CHUNK, dim)."""
    earlier = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=w.device).tril(-1)
    # The log decay from behind token s up to before token t, at [t, s]: w of the tokens between.
    between = w[..., None, :].expand(*w.shape[:-1], CHUNK, w.shape[-1])
    between = between.masked_fill(~earlier[..., None], 0.0).cumsum(-3)
    before = pad(between[..., :-1, :, :], (0, 0, 0, 0, 1, 0))
    scores = (before.exp() * r[..., None, :] * k[..., None, :, :]).sum(-1)
    scores = masked(scores, earlier if seen.same is None else earlier & seen.same)
    scores = scores + torch.diag_embed((r * k * u[:, None, None]).sum(-1))
    sums = w.cumsum(-2)
    readers = masked(r * pad(sums[..., :-1, :], (0, 0, 1, 0)).exp(), seen.begun)
    writers = masked(k * between[..., -1, :, :].exp(), seen.ending).transpose(-1, -2)
    own = scores @ v
    outputs = []
    parts = (x.unbind(2) for x in (readers, own, v, writers))
    steps = zip(*parts, *fading(sums[..., -1, :], seen), strict=True)
    for readers_, own_, v_, writers_, keep, fade in steps:
        outputs.append(readers_ @ state + own_)
        state = keep * state + fade * state + writers_ @ v_
    return torch.stack(outputs, 2), state
