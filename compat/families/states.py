"""States as trees of tensors: copied, named, and put back by name.

A released state is an object of its library: a cache with a list of layers, a dict or a list of
tensors, or compat's own dataclass around one. All are walked in one way, attribute by attribute.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from compat.errors import VerticalChunkingError

Value = bool | int | float | str | None

_VALUES = (bool, int, float, str, types.NoneType)
# Parts that describe a state and are no part of it: copies share them.
_SHARED = (
    PretrainedConfig,
    torch.dtype,
    torch.device,
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
)


def mapped(state: Any, function: Callable[[str, Any], Any]) -> Any:
    """Build a state anew, with a function of each of its tensors and plain values.

    Args:
        state: A state that `Family.forward` returned, or any tree of objects, dicts, lists, tuples.
        function: Is called with the name of a leaf, such as `layers.0.conv_states`, and the leaf:
            a tensor, a bool, an int, a float, a str or None. It returns the leaf's new value.

    Returns:
        A state whose containers and objects are new. A part that is in two places is in both again.

    Raises:
        VerticalChunkingError: Something in the state is of another kind.
    """
    # The parts that were met, which must live as long as their ids are in use, and what became
    # of them.
    made: dict[int, tuple[Any, Any]] = {}

    def build(part: Any, name: str) -> Any:
        if isinstance(part, _SHARED):
            return part
        if isinstance(part, _VALUES):
            return function(name, part)
        if id(part) not in made:
            made[id(part)] = part, None
            made[id(part)] = part, new(part, name)
        return made[id(part)][1]

    def new(part: Any, name: str) -> Any:
        before = f"{name}." if name else ""
        if isinstance(part, Tensor):
            return function(name, part)
        if isinstance(part, list | tuple):
            parts = [build(value, f"{before}{at}") for at, value in enumerate(part)]
            return type(part)(*parts) if hasattr(part, "_fields") else type(part)(parts)
        if isinstance(part, dict):
            fresh = copy.copy(part)
            for key, value in part.items():
                fresh[key] = build(value, f"{before}{key}")
            return fresh
        if isinstance(part, torch.nn.Module) or not hasattr(part, "__dict__"):
            raise VerticalChunkingError(
                f"a state whose {name or 'root'} is a {type(part).__name__}",
                "a state of tensors and plain values in objects, dicts, lists and tuples",
                "use encode, which does not copy states",
            )
        fresh = copy.copy(part)
        for key, value in vars(part).items():
            vars(fresh)[key] = build(value, f"{before}{key}")
        return fresh

    return build(state, "")


def copied(state: Any) -> Any:
    """Copy a state, so that the model can go on from either; None stays None.

    A hybrid's keys and values are copied with it: the copy takes as much memory as they do.
    """
    return mapped(state, lambda _, leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)


def leaves(state: Any) -> tuple[dict[str, Tensor], dict[str, Value]]:
    """Return a state's tensors and its plain values, each by name; nothing is copied."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Value] = {}

    def note(name: str, leaf: Any) -> Any:
        (tensors if isinstance(leaf, Tensor) else values)[name] = leaf
        return leaf

    mapped(state, note)
    return tensors, values


def restored(template: Any, tensors: Mapping[str, Tensor], values: Mapping[str, Value]) -> Any:
    """Build a state of tensors and values, in the shape of a template.

    Args:
        template: A state of the same model, after any tokens.
        tensors: By name, as `leaves` returned them; they are moved to the template's device.
        values: By name.

    Raises:
        VerticalChunkingError: The names are not those of the template.
    """
    own, others = leaves(template)
    if differing := sorted((own.keys() | others.keys()) ^ (tensors.keys() | values.keys())):
        raise VerticalChunkingError(
            f"a saved state that has other parts than the model's own: {', '.join(differing[:4])}",
            "the parts that this model's state has",
            "load it with the library versions that it was saved with, or read the text again",
        )
    device = next((tensor.device for tensor in own.values()), None)

    def put(name: str, _: Any) -> Any:
        return tensors[name].to(device) if name in tensors else values[name]

    return mapped(template, put)
