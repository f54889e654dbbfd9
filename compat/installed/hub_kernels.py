"""Detect hub kernels that replaced a model's own functions, and say what they can do.

The package `kernels` makes an object of each of these functions in a model's module. Once a model
is kernelized, the object's `forward` is that of a kernel's layer, and all models of the module
share it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from compat.installed.recurrent_cache import parameters

_FUSED = "mamba_split_conv1d_scan_combined"


def is_used(mixer: Any) -> bool:
    """Return whether a kernel of the hub has replaced one of a mixer's functions."""
    return any(map(_is_replaced, getattr(mixer, "_kernel_funcs", {}).values()))


def fused_op(mixer: Any) -> Callable[..., Any] | None:
    """Return the fused op of a mixer, if it is a kernel's that takes and returns conv states."""
    for function in getattr(mixer, "_kernel_funcs", {}).values():
        if _is_replaced(function) and _layer_name(function) == _FUSED:
            return None if _lacks(function) else function
    return None


def describe(model_types: list[str]) -> str:
    """Describe the hub kernels in mixers of these types; empty where there are none."""
    said: dict[str, list[str]] = {}
    for model_type in model_types:
        module = sys.modules.get(f"transformers.models.{model_type}.modeling_{model_type}")
        known = [f for f in vars(module).values() if _layer_name(f)] if module else []
        replaced = [f for f in known if _is_replaced(f)]
        fused = [f for f in replaced if _layer_name(f) == _FUSED]
        if replaced:
            lack = _lacks(fused[0]) if fused else f"the kernels of the hub have no {_FUSED}"
            said.setdefault(lack, []).append(model_type)
    return "; ".join(
        f"not used in {', '.join(found)}, as {lack}"
        if lack
        else f"in {', '.join(found)} that of the hub"
        for lack, found in said.items()
    )


def _layer_name(function: Any) -> Any:
    """Return the name by which `kernels` knows a function that it made an object; else None."""
    return getattr(type(function), "kernel_layer_name", None)


def _is_replaced(function: Any) -> bool:
    """Return whether an object's forward is not its class's own.

    After a model has gone back to its own functions, it is the class's again, as a bound method.
    """
    forward = vars(function).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(function).forward


def _lacks(function: Any) -> str:
    """Say why the kernel in a function's place cannot be used between states; empty where it can.

    A layer has the parameters of the function that it replaces, and accepts others without a check.
    Which of them it uses shows in the signature of the function of the same name, in its package.
    """
    layer = getattr(function.forward, "__func__", function.forward)
    package = sys.modules.get(str(layer.__module__).rpartition(".")[0])
    op = getattr(package, _FUSED, None)
    name = _name(package)
    if op is None:
        return f"{name} has no function {_FUSED} beside its layer"
    try:
        missing = {"initial_conv_states", "return_final_conv_states"}.difference(parameters(op))
    except (TypeError, ValueError):
        return f"{name} has a {_FUSED} whose parameters cannot be seen"
    return f"{name} has a {_FUSED} that takes no {', '.join(sorted(missing))}" if missing else ""


def _name(package: Any) -> str:
    """Return the name and version of the kernel whose package `kernels` loaded."""
    loaded = getattr(sys.modules.get("kernels"), "get_loaded_kernels", list)
    for kernel in loaded():
        if kernel.module is package:
            return f"{kernel.metadata.name} {kernel.metadata.version} of the hub"
    return f"the kernel {getattr(package, '__name__', 'of the hub')}"
