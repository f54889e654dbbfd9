"""The patched kernels as a user has them: installed, on a GPU.

Without a GPU this folder is a rehearsal: every line runs on a CPU, with mamba-ssm's kernels under
Triton's interpreter and causal-conv1d's on the CUDA emulation.
"""

import functools
import importlib
import os
from types import SimpleNamespace

import pytest
import torch
from support.fused_packages import in_place, kernels

from ci import forks
from ci.kernels import emulation, interpreter
from compat.families import mamba2_kernels

# With the interpreter, a machine with a GPU rehearses as well.
ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"


@functools.cache
def rehearsed():
    """Load the packages causal_conv1d and mamba_ssm of the patched trees, on a CPU."""
    try:
        conv = emulation.causal_conv1d(forks.patched("causal-conv1d"))
    except emulation.Unavailable as reason:
        pytest.skip(str(reason))
    return conv, interpreter.mamba_ssm(forks.patched("mamba-ssm"), conv=conv)


def on_gpu(function):
    """Move a function's tensors to the GPU, and its results back, also in backward."""

    def move(value):
        return value.cuda() if isinstance(value, torch.Tensor) else value

    @functools.wraps(function)
    def run(*args, **kwargs):
        found = function(*map(move, args), **{name: move(v) for name, v in kwargs.items()})
        return tuple(t.cpu() for t in found) if isinstance(found, tuple) else found.cpu()

    return run


@pytest.fixture(scope="session")
def device():
    if not ON_GPU and (reason := interpreter.unavailable()):
        pytest.skip(reason)
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture(scope="session")
def ops(device):
    """Return the functions of both packages, for tensors on the CPU."""
    if not ON_GPU:
        conv, ssm = rehearsed()
        names = ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined")
        scans = {name: getattr(ssm.ssd_combined, name) for name in names}
        return SimpleNamespace(causal_conv1d_fn=conv.causal_conv1d_fn, **scans)
    conv = importlib.import_module("causal_conv1d")
    ssd = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    return SimpleNamespace(
        causal_conv1d_fn=on_gpu(conv.causal_conv1d_fn),
        mamba_chunk_scan_combined=on_gpu(ssd.mamba_chunk_scan_combined),
        mamba_split_conv1d_scan_combined=on_gpu(ssd.mamba_split_conv1d_scan_combined),
    )


@pytest.fixture
def fused_calls(device):
    """Yield the calls of the fused path, which must be that of the patched kernels."""
    modules = {}
    if not ON_GPU:
        # At its import a model takes the packages that are there, but its own path must be torch.
        importlib.import_module("transformers.models.mamba2.modeling_mamba2")
        modules = kernels(*rehearsed())
    with in_place(modules, on_gpu=not ON_GPU) as calls:
        reason = mamba2_kernels.probe().reason
        assert reason.startswith("mamba_split_conv1d_scan_combined"), reason
        yield calls
