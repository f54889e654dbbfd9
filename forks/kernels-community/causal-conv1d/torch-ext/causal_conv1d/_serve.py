"""What serves a call: by device; and what of a layer's further inputs it takes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any


def by_device(on_cpu: Callable[..., Any], on_gpu: ModuleType | None) -> Callable[..., Any]:
    """A function that runs where its first argument, a tensor, is.

    Args:
        on_cpu: What runs on a CPU.
        on_gpu: The module of the functions of the same names for a GPU; None where there is none.
    """
    name = on_cpu.__name__
    signature = inspect.signature(on_cpu)
    first = next(iter(signature.parameters))
    taken = () if on_gpu is None else tuple(inspect.signature(getattr(on_gpu, name)).parameters)

    @functools.wraps(on_cpu)
    def function(*args: Any, **kwargs: Any) -> Any:
        if not args and first not in kwargs:
            signature.bind(**kwargs)  # Raises.
        device = (args[0] if args else kwargs[first]).device.type
        if device == "cpu":
            return on_cpu(*args, **kwargs)
        if device != "cuda":
            raise NotImplementedError(
                f"{name}: found tensors on {device!r}; needed: a CPU or a GPU of CUDA. Move them "
                "there, or take another kernel."
            )
        if on_gpu is None:
            raise NotImplementedError(
                f"{name}: found tensors on a GPU; this build of the kernel is for CPUs. Needed: "
                "the build for CUDA, which kernels.get_kernel takes where torch is one for CUDA; "
                "or move the tensors to the CPU."
            )
        if unknown := [key for key in kwargs if key not in taken]:
            raise TypeError(
                f"{name}: found {', '.join(unknown)}, which the function for a GPU does not take. "
                "Leave it out, or take a newer version of this kernel, whose function does."
            )
        return getattr(on_gpu, name)(*args, **kwargs)

    return function


def further(layer: str, given: dict[str, Any], *names: str) -> dict[str, Any]:
    """Of the further keyword arguments of a layer, those that it takes.

    A model of transformers hands on what its attention, losses and outputs take too. That is left
    alone; but a name that speaks of states or sequences is meant for a recurrent layer.

    Args:
        layer: Its name.
        given: The arguments; None counts as not given.
        names: What the layer takes of them.

    Raises:
        TypeError: One is meant for a recurrent layer, and this one does not take it.
        ValueError: Rows hold several sequences, and `seq_idx` does not say where.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if unknown := sorted(name for name in given if name not in names and _is_meant(name)):
        raise TypeError(
            f"{layer}: found {', '.join(unknown)}; it takes {', '.join(names) or 'nothing more'}. "
            "Leave it out, or run the model without this layer."
        )
    ends = given.get("cu_seq_lens_q")
    if ends is not None and len(ends) > 2 and "seq_idx" not in given:
        raise ValueError(
            f"{layer}: found cu_seq_lens_q of {len(ends) - 1} sequences and no seq_idx. Needed: "
            "seq_idx, int32 (batch, seqlen), to keep them apart; in transformers it comes from "
            "DataCollatorWithFlattening(return_seq_idx=True)."
        )
    return {name: given[name] for name in names if name in given}


def _is_meant(name: str) -> bool:
    """Whether an argument speaks of states or sequences, and is not for attention or outputs."""
    if name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        return False
    return "state" in name.replace("hidden_state", "") or "seq" in name
