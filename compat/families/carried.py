"""States as tensors that autograd can follow: what a chunk takes them from, and leaves them in.

Released models write a chunk's states into the tensors of the chunk before. Autograd needs those,
so here a state is assigned, never written into.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from compat.errors import UnsupportedVersionError
from compat.families.base import Family
from compat.families.fla import FlaRwkv
from compat.families.lookup import FAMILIES
from compat.families.xlstm import XLstm


class Carrier(Protocol):
    """A way in which a family's state becomes tensors, (batch, ...) each, and is made of them."""

    def state(
        self,
        backbone: PreTrainedModel,
        family: Family,
        input_ids: Tensor,
        tensors: Sequence[Tensor] | None,
    ) -> Any:
        """Make the state to begin a chunk from; None stands for that before the first token."""

    def tensors(self, state: Any) -> list[Tensor]:
        """Return the tensors of the state that a chunk has left."""


@functools.cache
def _layer_classes() -> tuple[Any, Any]:
    """Return the released class of a recurrent layer's cache, and that whose states are replaced.

    They are not made at import: where a release has no such class, only training in chunks is lost.
    """
    try:
        from transformers.cache_utils import LinearAttentionLayer
    except ImportError as error:
        raise _no_assignment(f"no LinearAttentionLayer in {error.name}") from error

    class Assigned(LinearAttentionLayer):
        """A layer whose states are replaced by new tensors."""

        def update_conv_state(
            self,
            conv_states: Tensor,
            state_idx: int = 0,
            conv_kernel_size: int | None = None,
            **kwargs: Any,
        ) -> Tensor:
            """Take in inputs, (batch, dim, seqlen), and return them after the state."""
            width = conv_kernel_size or conv_states.shape[-1]
            before = self.conv_states[state_idx]
            if before is None:
                inputs = pad(conv_states, (max(width - conv_states.shape[-1], 0), 0))
            else:
                inputs = torch.cat([before, conv_states], dim=-1)
            self.assign(state_idx, conv=inputs[..., -width:])
            return inputs

        def update_recurrent_state(
            self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any
        ) -> Tensor:
            """Take over a recurrent state."""
            self.assign(state_idx, recurrent=recurrent_states)
            return recurrent_states

        def assign(
            self, state_idx: int, conv: Tensor | None = None, recurrent: Tensor | None = None
        ) -> None:
            """Put states where the released layer has them."""
            if conv is not None:
                self.conv_states[state_idx] = conv
                self.is_conv_states_initialized[state_idx] = True
                # They are typed as None.
                self.__dict__.update(device=conv.device, dtype=conv.dtype)
            if recurrent is not None:
                self.recurrent_states[state_idx] = recurrent
                self.is_recurrent_states_initialized[state_idx] = True
            self.has_previous_state[state_idx] = True

    return LinearAttentionLayer, Assigned


def _no_assignment(found: str) -> UnsupportedVersionError:
    return UnsupportedVersionError(
        found, "layers whose states can be assigned", 'pip install "transformers==5.24"'
    )


class _InCache:
    """States in transformers' cache of recurrent layers."""

    def state(
        self,
        backbone: PreTrainedModel,
        family: Family,
        input_ids: Tensor,
        tensors: Sequence[Tensor] | None,
    ) -> Any:
        cache: Any = DynamicCache(config=backbone.config)
        given = iter(tensors or ())
        released, assigned = _layer_classes()
        for layer in cache.layers:
            if type(layer) is not released or not isinstance(layer.conv_states, dict):
                raise _no_assignment(f"a cache layer of the class {type(layer).__name__}")
            layer.__class__ = assigned
            if tensors is not None:
                layer.assign(0, conv=next(given), recurrent=next(given))
        return cache

    def tensors(self, state: Any) -> list[Tensor]:
        parts = [(layer.conv_states[0], layer.recurrent_states[0]) for layer in state.layers]
        return [part for pair in parts for part in pair]


class _Columns:
    """One of RWKV's five states, (batch, dim, layers), of which layers are read and assigned."""

    def __init__(self, state: Tensor) -> None:
        self.layers = list(state.unbind(2))

    def __getitem__(self, key: tuple[slice, slice, int]) -> Tensor:
        return self.layers[key[2]]

    def __setitem__(self, key: tuple[slice, slice, int], value: Tensor) -> None:
        self.layers[key[2]] = value


class _InColumns:
    """The states of RWKV-4."""

    def state(
        self,
        backbone: PreTrainedModel,
        family: Family,
        input_ids: Tensor,
        tensors: Sequence[Tensor] | None,
    ) -> Any:
        if tensors is None:
            config: Any = backbone.config
            sizes = [config.hidden_size] * 2 + [config.attention_hidden_size] * 3
            layers, dtype = config.num_hidden_layers, backbone.dtype
            wide = torch.promote_types(dtype, torch.float32)
            tensors = [
                torch.zeros(
                    len(input_ids),
                    size,
                    layers,
                    dtype=dtype if place < 2 else wide,
                    device=input_ids.device,
                )
                for place, size in enumerate(sizes)
            ]
            tensors[4].sub_(1e30)
        return [_Columns(part) for part in tensors]

    def tensors(self, state: Any) -> list[Tensor]:
        return [torch.stack(part.layers, 2) for part in state]


class _Slot:
    """One of the states of an xLSTM layer, as the model writes it."""

    def __init__(self, cells: list[Tensor], place: int) -> None:
        self._cells, self._place = cells, place

    def copy_(self, state: Tensor) -> None:
        """Take over a state, which the model means to write into the former one."""
        self._cells[self._place] = state


class _Cells:
    """The states of an xLSTM layer: unpacked they are tensors, by index they are written to."""

    def __init__(self, cells: Sequence[Tensor]) -> None:
        self.cells = list(cells)

    def __len__(self) -> int:
        return len(self.cells)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.cells)

    def __getitem__(self, place: int) -> _Slot:
        return _Slot(self.cells, place)


class _InCells:
    """The states of xLSTM."""

    def state(
        self,
        backbone: PreTrainedModel,
        family: Family,
        input_ids: Tensor,
        tensors: Sequence[Tensor] | None,
    ) -> Any:
        assert isinstance(family, XLstm)
        cache = family.new_cache(backbone, input_ids)
        wide = torch.promote_types(backbone.dtype, torch.float32)
        given = None if tensors is None else iter(tensors)
        cache.rnn_state = {
            layer: _Cells([part.to(wide) if given is None else next(given) for part in parts])
            for layer, parts in cache.rnn_state.items()
        }
        return cache

    def tensors(self, state: Any) -> list[Tensor]:
        return [part for cells in state.rnn_state.values() for part in cells]


class _InFla:
    """The states of flash-linear-attention's RWKV, which takes a dict of each layer, too."""

    _parts = ("recurrent_state", "conv_state", "ffn_state")

    def state(
        self,
        backbone: PreTrainedModel,
        family: Family,
        input_ids: Tensor,
        tensors: Sequence[Tensor] | None,
    ) -> Any:
        if tensors is None:
            return None
        given = iter(tensors)
        layers = zip(*[given] * len(self._parts), strict=True)
        return tuple(
            {"attn_state": None} | dict(zip(self._parts, parts, strict=True)) for parts in layers
        )

    def tensors(self, state: Any) -> list[Tensor]:
        return [layer.state[name] for layer in state.layers for name in self._parts]


CARRIERS: dict[str, Carrier] = {
    "falcon_mamba": _InCache(),
    "mamba": _InCache(),
    "mamba2": _InCache(),
    "rwkv": _InColumns(),
    "xlstm": _InCells(),
}
"""The types of transformers whose chunks can carry gradients: how their states become tensors."""

_OF_FLA = _InFla()


def carrier_of(backbone: PreTrainedModel, family: Family) -> Carrier | None:
    """Return how a model's state becomes tensors; None where its chunks carry no gradients."""
    if isinstance(family, FlaRwkv):
        return _OF_FLA
    kind = str(getattr(backbone.config, "model_type", ""))
    return CARRIERS.get(kind) if FAMILIES.get(kind) is family else None
