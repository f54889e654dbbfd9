"""The size of vertical chunks for those who leave it open: the fastest, within a memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from compat.families.lookup import backbone_of
from compat.installed.recurrent_cache import require_support
from compat.stream.rows import check_size_or_auto

FASTEST, ELSEWHERE = 2048, 512
"""On a CPU, where `ci.bench.chunk_sizes` has found it; and elsewhere, where none was measured."""

_SMALLEST = 256
_costs: WeakKeyDictionary[PreTrainedModel, dict[str, int]] = WeakKeyDictionary()


def settled(size: object, device: torch.device) -> int:
    """Return the tokens of a chunk for a size, a number or "auto", on a device.

    Raises:
        TypeError: It is neither.
        ValueError: It is less than 1, or another str.
    """
    size = check_size_or_auto(size)
    if size != "auto":
        return size
    return FASTEST if device.type == "cpu" else ELSEWHERE


def fastest_chunk_size(model: nn.Module, *, memory: int | None = None, batch_size: int = 1) -> int:
    """Return the size of vertical chunks that is fastest on the model's device, within a memory.

    Without `memory` this is the size that "auto" stands for. With it, the memory that a chunk takes
    above the model is measured, once for a model, dtype and device: by the tensors that torch holds
    in two short chunks. A hybrid's keys and values, and a row's state, come on top.

    Example:
        >>> model.vertical_chunk_size = compat.fastest_chunk_size(model, memory=50_000_000)

    Args:
        model: A SentenceTransformer, or a transformers model of a supported family.
        memory: The most bytes that a chunk may take; None for no limit.
        batch_size: Rows that are read at the same time.

    Returns:
        A power of two, at least 256.

    Raises:
        UnsupportedModelError: The model cannot be continued exactly from a state.
        ValueError: A chunk of 256 tokens takes more than that.
    """
    inner: Any = getattr(model, "transformers_model", None) or model
    backbone, family = backbone_of(inner)
    weight = next(backbone.parameters())
    size = settled("auto", weight.device)
    if memory is None:
        return size
    require_support()
    key = f"{weight.dtype} {weight.device}"
    known = _costs.setdefault(backbone, {})
    if key not in known:
        ids = torch.zeros(1, 2 * _SMALLEST, dtype=torch.int64, device=weight.device)
        peaks = []
        for tokens in (_SMALLEST, 2 * _SMALLEST):
            with torch.no_grad(), _peak() as peak:
                family.forward(backbone, ids[:, :tokens], 0, None)
            peaks.append(peak[0])
        known[key] = -(-(peaks[1] - peaks[0]) // _SMALLEST)
    row = known[key] * batch_size
    while size > _SMALLEST and size * row > memory:
        size //= 2
    if size * row > memory:
        raise ValueError(
            f"A chunk of {size} tokens of {batch_size} rows takes {size * row:,} bytes; memory "
            f"must be at least that, found {memory:,}. Take a smaller batch_size."
        )
    return size


@contextmanager
def _peak() -> Iterator[list[int]]:
    """Count the most bytes of tensors that are held at the same time in a `with` block."""
    found = [0]
    held: dict[int, tuple[StorageWeakRef, int]] = {}

    class Watch(TorchDispatchMode):  # type: ignore[misc, unused-ignore]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            for made in tree_leaves(result):
                if isinstance(made, Tensor):
                    storage = made.untyped_storage()
                    held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            for key in [key for key, (reference, _) in held.items() if reference.expired()]:
                del held[key]
            found[0] = max(found[0], sum(size for _, size in held.values()))
            return result

    with Watch():  # type: ignore[no-untyped-call]
        yield found
