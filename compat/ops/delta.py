"""The gated delta rule with carried state, in pieces: plain torch, and native on a CPU.

Per head, with a state S of (key_dim, value_dim), transposed to that of the papers,

    u_t = beta_t (v_t - (exp(g_t) S_{t-1})^T k_t),   S_t = exp(g_t) S_{t-1} + k_t u_t^T,
    y_t = scale S_t^T q_t,

where g_t is one number for a head ("Gated Delta Networks", arXiv 2412.06464, equation 10) or one
for each channel of the keys ("Kimi Linear", arXiv 2510.26692, equation 1). A piece of L tokens that
begins with the state S is a triangular system and some matrix products (the UT transform of
"Parallelizing Linear Transformers with the Delta Rule over Sequence Length", arXiv 2406.06484,
equations 10 and 11, which needs no inverse where S is known). With G_t = g_1 + ... + g_t, and

    A_ts = beta_t k_t . (exp(G_t - G_s) k_s) for s < t,      else 0,
    P_ts = scale q_t . (exp(G_t - G_s) k_s) for s <= t,      else 0,

    (1 + A) U = beta (V - (exp(G) K) S),                     U, V, K: a row for each token
    Y = scale (exp(G) Q) S + P U,
    S' = exp(G_L) S + (exp(G_L - G) K)^T U.

No exponent is positive, so nothing overflows. A gate of one number is taken out of the products.
For gates of channels, pairs of tokens are taken in blocks of `_BLOCK`: within one by their own
exponents, beyond it relative to the block's first token, so that both factors are at most 1. Sums
of gates are float64: after a token that forgets all, small differences would be lost otherwise.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from compat.ops import compiled
from compat.ops.chosen import is_native
from compat.ops.mamba2 import _rows_of

_PIECE, _BLOCK = 64, 16  # Tokens; the result does not depend on them.
_FORGETS_ALL = -1e3  # Its exponential is 0 in float64, and sums of it stay exact.


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the gated delta rule from a state.

    It is differentiable, also in the states, and runs on any device.

    Args:
        query: (batch, seqlen, key_heads, key_dim).
        key: As query.
        value: (batch, seqlen, heads, value_dim). A key head serves heads / key_heads heads that
            stand side by side.
        g: The logarithm of the decay, at most 0: (batch, seqlen, heads) for one of a head, (batch,
            seqlen, heads, key_dim) for one of each channel.
        beta: (batch, seqlen, heads), how much of what the state has for a key is replaced.
        initial_state: (batch, heads, key_dim, value_dim), of the sequence of the row's first token;
            zeros by default.
        seq_idx: (batch, seqlen) integers. The tokens of a sequence stand together and have the same
            id >= 0; ids never decrease. Negative ids are padding, at a row's ends only.
        scale: What the outputs are multiplied by; by default key_dim ** -0.5.
        use_qk_l2norm: Whether queries and keys are divided by their lengths, as x rsqrt(x . x +
            1e-6).

    Returns:
        The outputs (batch, seqlen, heads, value_dim) in query's dtype, 0 at padding, and the states
        (batch, heads, key_dim, value_dim) after the last token of each row's last sequence; a row
        without a token hands its state on. Arithmetic and states are in float32, or in float64
        where query is.

    Raises:
        ValueError: Shapes do not fit.
    """
    batch, seqlen, _, key_dim = query.shape
    heads, value_dim = value.shape[-2:]
    _check(query, key, value, g, beta, initial_state, seq_idx)
    dtype = torch.promote_types(query.dtype, torch.float32)
    if initial_state is None:
        state = torch.zeros(batch, heads, key_dim, value_dim, dtype=dtype, device=query.device)
    else:
        state = initial_state.to(dtype)
    if scale is None:
        scale = key_dim**-0.5
    if not seqlen:
        return torch.zeros_like(value, dtype=query.dtype), state
    run = _native_rule if is_native(query, key, value, g, beta, state) else _torch_rule
    return run(query, key, value, g, beta, state, seq_idx, scale, use_qk_l2norm)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    batch, seqlen, key_heads, key_dim = query.shape
    heads, value_dim = value.shape[-2:]
    if not key_heads or heads % key_heads:
        raise ValueError(f"heads must be shared by key heads; found {heads} and {key_heads}.")
    gate = (batch, seqlen, heads, key_dim) if g.ndim == 4 else (batch, seqlen, heads)
    for name, found, shape in (
        ("key", key, (batch, seqlen, key_heads, key_dim)),
        ("value", value, (batch, seqlen, heads, value_dim)),
        ("g", g, gate),
        ("beta", beta, (batch, seqlen, heads)),
        ("initial_state", initial_state, (batch, heads, key_dim, value_dim)),
        ("seq_idx", seq_idx, (batch, seqlen)),
    ):
        if found is not None and found.shape != shape:
            raise ValueError(f"{name} must be {shape}; found {tuple(found.shape)}.")


def _torch_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    seq_idx: Tensor | None,
    scale: float,
    use_qk_l2norm: bool,
) -> tuple[Tensor, Tensor]:
    dtype, heads = state.dtype, value.shape[2]
    rows = None if seq_idx is None else _rows_of(seq_idx)
    if g.ndim == 3:
        g = g[..., None]
    beta = beta[..., None]
    if rows is not None:
        query, key, value, g, beta = (
            part.masked_fill(~rows.real[..., None, None], 0.0)
            for part in (query, key, value, g, beta)
        )
    outs = []
    # All are split at once: the backward of a slice would fill a tensor of the whole length.
    pieces = zip(*(t.split(_PIECE, dim=1) for t in (query, key, value, g, beta)), strict=True)
    for start, piece in zip(range(0, value.shape[1], _PIECE), pieces, strict=True):
        # The heads come first: (batch, heads, length, channels).
        q, k, v, g_, beta_ = (part.transpose(1, 2) for part in piece)
        q, k, v, beta_ = (part.to(dtype) for part in (q, k, v, beta_))
        if use_qk_l2norm:
            q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
        q, k = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (q * scale, k))
        owners = None
        if rows is not None:
            end = start + v.shape[2]
            owners = rows.ids[:, [max(start - 1, 0), *range(start, end)]]
        y, state = _piece(q, k, v, g_.double().clamp(min=_FORGETS_ALL), beta_, state, owners)
        outs.append(y.transpose(1, 2).to(query.dtype))
    out = torch.cat(outs, dim=1)
    if rows is not None:
        out = out.masked_fill(~rows.real[..., None, None], 0.0)
    return out, state


def _piece(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute one piece of the recurrence.

    Args:
        q: (batch, heads, length, key_dim), scaled.
        k: As q.
        v: (batch, heads, length, value_dim).
        g: (batch, heads, length, key_dim or 1), float64; 0 at padding.
        beta: (batch, heads, length, 1); 0 at padding.
        state: (batch, heads, key_dim, value_dim).
        ids: (batch, 1 + length), the sequence that the state is of, and those of the tokens; None
            where there is one.

    Returns:
        The outputs, as v, and the state after the piece.
    """
    length = q.shape[2]
    sums = g.cumsum(2)
    from_start, to_end = sums.exp().to(q.dtype), (sums[:, :, -1:] - sums).exp().to(q.dtype)
    kept = from_start[:, :, -1:].transpose(2, 3)
    unseen = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    if ids is not None:
        owner, now, last = (ids[:, None, part, None] for part in (slice(1), slice(1, None), [-1]))
        unseen = unseen | (now != now.transpose(2, 3))
        from_start = from_start.masked_fill(now != owner, 0.0)
        to_end = to_end.masked_fill(now != last, 0.0)
        kept = kept.masked_fill(last != owner, 0.0)
    both = torch.stack([k, q], 2)  # (batch, heads, 2, length, key_dim)
    if g.shape[-1] == 1:
        decay = (sums - sums.transpose(2, 3)).masked_fill(unseen, -math.inf).exp().to(q.dtype)
        scores = (both @ k.transpose(2, 3)[:, :, None]) * decay[:, :, None]
    else:
        scores = _scores_by_channel(both, k, sums).masked_fill(unseen[..., None, :, :], 0.0)
    known, seen = ((both * from_start[:, :, None]) @ state[:, :, None]).unbind(2)
    u = torch.linalg.solve_triangular(
        beta * scores[:, :, 0], beta * (v - known), upper=False, unitriangular=True
    )
    y = seen + scores[:, :, 1] @ u
    return y, kept * state + (k * to_end).transpose(2, 3) @ u


def _scores_by_channel(both: Tensor, k: Tensor, sums: Tensor) -> Tensor:
    """Return the products of (batch, heads, 2, length, key_dim) and earlier keys, decayed.

    Args:
        both: Keys, and queries.
        k: (batch, heads, length, key_dim).
        sums: As k: the sum of the gates from the piece's first token on.

    Returns:
        (batch, heads, 2, length, length), 0 for keys in a later block, and undefined for other
        later keys.
    """
    length, rows = k.shape[2], []
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        own, now = both[:, :, :, start:end], sums[:, :, start:end]
        # (batch, heads, token, key's token, key_dim); a later key's exponent would be positive.
        since = (now[:, :, :, None] - now[:, :, None]).clamp(max=0.0).exp().to(k.dtype)
        decayed = since * k[:, :, None, start:end]
        found = (own.transpose(2, 3) @ decayed.transpose(3, 4)).transpose(2, 3)
        if start:
            begin = sums[:, :, start - 1 : start]
            here = own * (now - begin).exp().to(k.dtype)[:, :, None]
            before = k[:, :, :start] * (begin - sums[:, :, :start]).exp().to(k.dtype)
            found = torch.cat([here @ before.transpose(2, 3)[:, :, None], found], -1)
        rows.append(torch.nn.functional.pad(found, (0, length - end)))
    return torch.cat(rows, 3)


_COUNTS = [
    "batch", "seqlen", "heads", "key_heads", "key_dim", "value_dim", "by_channel", "use_qk_l2norm",
    "is_bf16", "threads",
]  # fmt: skip


class _Delta(ctypes.Structure):
    """The struct `Delta` of native/delta.cpp."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("query", "key", "value", "out", "g", "beta", "seq_idx", "state")
        ),
        *((f"{name}_stride", ctypes.c_int64 * 3) for name in ("query", "key", "value")),
        *((name, ctypes.c_int64) for name in _COUNTS),
        ("scale", ctypes.c_float),
    )


def _native_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    seq_idx: Tensor | None,
    scale: float,
    use_qk_l2norm: bool,
) -> tuple[Tensor, Tensor]:
    library = compiled.library()
    assert library is not None
    batch, seqlen, key_heads, key_dim = query.shape
    heads, value_dim = value.shape[2:]
    lanes = library.compat_lanes()
    padded = -(-value_dim // lanes) * lanes
    after = state.new_zeros(batch, heads, key_dim, padded)
    final_state = after[..., :value_dim]
    final_state.copy_(state)
    out = query.new_empty(batch, seqlen, heads, value_dim)
    # Addresses hold no reference, so these tensors must live until the kernel is done.
    read = [part.to(query.dtype) for part in (query, key, value)]
    read = [part if part.stride(3) == 1 else part.contiguous() for part in read]
    g, beta = (part.float().contiguous() for part in (g, beta))
    if seq_idx is not None:
        seq_idx = seq_idx.to(torch.int32).contiguous()
    addresses = (*read, out, g, beta, seq_idx, after)
    arguments = _Delta(
        *(None if part is None else part.data_ptr() for part in addresses),
        *((ctypes.c_int64 * 3)(*part.stride()[:3]) for part in read),
        *(batch, seqlen, heads, key_heads, key_dim, value_dim, g.ndim == 4, use_qk_l2norm),
        *(query.dtype == torch.bfloat16, torch.get_num_threads(), scale),
    )
    library.compat_delta(ctypes.byref(arguments))
    return out, final_state
