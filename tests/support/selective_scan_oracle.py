"""Mamba-1's selective scan in float64, token by token: the standard for the kernels.

Per channel d and state n: h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t and y_t = Σ_n C_t h_t + D u_t, the
result times silu(z_t) (Gu and Dao 2023, https://arxiv.org/abs/2312.00752, eq. 2 and 4, with B
discretized by Δ B). For a complex A, y_t is twice the real part: the state stands for itself and
its conjugate. Autograd gives the gradients.
"""

import torch
import torch.nn.functional as F


def _per_token(weight: torch.Tensor, dim: int, seqlen: int, is_complex: bool) -> torch.Tensor:
    """Return B or C of any form that the kernel takes, as (batch or 1, dim, dstate, seqlen)."""
    if weight.dim() == 2:
        return weight[None, :, :, None].expand(-1, -1, -1, seqlen)
    if weight.dim() == 3:
        weight = weight[:, None]
    if is_complex:
        weight = torch.view_as_complex(weight.unflatten(-1, (seqlen, 2)))
    return weight.repeat_interleave(dim // weight.shape[1], dim=1)


def selective_scan_oracle(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    initial_states: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs (batch, dim, seqlen) and the last state (batch, dim, dstate).

    Args:
        u, delta, z: (batch, dim, seqlen), float64.
        A: (dim, dstate), float64 or complex128.
        B, C: (dim, dstate) as A, or float64 (batch, dstate, seqlen) or (batch, groups, dstate,
            seqlen); for a complex A the last axis holds real and imaginary parts in turn.
        D, delta_bias: (dim,), float64.
        initial_states: (batch, dim, dstate), as A; None for zeros.
    """
    batch, dim, seqlen = u.shape
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = F.softplus(delta) if delta_softplus else delta
    B, C = (_per_token(weight, dim, seqlen, A.is_complex()) for weight in (B, C))
    zeros = torch.zeros(batch, dim, A.shape[1], dtype=A.dtype)
    state = zeros if initial_states is None else initial_states
    outputs = []
    for t in range(seqlen):
        decay = torch.exp(delta[:, :, t, None] * A)
        state = decay * state + (delta * u)[:, :, t, None] * B[..., t]
        y = (state * C[..., t]).sum(-1)
        outputs.append(2 * y.real if A.is_complex() else y)
    out = torch.stack(outputs, -1)
    out = out if D is None else out + D[:, None] * u
    return (out if z is None else out * F.silu(z)), state
