"""Mamba-1 and Mamba-2, with states in and out, on a CPU and on a GPU."""

import importlib
from typing import Any

import torch

from . import on_cpu
from ._causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from ._causal_conv1d._serve import by_device
from .on_cpu import describe

if torch.version.cuda is None:  # There need not be triton, which it imports.
    on_gpu = None
else:
    from . import on_gpu

mamba_chunk_scan_combined = by_device(on_cpu.mamba_chunk_scan_combined, on_gpu)
mamba_inner_fn = by_device(on_cpu.mamba_inner_fn, on_gpu)
mamba_split_conv1d_scan_combined = by_device(on_cpu.mamba_split_conv1d_scan_combined, on_gpu)
selective_scan_fn = by_device(on_cpu.selective_scan_fn, on_gpu)
selective_state_update = by_device(on_cpu.selective_state_update, on_gpu)
falcon_mamba_inner_fn = mamba_inner_fn

from . import layers  # noqa: E402  # It takes the functions from here.

_MODULES = {
    "Mamba": ".modules.mamba_simple",
    "Mamba2": ".modules.mamba2",
    "MambaLMHeadModel": ".models.mixer_seq_simple",
}


def __getattr__(name: str) -> Any:
    """The modules of mamba-ssm, for a GPU only; they need more packages than the functions."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if on_gpu is None:
        raise AttributeError(
            f"{name}: found a torch for CPUs; the modules of mamba-ssm need one for CUDA. On a CPU "
            "take the functions of this kernel, or a model of transformers with its layers."
        )
    return getattr(importlib.import_module(_MODULES[name], __name__), name)


__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "describe",
    "falcon_mamba_inner_fn",
    "layers",
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_split_conv1d_scan_combined",
    "selective_scan_fn",
    "selective_state_update",
]
