"""The wkv of RWKV-7 and RWKV-6 on the native kernel."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from compat.ops import compiled


class _Wkv(ctypes.Structure):
    """The struct `Wkv` of native/rwkv7.cpp."""

    _fields_ = (
        *((name, compiled.View) for name in ("r", "w", "k", "v", "a", "b", "out")),
        *((name, ctypes.c_void_p) for name in ("bonus", "seq_idx", "state")),
        *((name, ctypes.c_int64) for name in ("batch", "seqlen", "nheads", "dim", "v_dim")),
    )


def wkv(
    inputs: dict[str, Tensor], bonus: Tensor | None, state: Tensor, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute outputs in v's dtype, and the last state, without gradients.

    Args:
        inputs: r, w, k and v, and a and b for RWKV-7: (batch, seqlen, nheads, dim) in float32 or
            bfloat16.
        bonus: (nheads, dim) for RWKV-6; None for RWKV-7.
        state: (batch, nheads, dim, v_dim) in float32, left as it is.
        seq_idx: (batch, seqlen), or None.
    """
    library = compiled.library()
    assert library is not None
    value = inputs["v"]
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    state = state.clone(memory_format=torch.contiguous_format)
    # A view holds no reference, so these tensors must live until the kernel is done.
    held = {name: x if x.stride(3) == 1 else x.contiguous() for name, x in inputs.items()}
    ids = None if seq_idx is None else seq_idx.to(torch.int32).contiguous()
    bonus = None if bonus is None else bonus.float().contiguous()
    views = (compiled.View.of(held.get(name)) for name in ("r", "w", "k", "v", "a", "b"))
    pointers = (None if x is None else x.data_ptr() for x in (bonus, ids, state))
    arguments = _Wkv(*views, compiled.View.of(out), *pointers, *inputs["k"].shape, value.shape[3])
    library.compat_rwkv7_wkv(ctypes.byref(arguments), torch.get_num_threads())
    return out, state
