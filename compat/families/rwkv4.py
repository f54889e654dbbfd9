"""RWKV-4: the state is a list of five tensors, (batch, hidden_size, layers).

On a CPU, where no gradient is recorded, the released wkv is a loop over tokens; there that of
`compat.ops.rwkv4` takes its place. The transformers fork masks padding itself, and is left alone.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compat.families.base import Family
from compat.families.in_chunk import in_chunk, is_in_chunk, replace_released
from compat.installed.behaviour import Draw, compare, verdict
from compat.installed.patches import Held, Patch, arguments, released, wraps
from compat.installed.recurrent_cache import modeling, parameters
from compat.ops import using
from compat.ops.rwkv4 import rwkv_linear_attention


class Rwkv(Family):
    """RWKV-4 of transformers, which ignores attention masks; the chunk loop needs none."""

    def forward(
        self, backbone: PreTrainedModel, input_ids: Tensor, start: int, state: Any
    ) -> tuple[Tensor, Any]:
        """Run one chunk; see `Family.forward`."""
        with PATCHED, in_chunk():
            return self._rows(backbone, input_ids, start, state)

    def _rows(
        self, backbone: PreTrainedModel, input_ids: Tensor, start: int, state: Any
    ) -> tuple[Tensor, Any]:
        if input_ids.shape[1] > 1 or len(input_ids) == 1:
            return super().forward(backbone, input_ids, start, state)
        # As of transformers 5.24.0 the token shift of a single token mixes the rows of a batch.
        results = []
        for index, row in enumerate(input_ids):
            own = None if state is None else [part[index : index + 1] for part in state]
            results.append(super().forward(backbone, row[None], start, own))
        hidden, states = zip(*results, strict=True)
        return torch.cat(hidden), [torch.cat(parts) for parts in zip(*states, strict=True)]


_WKV, _RESCALE = "rwkv_linear_attention", "_rescale_layers"
_rescaling = threading.Lock()
_ARGUMENTS = ("time_decay", "time_first", "key", "value", "state", "return_state")


def _on_ops(wkv: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(wkv)
    def attention(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return wkv(*args, **kwargs)
        given = arguments(wkv, args, kwargs)
        ours = is_in_chunk() or ("state" not in given and not given.get("return_state"))
        known = not given.keys() - set(_ARGUMENTS)
        if ours and known and replace_released(given["key"]) and not differs(wkv):
            return rwkv_linear_attention(**given)
        return wkv(*args, **kwargs)

    return attention


@functools.cache
def differs(wkv: Callable[..., Any]) -> str:
    """Say why a released wkv is not what `compat.ops` computes; empty where it is."""

    def check(wkv: Callable[..., Any]) -> None:
        draw, batch, dim = Draw(), 2, 5
        weights: dict[str, Any] = {"time_decay": draw(dim), "time_first": draw(dim)}
        theirs: Any = None
        ours: Any = None
        for length in (4, 2, 5):
            given = weights | {name: draw(batch, length, dim) for name in ("key", "value")}
            their_outputs, theirs = wkv(**given, state=theirs, return_state=True)
            with using("torch"):
                outputs, ours = rwkv_linear_attention(**given, state=ours, return_state=True)
            compare(f"{length} tokens", their_outputs, outputs)
            numerator, denominator, largest = theirs
            scale = (largest - ours[2]).exp()  # The two may hold states at different exponents.
            compare(f"the state after {length} tokens", numerator * scale, ours[0])
            compare(f"the state after {length} tokens", denominator * scale, ours[1])

    return verdict(check, wkv)


def plan() -> list[Patch]:
    """List the patches of transformers.

    There are none where RWKV masks padding itself, and none of wkv where it takes other arguments.
    """
    module = modeling("rwkv")
    if module is None or _masks_padding(module):
        return []
    wkv, model = _wkv_of(module), module.RwkvModel
    found: list[Patch] = [] if wkv is None else [(module, _WKV, _on_ops(wkv))]
    rescale = getattr(model, _RESCALE, None)
    return found if rescale is None else [*found, (model, _RESCALE, _one_at_a_time(rescale))]


def _one_at_a_time(rescale: Callable[[Any], None]) -> Callable[[Any], None]:
    """Let one thread at a time divide a model's weights, which each first forward does once.

    Two that find them as they were would both divide them, for good.
    """

    @wraps(rescale)
    def locked(self: Any) -> None:
        with _rescaling:
            rescale(self)

    return locked


def on_cpu() -> str | None:
    """Say why `compat.ops` does not do wkv on a CPU; empty where it does.

    Returns:
        The reason; None where the installed transformers has no RWKV, or one that masks padding
        itself.
    """
    module = modeling("rwkv")
    if module is None or _masks_padding(module):
        return None
    wkv = _wkv_of(module)
    reason = "it takes other arguments" if wkv is None else differs(released(wkv))
    return reason and f"not used, as its wkv differs; {reason}"


def _wkv_of(module: Any) -> Any:
    """Return the module's wkv; None where that of `compat.ops` cannot take its place."""
    wkv = getattr(module, _WKV, None)
    if wkv is None or set(_ARGUMENTS) - set(parameters(wkv)) or _masks_padding(module):
        return None
    return wkv


def _masks_padding(module: Any) -> bool:
    layer = getattr(module, "RwkvSelfAttention", None)
    return layer is not None and "attention_mask" in parameters(layer.forward)


PATCHED = Held(plan)
