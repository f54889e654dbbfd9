"""A causal depthwise convolution and SiLU, as before a recurrence: torch, and native on a CPU."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad, silu

from compat.ops import compiled
from compat.ops.chosen import is_native


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute SiLU of a convolution in which a token sees itself and the tokens before it.

    It is differentiable, and runs on any device. To go on from a state, put it before the tokens.

    Args:
        x: (batch, channels, seqlen).
        weight: (channels, width); the last column is a token's own.
        bias: (channels,), or None for zeros.

    Returns:
        (batch, channels, seqlen) in x's dtype. Arithmetic is in float32, or in float64 where x or
        the weight is. The native kernel returns a tensor of which a token's channels lie together.

    Raises:
        ValueError: Shapes do not fit.
    """
    _, channels, seqlen = x.shape
    for name, found, fits in (
        ("weight", weight, weight.ndim == 2 and len(weight) == channels),
        ("bias", bias, bias is None or bias.shape == (channels,)),
    ):
        if not fits:
            shape = tuple(found.shape) if found is not None else None
            raise ValueError(f"{name} must be of {channels} channels; found {shape}.")
    width = weight.shape[1]
    if 2 <= width <= 4 and seqlen and is_native(x, weight, bias):
        return _native_convolution(x, weight, bias)
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    bias = None if bias is None else bias.to(dtype)
    padded = pad(x.to(dtype), (width - 1, 0))
    out = conv1d(padded, weight.to(dtype)[:, None], bias, groups=channels)
    return silu(out).to(x.dtype)


class _Convolution(ctypes.Structure):
    """The struct `Convolution` of native/convolution.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out")),
        ("stride", ctypes.c_int64 * 2),
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "channels", "seqlen", "width", "is_bf16", "threads")
        ),
    )


def _native_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    library = compiled.library()
    assert library is not None
    batch, channels, seqlen = x.shape
    if x.stride(2) != 1:
        x = x.contiguous()
    out = x.new_empty(batch, seqlen, channels)
    # Addresses hold no reference, so these tensors must live until the kernel is done.
    weight = weight.float().contiguous()
    bias = weight.new_zeros(channels) if bias is None else bias.float().contiguous()
    arguments = _Convolution(
        *(part.data_ptr() for part in (x, weight, bias, out)),
        (ctypes.c_int64 * 2)(*x.stride()[:2]),
        *(batch, channels, seqlen, weight.shape[1]),
        *(x.dtype == torch.bfloat16, torch.get_num_threads()),
    )
    library.compat_convolution(ctypes.byref(arguments))
    return out.transpose(1, 2)
