"""Put the emulated causal_conv1d and the interpreted mamba_ssm where installed ones would be."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

from ci.gpu.place import sources
from ci.kernels import emulation, interpreter
from ci.kernels.emulation import selective_scan

_MODULES = ("ops.selective_scan_interface",)


def load(source: str) -> tuple[Any, SimpleNamespace]:
    """Load both packages of a source, as `emulation` and `interpreter` do."""
    conv = emulation.causal_conv1d(sources("causal-conv1d", source))
    tree = sources("mamba-ssm", source)
    scan = selective_scan.when_used(tree)
    found = interpreter.mamba_ssm(tree, conv=conv, selective_scan_cuda=scan, modules=_MODULES)
    return conv, found


def put(source: str) -> None:
    """Let this process import both packages of a source."""
    _, found = load(source)
    sys.modules.update(found.imported)
