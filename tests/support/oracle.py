"""Mamba2 in float64, one token at a time: the definition that everything else is held to.

It is written from the recurrence of "Transformers are SSMs" (arXiv 2405.21060, section 3 and figure
6):

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,        y_t = h_t C_t + D x_t

with dt = softplus(raw + dt_bias), clamped, and a causal depthwise convolution with SiLU over (x, B,
C) before it. It shares no code with transformers, only the weights.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus


@dataclass
class State:
    """The state of a layer: conv (conv_dim, width - 1) and ssm (nheads, headdim, dstate)."""

    conv: Tensor
    ssm: Tensor


def initial_state(mixer) -> State:
    width = mixer.conv1d.weight.shape[-1]
    return State(
        torch.zeros(mixer.conv_dim, width - 1, dtype=torch.float64),
        torch.zeros(mixer.num_heads, mixer.head_dim, mixer.ssm_state_size, dtype=torch.float64),
    )


def mixer_step(mixer, u: Tensor, state: State) -> tuple[Tensor, State]:
    """Run one token, u (hidden_size,), through a Mamba2 mixer with weights in float64."""
    w = dict(mixer.named_parameters())
    inner, groups, dstate = mixer.intermediate_size, mixer.n_groups, mixer.ssm_state_size
    projected = w["in_proj.weight"] @ u
    if "in_proj.bias" in w:
        projected = projected + w["in_proj.bias"]
    z, xbc, dt = projected.split([inner, mixer.conv_dim, mixer.num_heads])

    seen = torch.cat([state.conv, xbc[:, None]], dim=1)
    xbc = (seen * w["conv1d.weight"][:, 0]).sum(1)
    if "conv1d.bias" in w:
        xbc = xbc + w["conv1d.bias"]
    x, b, c = silu(xbc).split([inner, groups * dstate, groups * dstate])

    heads_per_group = mixer.num_heads // groups
    x = x.view(mixer.num_heads, mixer.head_dim)
    b = b.view(groups, dstate).repeat_interleave(heads_per_group, 0)
    c = c.view(groups, dstate).repeat_interleave(heads_per_group, 0)
    dt = softplus(dt + w["dt_bias"]).clamp(*mixer.time_step_limit)
    decay = torch.exp(-dt * w["A_log"].exp())
    ssm = decay[:, None, None] * state.ssm + (dt[:, None] * x)[:, :, None] * b[:, None, :]
    y = (ssm * c[:, None, :]).sum(-1) + w["D"][:, None] * x

    gated = (y.reshape(-1) * silu(z)).view(groups, -1)
    scale = (gated.pow(2).mean(-1, keepdim=True) + mixer.norm.variance_epsilon).rsqrt()
    out = w["out_proj.weight"] @ ((gated * scale).view(-1) * w["norm.weight"])
    if "out_proj.bias" in w:
        out = out + w["out_proj.bias"]
    return out, State(seen[:, 1:], ssm)


def _rms_norm(norm, x: Tensor) -> Tensor:
    return norm.weight * x * (x.pow(2).mean() + norm.variance_epsilon).rsqrt()


@torch.no_grad()
def mamba2(model, ids: list[int], copied: bool = True) -> tuple[Tensor, list[State]]:
    """Return hidden states (seqlen, hidden_size) of one sequence, and each layer's final state.

    Under `no_grad` its `__wrapped__` records gradients: those of the model itself if not `copied`.
    """
    if copied:
        model = copy.deepcopy(model).double()
    states = [initial_state(layer.mixer) for layer in model.layers]
    hidden = []
    for token in ids:
        u = model.embeddings.weight[token]
        for index, layer in enumerate(model.layers):
            out, states[index] = mixer_step(layer.mixer, _rms_norm(layer.norm, u), states[index])
            u = u + out
        hidden.append(_rms_norm(model.norm_f, u))
    return torch.stack(hidden), states
