"""What serves a call: by device; and what of a layer's further inputs its function is given."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

# The optional arguments of all functions of the kernel.
OPTIONS: set[str] = set()
_FOR_ATTENTION = {"cu_seq_lens_q", "cu_seq_lens_k"}


def by_device(on_cpu: Callable[..., Any], on_gpu: ModuleType | None) -> Callable[..., Any]:
    """A function that runs where its first argument, a tensor, is.

    Args:
        on_cpu: What runs on a CPU.
        on_gpu: The module of the functions of the same names for a GPU; None where there is none.
    """
    name = on_cpu.__name__
    signature = inspect.signature(on_cpu)
    first = next(iter(signature.parameters))
    served = {"cpu": (on_cpu, tuple(signature.parameters))}
    if on_gpu is not None:
        own = getattr(on_gpu, name)
        served["cuda"] = own, tuple(inspect.signature(own).parameters)

    for one, _ in served.values():
        parameters = inspect.signature(one).parameters.values()
        OPTIONS.update(p.name for p in parameters if p.default is not p.empty)

    @functools.wraps(on_cpu)
    def function(*args: Any, **kwargs: Any) -> Any:
        if not args and first not in kwargs:
            signature.bind(**kwargs)  # Raises.
        device = (args[0] if args else kwargs[first]).device.type
        if device not in ("cpu", "cuda"):
            raise NotImplementedError(
                f"{name}: found tensors on {device!r}; needed: a CPU or a GPU of CUDA. Move them "
                "there, or take another kernel."
            )
        if device not in served:
            raise NotImplementedError(
                f"{name}: found tensors on a GPU; this build of the kernel is for CPUs. Needed: "
                "the build for CUDA, which kernels.get_kernel takes where torch is one for CUDA; "
                "or move the tensors to the CPU."
            )
        run, taken = served[device]
        if unknown := [key for key in kwargs if key not in taken]:
            place = "GPU" if device == "cuda" else "CPU"
            raise TypeError(
                f"{name}: found {', '.join(unknown)}, which the function for a {place} does not "
                "take. Leave it out, or take a newer version of this kernel, whose function does."
            )
        return run(*args, **kwargs)

    return function


def further(layer: str, given: dict[str, Any]) -> dict[str, Any]:
    """Of the further keyword arguments of a layer, those that its function is given.

    A model of transformers hands on what its other layers take too. What an argument is for, the
    signatures say: one that any function of this kernel takes is given to the layer's function,
    which refuses it if it does not take it; one that none takes is left alone.

    Args:
        layer: Its name.
        given: The arguments; None counts as not given.

    Raises:
        TypeError: One is written nearly as an argument of the kernel. Compiled code does not look.
        ValueError: Rows hold several sequences, and `seq_idx` does not say where.
    """
    given = {name: value for name, value in given.items() if value is not None}
    for name in () if torch.compiler.is_compiling() else given.keys() - OPTIONS - _FOR_ATTENTION:
        if near := difflib.get_close_matches(name, OPTIONS, 1, 0.8):
            raise TypeError(
                f"{layer}: found {name}, which no function of this kernel takes. If {near[0]} is "
                "meant, write it so; if it is for another layer, run the model without this one."
            )
    ends = given.get("cu_seq_lens_q")
    if ends is not None and len(ends) > 2 and "seq_idx" not in given:
        raise ValueError(
            f"{layer}: found cu_seq_lens_q of {len(ends) - 1} sequences and no seq_idx. Needed: "
            "seq_idx, int32 (batch, seqlen), to keep them apart; in transformers it comes from "
            "DataCollatorWithFlattening(return_seq_idx=True)."
        )
    return {name: value for name, value in given.items() if name in OPTIONS}
