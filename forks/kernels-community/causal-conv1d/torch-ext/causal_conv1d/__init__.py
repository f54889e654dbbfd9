"""The causal convolution, with states in and out, on a CPU and on a GPU."""

import torch

from . import on_cpu
from ._serve import by_device

if torch.version.cuda is None:  # There need not be triton, which it imports.
    on_gpu = None
else:
    from . import on_gpu

causal_conv1d_fn = by_device(on_cpu.causal_conv1d_fn, on_gpu)
causal_conv1d_update = by_device(on_cpu.causal_conv1d_update, on_gpu)
causal_conv1d_varlen_states = by_device(on_cpu.causal_conv1d_varlen_states, on_gpu)

from . import layers  # noqa: E402  # It takes the functions from here.

__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_varlen_states", "layers"]
