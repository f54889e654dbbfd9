"""A fused op that takes the states, where the fork of transformers looks for that of its kernel."""

import importlib
from contextlib import contextmanager
from inspect import signature

import pytest

from compat.ops.mamba2 import mamba_split_conv1d_scan_combined

MODELS = ["bamba", "granitemoehybrid", "mamba2", "nemotron_h", "zamba2"]
NAME = "mamba2_split_conv1d_scan_combined"


@contextmanager
def in_place(op=mamba_split_conv1d_scan_combined):
    """Put an op in the kernel's place in all models, that of compat by default; yield its calls.

    The fork's own decorator says in the same attribute what an op takes, and hands on no more.
    """
    calls, taken = [], tuple(signature(op).parameters)

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return op(*args, **{name: value for name, value in kwargs.items() if name in taken})

    counted.implementation_params = taken
    with pytest.MonkeyPatch.context() as patch:
        for name in MODELS:
            module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
            patch.setattr(module, NAME, counted)
        yield calls
