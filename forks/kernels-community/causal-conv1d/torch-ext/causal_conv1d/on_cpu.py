"""The causal convolution on a CPU, in plain torch: with states, packed and padded rows.

In float32 (float64 where x is), and differentiable. Arguments as the functions for a GPU have them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, silu


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve each channel with its last inputs.

    Args:
        x: (batch, dim, seqlen).
        weight: (dim, width).
        bias: (dim,).
        seq_idx: (batch, seqlen) integers. The tokens of a sequence stand together and have the same
            id >= 0; ids never decrease. Negative ids are padding, at a row's ends only.
        initial_states: (batch, dim, width - 1), of the sequence of the row's first token; zeros by
            default.
        return_final_states: Whether to return the final states.
        final_states_out: (batch, dim, width - 1), which they are written to; may be initial_states.
        activation: "silu" (or "swish"), or None.

    Returns:
        The outputs (batch, dim, seqlen) in x's dtype, 0 at padding. With return_final_states also
        the last inputs (batch, dim, width - 1) of each row's last sequence, zeros before its start;
        a row without a token hands its states on.

    Raises:
        ValueError: Shapes do not fit, or the activation is another.
    """
    batch, dim, seqlen = x.shape
    width = weight.shape[-1]
    _check(x, weight, bias, activation)
    states = (batch, dim, width - 1)
    for name, found, shape in (
        ("seq_idx", seq_idx, (batch, seqlen)),
        ("initial_states", initial_states, states),
        ("final_states_out", final_states_out, states),
    ):
        if found is not None and found.shape != shape:
            raise ValueError(f"{name} must be {shape}; found {tuple(found.shape)}.")
    inputs = x.transpose(1, 2)
    before = inputs.new_zeros(batch, width - 1, dim)
    if initial_states is not None:
        before = initial_states.to(x.dtype).transpose(1, 2)
    if seq_idx is None or not seqlen:
        ids = None
        inputs = torch.cat([before, inputs], dim=1)
        final = inputs[:, seqlen:]
    else:
        inputs, ids, final = _beside_tokens(inputs, before, seq_idx)
    out = _convolve(inputs, weight, bias, ids, activation).to(x.dtype)
    if seq_idx is not None:
        out = out.masked_fill((seq_idx < 0)[..., None], 0.0)
    out = out.transpose(1, 2)
    if not return_final_states:
        return out
    final = final.transpose(1, 2)
    return out, final.clone() if final_states_out is None else final_states_out.copy_(final)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Convolve the next inputs, and take them into the state.

    Args:
        x: (batch, dim) or (batch, dim, seqlen).
        conv_state: (batch, dim, state_len), at least width - 1 long: the last inputs. Written to.
        weight: (dim, width).
        bias: (dim,).
        activation: "silu" (or "swish"), or None.
        cache_seqlens: Not on a CPU.
        conv_state_indices: Not on a CPU.

    Returns:
        The outputs, of x's shape and dtype.

    Raises:
        NotImplementedError: What is not on a CPU is given.
        ValueError: Shapes do not fit, or the activation is another.
    """
    for name, found in (
        ("cache_seqlens", cache_seqlens),
        ("conv_state_indices", conv_state_indices),
    ):
        if found is not None:
            raise NotImplementedError(
                f"causal_conv1d_update: found {name} with tensors on a CPU; that is for a GPU "
                "only. Give the rows' own states, in the order of their tokens."
            )
    _check(x, weight, bias, activation)
    batch, dim, width = len(x), x.shape[1], weight.shape[-1]
    length = conv_state.shape[-1]
    if conv_state.shape != (batch, dim, length) or length < width - 1:
        raise ValueError(
            f"conv_state must be {(batch, dim, width - 1)}, or longer; found "
            f"{tuple(conv_state.shape)}."
        )
    new = x if x.dim() == 3 else x[..., None]
    inputs = torch.cat([conv_state.to(x.dtype), new], dim=-1)
    conv_state.copy_(inputs[..., inputs.shape[-1] - length :])
    seen = inputs[..., inputs.shape[-1] - new.shape[-1] - width + 1 :].transpose(1, 2)
    out = _convolve(seen, weight, bias, None, activation).to(x.dtype).transpose(1, 2)
    return out if x.dim() == 3 else out[..., 0]


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last inputs of sequences that stand one after the other.

    Args:
        x: (tokens, dim).
        cu_seqlens: (sequences + 1,), where each of them starts, and the last one ends.
        state_len: How many inputs.

    Returns:
        (sequences, dim, state_len), zeros where a sequence is shorter.
    """
    ends, starts = cu_seqlens[1:, None], cu_seqlens[:-1, None]
    tokens = ends - state_len + torch.arange(state_len, device=x.device)
    states = x[tokens.clamp(min=0)].masked_fill((tokens < starts)[..., None], 0.0)
    return states.transpose(1, 2)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    if activation not in (None, "silu", "swish"):
        raise ValueError(f'activation must be "silu", "swish" or None; found {activation!r}.')
    for name, found, shape in (
        ("weight", weight, (x.shape[1], weight.shape[-1])),
        ("bias", bias, (x.shape[1],)),
    ):
        if found is not None and found.shape != shape:
            raise ValueError(
                f"{name} must be {shape} for x of {x.shape[1]} channels; found "
                f"{tuple(found.shape)}."
            )


def _beside_tokens(
    inputs: Tensor, before: Tensor, seq_idx: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Put what came before a row right before its first token, which padding may precede.

    Args:
        inputs: (batch, seqlen, dim).
        before: (batch, width - 1, dim), the inputs before the row's first token.
        seq_idx: (batch, seqlen).

    Returns:
        The inputs (batch, width - 1 + seqlen, dim), 0 at padding; whose they are, (batch, width - 1
        + seqlen); and the final states (batch, width - 1, dim).
    """
    _, seqlen, dim = inputs.shape
    count = before.shape[1]
    real = seq_idx >= 0
    positions = torch.arange(seqlen, device=inputs.device)
    first = real.int().argmax(1)
    last = torch.where(real, positions, -1).amax(1)
    owners = positions.clamp(first[:, None], last.clamp(min=0)[:, None])
    ids = seq_idx.gather(1, owners)
    columns = torch.arange(count, device=inputs.device)[:, None].expand(-1, dim)
    inputs = pad(inputs.masked_fill(~real[..., None], 0.0), (0, 0, count, 0))
    inputs = inputs.scatter(1, columns + first[:, None, None], before)
    ids = torch.cat([ids[:, :1].expand(-1, count), ids], dim=1)
    columns = columns + last[:, None, None] + 1
    other = ids.gather(1, columns[..., 0]) != ids[:, -1:]
    return inputs, ids, inputs.gather(1, columns).masked_fill(other[..., None], 0.0)


def _convolve(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor | None,
    activation: str | None,
) -> Tensor:
    """The convolution of (batch, width - 1 + seqlen, dim) with (dim, width), tap by tap.

    With ids, (batch, width - 1 + seqlen), a token does not see inputs of another sequence.
    """
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    taps = weight.to(dtype).t()
    behind = len(taps) - 1
    length = inputs.shape[1] - behind
    inputs = inputs.to(dtype)
    out = inputs.new_zeros(()) if bias is None else bias.to(dtype)
    for tap, factor in enumerate(taps):
        seen = inputs[:, tap : tap + length]
        if ids is not None:
            other = ids[:, tap : tap + length] != ids[:, behind:]
            seen = seen.masked_fill(other[..., None], 0.0)
        out = torch.addcmul(out, seen, factor)
    return silu(out) if activation else out
