"""Mamba-2's fused op in float64, one token at a time: the definition its kernels are held to.

It is written from the recurrence of "Transformers are SSMs" (arXiv 2405.21060, section 3 and figure
6):

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,        y_t = h_t C_t + D x_t

with dt = softplus(raw + dt_bias), clamped, and a causal depthwise convolution with SiLU over (x, B,
C) before it. It is also written from the state contract for `seq_idx`: -1 is padding, which stands
at a row's ends; an initial state belongs to the row's first token; a final state is that of the
row's last sequence after its last token; and a row without a token hands its states on. It shares
no code with mamba-ssm. Everything is differentiable.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus


def error(found: Tensor, expected: Tensor, scale: float = 1.0) -> float:
    """Return the largest absolute error as a part of the largest expected value, or of `scale`."""
    if found.shape != expected.shape:
        raise AssertionError(f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    if not expected.numel():
        return 0.0
    scale = max(scale, expected.abs().max().item())
    return (found.double() - expected.double()).abs().max().item() / scale


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence.

    x and z are (batch, seqlen, nheads, headdim), dt (batch, seqlen, nheads), A and dt_bias
    (nheads,), B and C (batch, seqlen, ngroups, dstate), D (nheads,) or (nheads, headdim), states
    (batch, nheads, headdim, dstate). Returns the output, 0 at padding, and the final states.
    """
    x, dt, A, B, C, D, z, dt_bias, initial_states = _double(
        x, dt, A, B, C, D, z, dt_bias, initial_states
    )
    batch, seqlen, nheads, headdim = x.shape
    if dt_bias is not None:
        dt = dt + dt_bias
    dt = (softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    B, C = (t.repeat_interleave(nheads // t.shape[2], dim=2) for t in (B, C))
    skip = None if D is None else x * (D[:, None] if D.dim() == 1 else D)
    outs, finals = [], []
    for row in range(batch):
        zeros = x.new_zeros(nheads, headdim, B.shape[-1])
        state = zeros if initial_states is None else initial_states[row]
        ys = [x.new_zeros(nheads, headdim)] * seqlen
        for t, new in _tokens(seq_idx, row, seqlen):
            if new:
                state = zeros
            update = (dt[row, t, :, None] * x[row, t])[:, :, None] * B[row, t, :, None, :]
            state = (dt[row, t] * A).exp()[:, None, None] * state + update
            y = (state * C[row, t, :, None, :]).sum(-1)
            y = y if skip is None else y + skip[row, t]
            ys[t] = y if z is None else y * silu(z[row, t])
        outs.append(torch.stack(ys))
        finals.append(state)
    return torch.stack(outs), torch.stack(finals)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    activation: str | None = "silu",
) -> tuple[Tensor, Tensor]:
    """Compute the causal convolution.

    x is (batch, seqlen, dim), weight (dim, width), states (batch, dim, width - 1). Returns the
    output, 0 at padding, and the final states.
    """
    x, weight, bias, initial_states = _double(x, weight, bias, initial_states)
    batch, seqlen, dim = x.shape
    outs, finals = [], []
    for row in range(batch):
        zeros = x.new_zeros(dim, weight.shape[1] - 1)
        state = zeros if initial_states is None else initial_states[row]
        ys = [x.new_zeros(dim)] * seqlen
        for t, new in _tokens(seq_idx, row, seqlen):
            window = torch.cat([zeros if new else state, x[row, t, :, None]], dim=1)
            y = (window * weight).sum(1)
            y = y if bias is None else y + bias
            ys[t] = silu(y) if activation else y
            state = window[:, 1:]
        outs.append(torch.stack(ys))
        finals.append(state)
    return torch.stack(outs), torch.stack(finals)


def fused(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    initial_states: Tensor | None = None,
    initial_conv_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the op between Mamba-2's in_proj and out_proj; with its weight given, out_proj too.

    zxbcdt is (batch, seqlen, 2 d_nonssm + 2 dim + 2 ngroups dstate + nheads), in the order gate and
    value of a gated MLP, z, x, B, C, dt; conv1d_weight (dim + 2 ngroups dstate, width). Returns the
    output, the final SSM states and the final conv states. At padding the scan's output is 0; the
    MLP and out_proj take it as any token.
    """
    zxbcdt, rmsnorm_weight, outproj_weight, outproj_bias = _double(
        zxbcdt, rmsnorm_weight, outproj_weight, outproj_bias
    )
    nheads = D.shape[0]
    headdim = D.shape[1] if D.dim() == 2 else headdim
    dim, conv_dim = nheads * headdim, conv1d_weight.shape[0]
    dstate = (conv_dim - dim) // 2 // ngroups
    d_nonssm = (zxbcdt.shape[-1] - dim - conv_dim - nheads) // 2
    gate, value, z, xbc, dt = zxbcdt.split([d_nonssm, d_nonssm, dim, conv_dim, nheads], dim=-1)
    xbc, final_conv_states = conv(
        xbc,
        conv1d_weight,
        conv1d_bias,
        initial_states=initial_conv_states,
        seq_idx=seq_idx,
        activation=activation,
    )
    x, B, C = xbc.split([dim, ngroups * dstate, ngroups * dstate], dim=-1)
    y, final_states = scan(
        x.unflatten(-1, (nheads, headdim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, dstate)),
        C.unflatten(-1, (ngroups, dstate)),
        D=D,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
    )
    y = y.flatten(-2)
    if rmsnorm_weight is None:
        y = y * silu(z)
    else:
        y = y if norm_before_gate else y * silu(z)
        by_group = y.unflatten(-1, (ngroups, -1))
        scale = (by_group.pow(2).mean(-1, keepdim=True) + rmsnorm_eps).rsqrt()
        y = (by_group * scale).flatten(-2) * rmsnorm_weight
        y = y * silu(z) if norm_before_gate else y
    out = torch.cat([silu(gate) * value, y], dim=-1)
    if outproj_weight is not None:
        out = out @ outproj_weight.T
        out = out if outproj_bias is None else out + outproj_bias
    return out, final_states, final_conv_states


def _tokens(seq_idx: Tensor | None, row: int, seqlen: int):
    """Yield the positions of a row's tokens, and whether a sequence after its first starts there.

    The first sequence continues from the initial state.
    """
    ids = [0] * seqlen if seq_idx is None else seq_idx[row].tolist()
    before = None
    for t, current in enumerate(ids):
        if current >= 0:
            yield t, before is not None and current != before
            before = current


def _double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]
