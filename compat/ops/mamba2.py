"""Mamba-2's fused op in plain torch: convolution, SiLU, SSD scan and gated norm, with states.

The recurrence of "Transformers are SSMs" (arXiv 2405.21060, section 3 and figure 6),

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T,        y_t = C_t h_t + D x_t,

is taken in pieces (section 6): within a piece as a product with the scores C B^T, decayed, and from
piece to piece through the state. The scores belong to a group of heads; so do B and C, and with the
state held as (dstate, heads * headdim) a group takes one matrix product for what the state gives to
the outputs, and one for what the piece gives to the state. dt, decays and the state are float32.

A row may hold several sequences, and padding at its ends (`seq_idx`): padding has dt = 0 and x = 0,
which changes no state, and nothing goes from one sequence to another.

The file needs torch only, and runs on every device; all of it is differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, silu, softplus

# A function that gives the same as `_forward` by other means, or None where it does not serve these
# arguments.
accelerated: Callable[..., tuple[Tensor, Tensor, Tensor] | None] | None = None

_PIECE = 64  # Tokens; the result does not depend on it.


class _Rows(NamedTuple):
    """The sequences and padding that `seq_idx` describes.

    Padding has the id of the token beside it.

    Attributes:
        real: (batch, seqlen), True at tokens, False at padding.
        ids: (batch, seqlen), the id of each token's sequence.
        first: (batch,), the first token's position; 0 in a row without one.
        last: (batch,), the last token's position; -1 in a row without one.
    """

    real: Tensor
    ids: Tensor
    first: Tensor
    last: Tensor


def _rows_of(seq_idx: Tensor) -> _Rows:
    real = seq_idx >= 0
    positions = torch.arange(seq_idx.shape[1], device=seq_idx.device)
    first = real.int().argmax(1)
    last = torch.where(real, positions, -1).amax(1)
    columns = positions.clamp(first[:, None], last.clamp(min=0)[:, None])
    return _Rows(real, seq_idx.gather(1, columns), first, last)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int = 64,
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
    """Compute what a Mamba-2 layer does after its in_proj, with states given and taken.

    The signature is that of mamba-ssm's kernel of this name, with the convolution's states.

    Args:
        zxbcdt: (batch, seqlen, 2 * d_nonssm + 2 * dim + 2 * ngroups * dstate + nheads), with dim =
            nheads * headdim: the gated MLP's gate and value, where there is one; the gate z; x, B
            and C before the convolution; dt before bias and softplus.
        conv1d_weight: (dim + 2 * ngroups * dstate, width).
        conv1d_bias: (dim + 2 * ngroups * dstate,).
        dt_bias: (nheads,).
        A: (nheads,), negative.
        D: (nheads,) or (nheads, headdim).
        chunk_size: Tokens in an inner chunk, 64 at most; the result does not depend on it.
        initial_states: (batch, nheads, headdim, dstate), of the sequence of the row's first token;
            zeros by default.
        seq_idx: (batch, seqlen) integers. The tokens of a sequence stand together and have the same
            id >= 0; ids never decrease. Negative ids are padding, at a row's ends only.
        dt_limit: What dt is clamped to, after the softplus.
        return_final_states: Whether to return final_states.
        activation: "silu" (or "swish"), or None.
        rmsnorm_weight: (dim,), of the gated norm over each group's channels; None for the gate
            alone.
        rmsnorm_eps: Added to the norm's mean square.
        outproj_weight: (out_dim, d_nonssm + dim), or None.
        outproj_bias: (out_dim,), or None.
        headdim: Needed where D is (nheads,).
        ngroups: Groups of heads that share B and C.
        norm_before_gate: Whether the norm comes before the gate.
        initial_conv_states: (batch, dim + 2 * ngroups * dstate, width - 1), as initial_states.
        return_final_conv_states: Whether to return final_conv_states.

    Returns:
        out (batch, seqlen, d_nonssm + dim or out_dim), 0 at padding. With `return_*`, a tuple with
        final_states (batch, nheads, headdim, dstate) float32 and final_conv_states (batch, dim +
        2 * ngroups * dstate, width - 1) in zxbcdt's dtype: after the last token of each row's last
        sequence; a row without a token hands its states on.

    Raises:
        ValueError: The shapes do not fit, there is no token, headdim is missing, or the activation
            is another.
    """
    nheads = len(dt_bias)
    if D.dim() == 2:
        headdim = D.shape[1]
    if headdim is None:
        raise ValueError("headdim must be given where D is (nheads,).")
    if activation not in (None, "silu", "swish"):
        raise ValueError(f'activation must be "silu", "swish" or None; found {activation!r}.')
    dim, (conv_dim, width) = nheads * headdim, conv1d_weight.shape
    batch, seqlen, channels = zxbcdt.shape
    d_nonssm, odd = divmod(channels - dim - conv_dim - nheads, 2)
    dstate = (conv_dim - dim) // ngroups // 2
    fits = dstate > 0 and dim + 2 * ngroups * dstate == conv_dim and nheads % ngroups == 0
    if odd or d_nonssm < 0 or not fits:
        raise ValueError(
            f"zxbcdt of {channels} channels and conv1d_weight of {conv_dim} do not fit {nheads} "
            f"heads of {headdim} in {ngroups} groups."
        )
    if not seqlen:
        raise ValueError("zxbcdt has no token.")
    for name, given, shape in (
        ("initial_states", initial_states, (batch, nheads, headdim, dstate)),
        ("initial_conv_states", initial_conv_states, (batch, conv_dim, width - 1)),
        ("seq_idx", seq_idx, (batch, seqlen)),
    ):
        if given is not None and given.shape != shape:
            raise ValueError(f"{name} must be {shape}; found {tuple(given.shape)}.")

    mlp, ssm = zxbcdt.split([2 * d_nonssm, channels - 2 * d_nonssm], dim=-1)
    arguments = (
        ssm,
        conv1d_weight,
        conv1d_bias,
        dt_bias,
        A,
        D,
        initial_states,
        seq_idx,
        dt_limit,
        activation,
        rmsnorm_weight,
        rmsnorm_eps,
        headdim,
        ngroups,
        norm_before_gate,
        initial_conv_states,
    )
    found = accelerated(*arguments) if accelerated is not None else None
    if found is None:
        found = _forward(*arguments, piece=min(chunk_size, _PIECE))
    out, final_states, final_conv_states = found
    if d_nonssm:
        gate, value = mlp.chunk(2, dim=-1)
        out = torch.cat([silu(gate) * value, out], dim=-1)
    if outproj_weight is not None:
        out = linear(out, outproj_weight, outproj_bias)
    if seq_idx is not None:
        out = out.masked_fill((seq_idx < 0)[..., None], 0.0)
    if not return_final_states and not return_final_conv_states:
        return out
    finals = (final_states,) * return_final_states + (final_conv_states,) * return_final_conv_states
    return (out, *finals)


def _forward(
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
    piece: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the op between the projections; return the final states in any case."""
    batch, seqlen, _ = zxbcdt.shape
    nheads, dtype = len(dt_bias), torch.promote_types(zxbcdt.dtype, torch.float32)
    conv_dim, width = conv1d_weight.shape
    dim, before = nheads * headdim, width - 1
    grouped = (conv_dim - dim) // 2
    rows = None if seq_idx is None else _rows_of(seq_idx)
    if rows is not None:
        zxbcdt = zxbcdt.masked_fill(~rows.real[..., None], 0.0)
    z, xbc, raw_dt = zxbcdt.split([dim, conv_dim, nheads], dim=-1)

    history = xbc.new_zeros(batch, before, conv_dim)
    if initial_conv_states is not None:
        history = initial_conv_states.to(xbc.dtype).transpose(1, 2)
    if rows is None:
        tail = torch.cat([history, xbc[:, max(seqlen - before, 0) :]], dim=1)
        final_conv_states = tail[:, tail.shape[1] - before :]
    else:
        # Each row has the history before its tokens, and zeros at the other positions.
        columns = torch.arange(before, device=xbc.device)[:, None].expand(-1, conv_dim)
        xbc = pad(xbc, (0, 0, before, 0)).scatter(1, columns + rows.first[:, None, None], history)
        ids = torch.cat([rows.ids[:, :1].expand(-1, before), rows.ids], dim=1)
        columns = columns + rows.last[:, None, None] + 1
        other = ids.gather(1, columns[..., 0]) != rows.ids[:, -1:]
        final_conv_states = xbc.gather(1, columns).masked_fill(other[..., None], 0.0)

    state = zxbcdt.new_zeros(batch, nheads, headdim, grouped // ngroups, dtype=dtype)
    if initial_states is not None:
        state = initial_states.to(dtype)
    # A group's heads lie side by side: (batch, ngroups, dstate, dim / ngroups).
    state = state.unflatten(1, (ngroups, -1)).permute(0, 1, 4, 2, 3).flatten(3)

    weight, A, dt_bias = conv1d_weight.to(dtype).t().contiguous(), A.to(dtype), dt_bias.to(dtype)
    bias = None if conv1d_bias is None else conv1d_bias.to(dtype)
    skip = (D if D.dim() == 2 else D[:, None].expand(-1, headdim)).to(dtype).flatten()
    if rows is not None:
        history, xbc = xbc[:, :before], xbc[:, before:]
    outs = []
    # All are split at once: the backward of a slice would fill a tensor of the whole length.
    pieces = zip(*(t.split(piece, dim=1) for t in (xbc, raw_dt, z)), strict=True)
    for start, (xbc_, raw_dt_, z_) in zip(range(0, seqlen, piece), pieces, strict=True):
        end = start + z_.shape[1]
        inputs = torch.cat([history, xbc_], dim=1)
        history = inputs[:, inputs.shape[1] - before :]
        owners = None if rows is None else ids[:, start : end + before]
        convolved = _convolve(inputs.to(dtype), weight, bias, owners)
        if activation:
            convolved = silu(convolved)
        x, B, C = convolved.split([dim, grouped, grouped], dim=-1)
        dt = softplus(raw_dt_.to(dtype) + dt_bias).clamp(*dt_limit)
        if rows is not None:
            dt = dt.masked_fill(~rows.real[:, start:end, None], 0.0)
            owners = rows.ids[:, [max(start - 1, 0), *range(start, end)]]
        x_, B, C = (t.unflatten(-1, (ngroups, -1)).transpose(1, 2) for t in (x, B, C))
        y, state = _scan(x_, dt, A, B, C, state, owners)
        y = torch.addcmul(y.transpose(1, 2).flatten(2), x, skip)
        y = _gate(y, z_.to(dtype), rmsnorm_weight, rmsnorm_eps, ngroups, norm_before_gate)
        outs.append(y.to(zxbcdt.dtype))
    final_states = state.unflatten(3, (-1, headdim)).permute(0, 1, 3, 4, 2).flatten(1, 2)
    return torch.cat(outs, dim=1), final_states, final_conv_states.transpose(1, 2)


def _convolve(inputs: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None) -> Tensor:
    """Convolve (batch, width - 1 + length, conv_dim) causally with (width, conv_dim).

    With ids, (batch, width - 1 + length), a token does not see inputs of another sequence.
    """
    width = len(weight)
    length = inputs.shape[1] - width + 1
    out = inputs.new_zeros(()) if bias is None else bias
    for tap in range(width):
        seen = inputs[:, tap : tap + length]
        if ids is not None:
            other = ids[:, tap : tap + length] != ids[:, width - 1 :]
            seen = seen.masked_fill(other[..., None], 0.0)
        out = torch.addcmul(out, seen, weight[tap])
    return out


def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute one piece of the recurrence, in all heads of a group at once.

    Args:
        x: (batch, ngroups, length, heads per group * headdim).
        dt: (batch, length, nheads); 0 at padding.
        A: (nheads,).
        B: (batch, ngroups, length, dstate).
        C: As B.
        state: (batch, ngroups, dstate, heads per group * headdim).
        ids: (batch, 1 + length), the sequence that the state is of, and those of the tokens; None
            where there is one.

    Returns:
        The outputs, as x and without D x, and the state after the piece.
    """
    groups, length = x.shape[1:3]
    headdim = x.shape[3] * groups // len(A)
    sums = (dt * A).cumsum(1)
    sums, dt = (t.transpose(1, 2).unflatten(1, (groups, -1)) for t in (sums, dt))
    from_start, to_end = sums.exp(), (sums[..., -1:] - sums).exp() * dt
    kept = from_start[..., -1]
    unseen = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    if ids is not None:
        owner, now, last = ids[:, None, None, :1], ids[:, None, None, 1:], ids[:, None, None, -1:]
        unseen = unseen | (now[..., None] != now[..., None, :])
        from_start = from_start.masked_fill(now != owner, 0.0)
        to_end = to_end.masked_fill(now != last, 0.0)
        kept = kept.masked_fill((last != owner)[..., 0], 0.0)

    decay = (sums[..., None] - sums[..., None, :]).masked_fill(unseen, -math.inf).exp()
    scores = (C @ B.transpose(2, 3))[:, :, None] * dt[..., None, :]
    within = (decay * scores) @ x.unflatten(-1, (-1, headdim)).transpose(2, 3)

    def of_channels(per_head: Tensor) -> Tensor:  # (batch, groups, heads, ...): last, and repeated.
        return per_head.movedim(2, -1).repeat_interleave(headdim, dim=-1)

    y = torch.addcmul(within.transpose(2, 3).flatten(3), C @ state, of_channels(from_start))
    given = B.transpose(2, 3) @ (x * of_channels(to_end))
    return y, torch.addcmul(given, state, of_channels(kept)[:, :, None])


def _gate(
    y: Tensor,
    z: Tensor,
    weight: Tensor | None,
    eps: float,
    ngroups: int,
    norm_before_gate: bool,
) -> Tensor:
    """Gate y by silu(z), and norm it by group before or after that where there is a weight."""
    if weight is None or not norm_before_gate:
        y = y * silu(z)
    if weight is not None:
        by_group = y.unflatten(-1, (ngroups, -1))
        scale = (by_group.square().mean(-1, keepdim=True) + eps).rsqrt()
        y = (by_group * scale).flatten(-2) * weight.to(y.dtype)
        if norm_before_gate:
            y = y * silu(z)
    return y
