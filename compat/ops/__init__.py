"""Operators of recurrent models that are fast on a CPU, and the choice of what they run on."""

# The kernels for the hub take this file along, and not all of the others.
from compat.ops import mamba2, mamba2_native
from compat.ops.chosen import Backend, backend, describe, using

__all__ = [
    "Backend",
    "backend",
    "compiled",
    "convolution",
    "delta",
    "describe",
    "mamba1",
    "mamba2",
    "mamba2_scan",
    "rwkv4",
    "rwkv6",
    "rwkv7",
    "using",
    "waiting",
]

mamba2.accelerated = mamba2_native.forward
