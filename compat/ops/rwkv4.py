"""RWKV-4's wkv with carried state, in blocks of time: plain torch, and native on a CPU.

The output is a weighted mean of the values of all tokens so far (Peng et al. 2023, arXiv
2305.13048, equation 16; the state as in its appendix on numerical stability). Token j counts
exp(k_j - (t - 1 - j) w) at a later token t, and exp(k_t + first) at its own. The state is the sum
of weighted values, the sum of weights, and the largest exponent, by which both are scaled.

The text is cut into about as many blocks as a block has tokens. First all blocks are read at once
from an empty state, token by token; then the states at the blocks' ends are passed on, block by
block; then each token sums its state within the block and the block's initial state.
"""

from __future__ import annotations

import ctypes
import functools
import math

import torch
from torch import Tensor

from compat.ops import compiled
from compat.ops.chosen import is_native

State = tuple[Tensor, Tensor, Tensor]
"""Numerator and denominator, scaled by exp(-maximum), and maximum."""

_EMPTY = -1e38  # The exponent of a state without a token; finite, so that differences are.


def rwkv_linear_attention(
    time_decay: Tensor,
    time_first: Tensor,
    key: Tensor,
    value: Tensor,
    state: State | list[Tensor] | None = None,
    return_state: bool = False,
) -> tuple[Tensor, list[Tensor] | None]:
    """Compute transformers' function of this name.

    It is differentiable, and runs on any device.

    Args:
        time_decay: (dim,); w is its exponential.
        time_first: (dim,).
        key: (batch, seqlen, dim).
        value: (batch, seqlen, dim).
        state: Three of (batch, dim), or None for none; the maximum of an empty one is as low as
            -1e30.
        return_state: Whether to return the state though none was given.

    Returns:
        The outputs (batch, seqlen, dim) in key's dtype, and the state after the last token, or
        None. Arithmetic and the state are in float32, or in float64 where the key is.

    Raises:
        ValueError: Shapes do not fit.
    """
    batch, _, dim = key.shape
    wanted = {
        "value": (value, key.shape),
        "time_decay": (time_decay, (dim,)),
        "time_first": (time_first, (dim,)),
    } | {f"state[{i}]": (part, (batch, dim)) for i, part in enumerate(state or ())}
    for name, (found, shape) in wanted.items():
        if found.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)}; found {tuple(found.shape)}.")
    dtype = torch.promote_types(key.dtype, torch.float32)
    if state is None:
        zeros = torch.zeros(batch, dim, dtype=dtype, device=key.device)
        begin = (zeros, zeros, zeros + _EMPTY)
    else:
        numerator, denominator, maximum = (part.to(dtype) for part in state)
        begin = (numerator, denominator, maximum)
    decay, first = -torch.exp(time_decay.to(dtype)), time_first.to(dtype)
    run = _native_wkv if is_native(decay, first, key, value, *begin) else _torch_wkv
    out, last = run(decay, first, key, value, begin)
    return out, list(last) if return_state or state is not None else None


def _torch_wkv(
    decay: Tensor, first: Tensor, key: Tensor, value: Tensor, state: State
) -> tuple[Tensor, State]:
    outputs, start, seqlen = [], 0, key.shape[1]
    while start < seqlen:
        # Only whole blocks are taken; the rest is cut again.
        width = math.isqrt(seqlen - start)
        end = seqlen - (seqlen - start) % width
        piece = [part[:, start:end].to(decay.dtype) for part in (key, value)]
        # A block's tokens come first, then the blocks: (width, blocks, batch, dim).
        k, v = (part.unflatten(1, (-1, width)).permute(2, 1, 0, 3) for part in piece)
        y, state = _blocks(decay, first, k, v, state)
        outputs.append(y.permute(2, 1, 0, 3).flatten(1, 2))
        start = end
    out = torch.cat(outputs, 1) if outputs else torch.zeros_like(key)
    return out.to(key.dtype), state


def _blocks(
    decay: Tensor, first: Tensor, key: Tensor, value: Tensor, state: State
) -> tuple[Tensor, State]:
    """Read blocks that follow one another; key and value are (width, blocks, batch, dim)."""
    width = len(key)
    zeros = torch.zeros_like(key[0])
    own = [(zeros, zeros, zeros + _EMPTY)]  # The states before each token and after the last.
    for k, v in zip(key, value, strict=True):
        numerator, denominator, maximum = own[-1]
        own.append(_sum((numerator, denominator, maximum + decay), (v, 1, k)))
    carried = []
    for end in zip(*own[-1], strict=True):
        carried.append(state)
        numerator, denominator, maximum = state
        state = _sum((numerator, denominator, maximum + width * decay), end)
    numerator, denominator, maximum = (torch.stack(part) for part in zip(*carried, strict=True))
    outputs = []
    for token, (k, v) in enumerate(zip(key, value, strict=True)):
        begun = (numerator, denominator, maximum + token * decay)
        above, below, _ = _sum(begun, own[token], (v, 1, k + first))
        outputs.append(above / below)
    return torch.stack(outputs), state


def _sum(*parts: tuple[Tensor, Tensor | int, Tensor]) -> State:
    """Sum weighted means, each given as numerator, denominator and exponent of both."""
    maximum = functools.reduce(torch.maximum, [exponent for *_, exponent in parts])
    above, below = torch.zeros_like(maximum), torch.zeros_like(maximum)
    for numerator, denominator, exponent in parts:
        scale = torch.exp(exponent - maximum)
        above, below = above + scale * numerator, below + scale * denominator
    return above, below, maximum


class _Wkv(ctypes.Structure):
    """The struct `Wkv` of native/rwkv4.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("key", "value", "out")),
        *((f"{name}_stride", ctypes.c_int64 * 2) for name in ("key", "value", "out")),
        *((name, ctypes.c_void_p) for name in ("decay", "first", "state")),
        *((name, ctypes.c_int64) for name in ("batch", "seqlen", "dim", "is_bf16")),
    )


def _native_wkv(
    decay: Tensor, first: Tensor, key: Tensor, value: Tensor, state: State
) -> tuple[Tensor, State]:
    library = compiled.library()
    assert library is not None
    out = torch.empty_like(key, memory_format=torch.contiguous_format)
    value = value.to(key.dtype)
    key, value = (part if part.stride(2) == 1 else part.contiguous() for part in (key, value))
    decay, first, after = decay.contiguous(), first.contiguous(), torch.stack(state)
    sequences = (key, value, out)
    wkv = _Wkv(
        *(part.data_ptr() for part in sequences),
        *((ctypes.c_int64 * 2)(*part.stride()[:2]) for part in sequences),
        *(part.data_ptr() for part in (decay, first, after)),
        *(*key.shape, key.dtype == torch.bfloat16),
    )
    library.compat_rwkv4_wkv(ctypes.byref(wkv), torch.get_num_threads())
    numerator, denominator, maximum = after.unbind()
    return out, (numerator, denominator, maximum)
