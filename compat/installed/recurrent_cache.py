"""Find out what the installed transformers can do; nothing in it is patched."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
import transformers

from compat.errors import UnsupportedVersionError


@cache
def probe() -> str | None:
    """Say why no model of the installed transformers can continue from a state; None if some can.

    Only the cache, which all of them share, is checked here. Each family checks by itself whether
    it continues exactly.
    """
    try:
        from transformers.cache_utils import Cache, LinearAttentionLayer
    except ImportError as error:
        return f"it has no cache for recurrent layers (an import from {error.name} failed)"
    if not hasattr(Cache, "reorder_cache") or not hasattr(LinearAttentionLayer, "reorder_cache"):
        return "the rows of its caches cannot be selected (no reorder_cache)"
    layer, inputs = LinearAttentionLayer(), torch.arange(6.0).view(1, 1, 6)
    layer.update_conv_state(inputs[..., :4].clone())
    if not torch.equal(layer.update_conv_state(inputs[..., 4:])[..., -6:], inputs):
        return "the convolution's state is not put before a chunk of several tokens"
    return None


STATES = ("cache", "past_key_values", "cache_params", "state")
"""The names under which released models take and give their state; the first since 5.24."""


def innermost(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function under all decorators, also where `kernels` made an object of it.

    A decorator that renames arguments, or takes any, does not show which are taken in the end.
    """
    while (inner := beneath(function)) is not None:
        function = inner
    return getattr(function, "__func__", function)


def beneath(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return the function that a decorator was given; None where there is no such function.

    Some decorators do not record it as `functools.wraps` does; then it is the one function that
    they hold. A decorator that does not hand all of its arguments on does not count.
    """
    function = getattr(type(function), "forward", function)  # This may be an object of `kernels`.
    wrapped: Callable[..., Any] | None = getattr(function, "__wrapped__", None)
    code = getattr(function, "__code__", None)
    takes_any = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
    if wrapped is not None or code is None or code.co_flags & takes_any != takes_any:
        return wrapped
    cells = getattr(function, "__closure__", None) or ()
    held = [cell.cell_contents for cell in cells if inspect.isfunction(cell.cell_contents)]
    return held[0] if len(held) == 1 else None


def parameters(function: Callable[..., Any]) -> Sequence[str]:
    """Return the names of a released function's arguments, in order, under all decorators."""
    return _parameters(innermost(function))


@cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(function).parameters.values()
    return tuple(parameter.name for parameter in found if parameter.kind not in kinds)


def forward_of(model: Any) -> Callable[..., Any]:
    """Return the forward of a model that names the argument for its state.

    That is the instance's own forward, unless it is only a wrapper; otherwise the first one in its
    classes, as a subclass may only hand its `**kwargs` on.
    """
    own: Callable[..., Any] | None = vars(model).get("forward")
    if own is not None and parameters(own):
        return own
    forwards: list[Callable[..., Any]] = [
        vars(cls)["forward"] for cls in type(model).__mro__ if "forward" in vars(cls)
    ]
    return next((f for f in forwards if set(STATES) & set(parameters(f))), forwards[0])


def state_argument(forward: Callable[..., Any]) -> str:
    """Return the name under which a released forward takes its state.

    Args:
        forward: The forward of a model or of a layer.

    Raises:
        UnsupportedVersionError: It takes none of the known names. Any other would vanish in its
            `**kwargs`, and the model would begin anew at each chunk.
    """
    return _one_of(STATES, parameters(forward), f"{innermost(forward).__qualname__} takes")


def state_of(output: Mapping[str, Any]) -> Any:
    """Return the state in the output of a released model.

    Raises:
        UnsupportedVersionError: The output has none under a known name.
    """
    return output[_one_of(STATES, list(output), f"{type(output).__name__} has")]


def _one_of(names: Sequence[str], found: Sequence[str], what: str) -> str:
    for name in names:
        if name in found:
            return name
    raise UnsupportedVersionError(
        f"transformers {transformers.__version__}: {what} {', '.join(found)}, and no state among "
        "them",
        f"a state that is named {', '.join(names[:-1])} or {names[-1]}",
        'pip install "transformers>=5.15,<=5.24"',
    )


def modeling(model_type: str) -> Any:
    """Return the module of a model type's classes in transformers; None where there is none."""
    try:
        return import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    except ModuleNotFoundError:
        return None


def require_support() -> None:
    """Raise unless the installed transformers carries recurrent state.

    Raises:
        UnsupportedVersionError: It does not; the message says what the probe found.
    """
    if reason := probe():
        raise UnsupportedVersionError(
            f"transformers {transformers.__version__}: {reason}",
            "a transformers whose models continue exactly from their cache",
            'pip install --upgrade "transformers>=5.15"',
        )
