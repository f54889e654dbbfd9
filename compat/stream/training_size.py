"""The size of chunks in training, and how many of their borders are kept.

A chunk's activations take memory by its tokens, a border that is kept by the model's state: the
larger the chunks, the more of the one and the less of the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from compat.families.base import Family
from compat.families.gradients import run
from compat.installed.behaviour import same_random_numbers

# Up to as many chunks, the border of each is kept.
BORDERS = 64

_SMALLEST = 256
_costs: WeakKeyDictionary[PreTrainedModel, dict[object, tuple[int, int]]] = WeakKeyDictionary()


def between(chunks: int) -> int:
    """Return how many chunks lie between two borders that are kept.

    Beyond 64 chunks that is their square root: twice as many borders are held at once, those that
    are kept and those between two of them, and each chunk is run once more.
    """
    return 1 if chunks <= BORDERS else math.isqrt(chunks - 1) + 1


def leanest(backbone: PreTrainedModel, family: Family, lengths: Tensor) -> int:
    """Return the size of chunks that takes the least memory, of the powers of two from 256 on.

    Args:
        backbone: The model without its head.
        family: How its state is carried.
        lengths: (batch,) int64, the number of tokens of each row.
    """
    token, state = costs(backbone, family)
    counts = lengths.tolist()
    sizes = [_SMALLEST]
    while sizes[-1] < max(counts):
        sizes.append(2 * sizes[-1])
    return min(sizes, key=lambda size: memory(token, state, counts, size))


def memory(token: int, state: int, lengths: Sequence[int], size: int) -> int:
    """Return the bytes that one step of training holds beside the model: chunk and borders.

    Args:
        token: Bytes of a token's activations.
        state: Bytes of a row's state.
        lengths: Tokens of each row.
        size: Of the chunks.
    """
    chunks = sum(-(-length // size) for length in lengths)
    stride = between(chunks)
    borders = -(-chunks // stride) + (stride if stride > 1 else 0)
    return token * min(size, max(lengths)) + state * borders


def costs(backbone: PreTrainedModel, family: Family) -> tuple[int, int]:
    """Return the bytes of a token's activations and of a row's state.

    They are counted once for a model, as it is now: by what autograd saves in two runs, of 256 and
    of 512 tokens.
    """
    kind = backbone.device.type
    way = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), backbone.training
    key = way, backbone.dtype, sum(p.requires_grad for p in backbone.parameters())
    known = _costs.setdefault(backbone, {})
    if key not in known:
        with same_random_numbers(backbone.device), torch.enable_grad():
            (small, state), (large, _) = (
                _saved(backbone, family, tokens) for tokens in (_SMALLEST, 2 * _SMALLEST)
            )
        known[key] = (large - small) // _SMALLEST, state
    return known[key]


def _saved(backbone: PreTrainedModel, family: Family, tokens: int) -> tuple[int, int]:
    """Return the bytes that autograd saves in a run, and those of the state after it."""
    kept: dict[int, Tensor] = {}

    def pack(part: Tensor) -> Tensor:
        kept[part.untyped_storage().data_ptr()] = part  # Held, so that no other gets its place.
        return part

    ids = torch.zeros(1, tokens, dtype=torch.int64, device=backbone.device)
    with saved_tensors_hooks(pack, cast(Any, lambda part: part)):
        _, state = run(backbone, family, ids, 0, None)
    size = sum(part.untyped_storage().nbytes() for part in kept.values())
    return size, sum(part.numel() * part.element_size() for part in state)
