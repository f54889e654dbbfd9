"""flash-linear-attention: models of its own, some under names that transformers uses for others.

As of fla 0.5.2 and 0.6.0 its recurrent models continue from `past_key_values`, and keep the
recurrent state in float32. Their cache cannot select rows of a batch, so `Fla` does that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from compat.errors import UnsupportedModelError
from compat.families import fla_rwkv
from compat.families.base import Family
from compat.families.in_chunk import in_chunk


class Fla(Family):
    """A recurrent model of `fla.models`."""

    def select_rows(self, state: Any, rows: Tensor) -> Any:
        """Return the state of some rows; rows is (n,) int64."""
        for layer in state.layers:
            layer.state = _select(layer.state, rows)
        return state


class FlaRwkv(Fla):
    """RWKV-7 and RWKV-6, which run on a CPU without Triton; see `fla_rwkv`."""

    def forward(
        self, backbone: PreTrainedModel, input_ids: Tensor, start: int, state: Any
    ) -> tuple[Tensor, Any]:
        """Run one chunk; see `Family.forward`."""
        return fla_rwkv.forward(super().forward, backbone, input_ids, start, state)

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Hold the functions that fla's own autograd functions call in their backward."""
        with fla_rwkv.PATCHED, in_chunk():
            yield


# Model types that were measured to continue exactly from their state.
_CARRIED = [
    "comba",
    "delta_net",
    "gated_deltanet",
    "gated_deltaproduct",
    "gla",
    "gsa",
    "hgrn",
    "hgrn2",
    "kda",
    "linear_attn",
    "retnet",
]
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(_CARRIED, Fla(grows=False)),
    **dict.fromkeys(["rwkv6", "rwkv7"], FlaRwkv(grows=False)),
}

_ELSE = "encode it without vertical_chunk_size"
# Recurrent model types that do not continue exactly: the reason, and the remedy.
REFUSED = {
    "mamba": (
        "takes one new token at a time from its cache",
        "load the same weights with transformers.MambaModel.from_pretrained(...)",
    ),
    "mamba2": (
        "takes one new token at a time from its cache",
        "load the same weights with transformers.Mamba2Model.from_pretrained(..., "
        "rescale_prenorm_residual=False)",  # Else transformers 5.23.0 rescales them.
    ),
    "lightnet": ("normalises a chunk from its cache as if it were one token", _ELSE),
    "mom": ("gives other hidden states from its cache than in one pass", _ELSE),
}


def is_fla(model: object) -> bool:
    """Return whether a model's class comes from fla, without importing the package."""
    return any(cls.__module__.startswith("fla.") for cls in type(model).__mro__)


def family_of(backbone: Any) -> Family:
    """Return the way in which a model of fla carries its state.

    Raises:
        UnsupportedModelError: The model is not known to continue exactly from a state.
    """
    model_type = backbone.config.model_type
    found = f"{type(backbone).__name__} of flash-linear-attention"
    if model_type not in FAMILIES:
        reason, remedy = REFUSED.get(model_type, ("is not known to continue from a state", _ELSE))
        raise UnsupportedModelError(
            f"{found}, which {reason}",
            "a model of fla that continues exactly: " + ", ".join(sorted(FAMILIES)),
            remedy,
        )
    if getattr(backbone.config, "attn", None):
        raise UnsupportedModelError(
            f"{found} with attention layers",
            "one of recurrent layers alone (config.attn is None)",
            _ELSE,
        )
    return FAMILIES[model_type]


def _select(part: Any, rows: Tensor) -> Any:
    if isinstance(part, Tensor):
        return part[rows]
    if isinstance(part, dict):
        return {name: _select(value, rows) for name, value in part.items()}
    if isinstance(part, tuple | list):
        return type(part)(_select(value, rows) for value in part)
    return part
