"""Packages in place of the installed ones, for tests of compat's fused path."""

import sys
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from support.families import tiny_model

from compat import ops
from compat.families import mamba2, mamba2_kernels
from compat.families.lookup import FAMILIES, backbone_of

TRITON = "mamba_ssm.ops.triton"


def kernels(conv, ops):
    """Return the modules of an emulated causal-conv1d and an interpreted mamba-ssm."""
    package = ModuleType("causal_conv1d")
    vars(package).update(vars(conv))
    mamba_ssm = ModuleType("mamba_ssm")
    mamba_ssm.__spec__ = ModuleSpec("mamba_ssm", None)
    return {
        "causal_conv1d": package,
        "mamba_ssm": mamba_ssm,
        f"{TRITON}.ssd_combined": ops.ssd_combined,
        f"{TRITON}.layernorm_gated": ops.layernorm_gated,
    }


@contextmanager
def in_place(modules, on_gpu=True):
    """Put modules (None: absent) in place of installed ones; yield the calls of the fused path.

    With `on_gpu`, tensors on the CPU count as tensors on a GPU.
    """
    calls = []
    for model_type in mamba2.MIXERS:  # Each is compared once, by runs of its own.
        backbone_of(tiny_model(model_type))
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        path = mamba2_kernels.probe.__wrapped__()

        def run(*args):
            calls.append(args)
            return path.run(*args)

        probed = mamba2_kernels.FusedPath(run if path.run else None, path.reason)
        patch.setattr(mamba2_kernels, "probe", lambda: probed)
        if on_gpu:
            patch.setattr(mamba2, "_has_kernels", lambda tensor: True)
        yield calls


@contextmanager
def transformers_own_path():
    """Keep the fused path from being taken."""
    with pytest.MonkeyPatch.context() as patch, ops.using("released"):
        patch.setattr(mamba2, "_has_kernels", lambda tensor: False)
        yield


def state_after(model, ids, sizes):
    """Return the cache of a Mamba2 after chunks of these sizes."""
    state, start = None, 0
    for size in sizes:
        _, state = FAMILIES["mamba2"].forward(model, ids[:, start : start + size], start, state)
        start += size
    return state
