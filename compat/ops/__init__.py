"""Operators of recurrent models that are fast on a CPU, and what they run on."""

from compat.ops import mamba2, mamba2_native
from compat.ops.chosen import Backend, backend, describe, using

__all__ = ["Backend", "backend", "describe", "using"]

mamba2.accelerated = mamba2_native.forward
