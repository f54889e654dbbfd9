"""Mamba-1's selective scan with carried state, in blocks of time: plain torch, and native on a CPU.

Per channel d and state n (Gu and Dao 2023, arXiv 2312.00752, equation 2, discretised as in section
3.3 with B by the Euler rule):

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,     y_t = C_t . h_t + D u_t, gated by silu(z_t)

A piece of time is cut into about as many blocks as a block has tokens. First all blocks are scanned
from zeros at once, token by token; then the states at the blocks' ends are passed on, block by
block; then each token receives its block's initial state, times the decay since. Decays are
multiplied, never divided by, and are exponentials that the recurrence has too, so nothing overflows
that would not overflow in the recurrence.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus
from torch.utils.checkpoint import checkpoint

from compat.ops import compiled
from compat.ops.chosen import is_native

# The most numbers of (batch, dim, tokens, dstate) at one time, in each of a few tensors.
_PIECE = 2**22


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
    """Compute mamba-ssm's function of this name for a real A, from a state.

    It is differentiable, and runs on any device.

    Args:
        u: (batch, dim, seqlen).
        delta: (batch, dim, seqlen), before bias and softplus.
        A: (dim, dstate), negative.
        B: (batch, dstate, seqlen), (batch, groups, dstate, seqlen), or (dim, dstate).
        C: As B.
        D: (dim,), or None for zeros.
        z: (batch, dim, seqlen), the gate before silu, or None for no gate.
        delta_bias: (dim,), or None for zeros.
        delta_softplus: Whether delta goes through softplus.
        return_last_state: Whether to return the state after the last token too.
        initial_states: (batch, dim, dstate), or None for zeros.

    Returns:
        The outputs (batch, dim, seqlen) in u's dtype, and the state (batch, dim, dstate) if asked
        for. Arithmetic and the state are in float32, or in float64 where u or A is.

    Raises:
        ValueError: Shapes do not fit, or A is complex.
    """
    batch, dim, _ = u.shape
    dstate = A.shape[-1]
    _check(u, delta, A, B, C, D, z, delta_bias, initial_states)
    dtype = torch.promote_types(torch.promote_types(u.dtype, A.dtype), torch.float32)
    if initial_states is None:
        state = torch.zeros(batch, dim, dstate, dtype=dtype, device=u.device)
    else:
        state = initial_states.to(dtype)
    B, C = (_by_groups(part, u) for part in (B, C))
    groups = math.lcm(B.shape[1], C.shape[1])
    B, C = (
        part[:, :, None].expand(-1, -1, groups // part.shape[1], -1, -1).flatten(1, 2)
        for part in (B, C)
    )
    arguments = (u, delta, A.to(dtype), B, C, D, z, delta_bias)
    run = _native_scan if is_native(*arguments, state) else _torch_scan
    out, last = run(*arguments, delta_softplus, state)
    return (out, last) if return_last_state else out


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_states: Tensor | None,
) -> None:
    batch, dim, seqlen = u.shape
    if A.is_complex():
        raise ValueError("A must be real; found a complex one, for which mamba-ssm has a kernel.")
    dstate = A.shape[-1]
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "delta": (delta, (batch, dim, seqlen)),
        "A": (A, (dim, dstate)),
        "D": (D, (dim,)),
        "z": (z, (batch, dim, seqlen)),
        "delta_bias": (delta_bias, (dim,)),
        "initial_states": (initial_states, (batch, dim, dstate)),
    }
    for name, weight in (("B", B), ("C", C)):
        groups = weight.shape[1] if weight.ndim == 4 else 1
        shapes = {2: (dim, dstate), 4: (batch, groups, dstate, seqlen)}
        wanted[name] = (weight, shapes.get(weight.ndim, (batch, dstate, seqlen)))
        if not groups or dim % groups:
            raise ValueError(f"{name} must have groups that divide dim {dim}; found {groups}.")
    for name, (found, shape) in wanted.items():
        if found is not None and found.shape != shape:
            raise ValueError(f"{name} must be of shape {shape}; found {tuple(found.shape)}.")


def _by_groups(weight: Tensor, u: Tensor) -> Tensor:
    """Return B or C as (batch, groups, dstate, seqlen), a view; a constant one by channel."""
    if weight.ndim == 2:
        return weight[None, :, :, None].expand(len(u), -1, -1, u.shape[-1])
    return weight[:, None] if weight.ndim == 3 else weight


def _torch_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    seqlen = u.shape[-1]
    longest = max(1, min(seqlen, _PIECE // max(state.numel(), 1)))
    groups = B.shape[1]
    A, state = A.unflatten(0, (groups, -1)), state.unflatten(1, (groups, -1))
    outputs, start = [], 0
    while start < seqlen:
        # Only whole blocks are taken; the rest of a piece is cut again.
        length = min(longest, seqlen - start)
        width = math.isqrt(length)
        end = start + length - length % width
        piece = [
            part[..., start:end].to(A.dtype).unflatten(-1, (-1, width)) for part in (u, delta, B, C)
        ]
        # A block's tokens come first, then the blocks: (width, blocks, batch, groups, ...).
        x, dt, b, c = (part.movedim((-1, -2), (0, 1)) for part in piece)
        if delta_bias is not None:
            dt = dt + delta_bias.to(A.dtype)
        if delta_softplus:
            dt = softplus(dt)
        x, dt = (part.unflatten(-1, (groups, -1)) for part in (x, dt))
        if torch.is_grad_enabled():  # Otherwise the graph would hold all states.
            y, state = checkpoint(_blocks, x, dt, A, b, c, state, use_reentrant=False)
        else:
            y, state = _blocks(x, dt, A, b, c, state)
        outputs.append(y.flatten(3).movedim((0, 1), (-1, -2)).flatten(-2))
        start = end
    out = torch.cat(outputs, -1) if outputs else u.new_zeros(u.shape, dtype=A.dtype)
    if D is not None:
        out = out + D.to(A.dtype)[:, None] * u
    if z is not None:
        out = out * silu(z.to(A.dtype))
    return out.to(u.dtype), state.flatten(1, 2)


def _blocks(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Scan blocks that follow one another.

    Args:
        x, dt: (width, blocks, batch, groups, channels).
        A: (groups, channels, dstate).
        B, C: (width, blocks, batch, groups, dstate).
        state: (batch, groups, channels, dstate), before the first block.

    Returns:
        The outputs (width, blocks, batch, groups, channels), and the state after the last block.
    """
    states: list[Tensor] = []
    decays: list[Tensor] = []
    for token in range(len(x)):
        decay = torch.exp(dt[token, ..., None] * A)
        added = (dt[token] * x[token])[..., None] * B[token, ..., None, :]
        states.append(torch.addcmul(added, decay, states[-1]) if states else added)
        decays.append(decay * decays[-1] if decays else decay)
    carried = []
    for end, decay in zip(states[-1], decays[-1], strict=True):
        carried.append(state)
        state = torch.addcmul(end, decay, state)
    begun = torch.stack(carried)
    outputs = [
        (torch.addcmul(own, decay, begun) @ c[..., None])[..., 0]
        for own, decay, c in zip(states, decays, C, strict=True)
    ]
    return torch.stack(outputs), state


class _Scan(ctypes.Structure):
    """The struct `Scan` of native/mamba1.cpp."""

    _fields_ = (
        *((name, compiled.View) for name in ("u", "delta", "z", "out", "B", "C")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "delta_bias", "state")),
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "groups", "channels", "seqlen", "dstate", "delta_softplus")
        ),
    )


def _native_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    library = compiled.library()
    assert library is not None
    batch, dim, seqlen = u.shape
    groups, dstate = B.shape[1:3]
    # Channels lie side by side, as the projection after the scan reads them.
    out = torch.empty(batch, seqlen, dim, dtype=u.dtype).transpose(1, 2)
    state = state.clone(memory_format=torch.contiguous_format)
    # A view holds no reference, so these tensors must live until the kernel is done.
    b, c = B.float(), C.float()
    rows = [None if part is None else part.float().contiguous() for part in (A, D, delta_bias)]
    grouped = [None if part is None else part.unflatten(1, (groups, -1)) for part in (u, delta, z)]
    scan = _Scan(
        *(compiled.View.of(part) for part in (*grouped, out.unflatten(1, (groups, -1)), b, c)),
        *(None if part is None else part.data_ptr() for part in (*rows, state)),
        *(batch, groups, dim // groups, seqlen, dstate, delta_softplus),
    )
    library.compat_mamba1_scan(ctypes.byref(scan), torch.get_num_threads())
    return out, state
