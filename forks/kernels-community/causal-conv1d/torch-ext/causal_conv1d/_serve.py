"""What serves a call: by device; and what of a layer's further inputs its function is given."""

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
    served = {"cpu": (on_cpu, tuple(signature.parameters))}
    if on_gpu is not None:
        own = getattr(on_gpu, name)
        served["cuda"] = own, tuple(inspect.signature(own).parameters)

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


# What every model of transformers takes, and hands on to all of its layers: for attention, losses
# and outputs. What speaks of sequences for a recurrent layer is `seq_idx`.
_FOR_OTHERS = {"num_items_in_batch", "output_hidden_states", "output_attentions"}
_FOR_OTHERS |= {"output_router_logits", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q"}
_FOR_OTHERS |= {"max_length_k", "position_ids", "is_causal", "shift_labels", "token_type_ids"}


def further(layer: str, given: dict[str, Any]) -> dict[str, Any]:
    """Of the further keyword arguments of a layer, those that its function is given.

    They are all that a model of transformers does not hand on to any layer. The function itself
    knows which of them it takes, and refuses the others.

    Args:
        layer: Its name.
        given: The arguments; None counts as not given.

    Raises:
        ValueError: Rows hold several sequences, and `seq_idx` does not say where.
    """
    given = {name: value for name, value in given.items() if value is not None}
    ends = given.get("cu_seq_lens_q")
    if ends is not None and len(ends) > 2 and "seq_idx" not in given:
        raise ValueError(
            f"{layer}: found cu_seq_lens_q of {len(ends) - 1} sequences and no seq_idx. Needed: "
            "seq_idx, int32 (batch, seqlen), to keep them apart; in transformers it comes from "
            "DataCollatorWithFlattening(return_seq_idx=True)."
        )
    return {name: value for name, value in given.items() if name not in _FOR_OTHERS}
