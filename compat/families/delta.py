"""The gated delta rule: Qwen3-Next and its kin, with a gate of each head, and Kimi Linear's.

On a CPU the released mixers call a function in torch, in the place of a kernel of
flash-linear-attention. Where no gradient is recorded, `compat.ops.delta` takes its place in a
chunk, and in a pass without a cache, if it gives the same results as the released function on tiny
inputs. So does `compat.ops.convolution` in a chunk, where it is native: it lays the channels of a
token together, as the rule reads them. A single token that goes on from a state, and `generate`,
run on the released code.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compat.families.in_chunk import OnOps, is_in_chunk, replace_released
from compat.installed.behaviour import Draw, compare, verdict
from compat.installed.patches import Held, Patch, arguments, released, wraps
from compat.installed.recurrent_cache import modeling, parameters
from compat.ops import backend, using
from compat.ops.convolution import causal_conv1d
from compat.ops.delta import gated_delta_rule

_OF_HEADS, _OF_CHANNELS = "torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention"
_CONVOLUTION = "causal_conv1d_fn"
# The model types, and the function that their mixers call for a chunk of tokens.
RULES = {
    "bailing_hybrid": _OF_CHANNELS,
    "glm5_next_text": _OF_CHANNELS,
    "kimi_linear": _OF_CHANNELS,
    "lara_mini": _OF_HEADS,
    "olmo_hybrid": _OF_HEADS,
    "qwen3_5_moe_text": _OF_HEADS,
    "qwen3_5_text": _OF_HEADS,
    "qwen3_next": _OF_HEADS,
    "qwen4_exp_text": _OF_HEADS,
}
_FIRST = ("query", "key", "value")
_NEEDED = {*_FIRST, "g", "beta"}
_STATE = {"initial_state", "output_final_state"}
# `chunk_size` is the length of the released function's own pieces.
_KNOWN = _NEEDED | _STATE | {"use_qk_l2norm_in_kernel", "chunk_size"}
_OF_CONVOLUTION = {"hidden_states", "weight", "bias", "activation"}
# Models hand these on to both functions, which do not use them.
_UNUSED = {"cache_position", "input_ids", "position_embeddings", "position_ids", "use_cache"}


@functools.cache  # One object for each function, as torch.compile watches it.
def _on_ops(rule: Callable[..., Any], by_channel: bool) -> Callable[..., Any]:
    @wraps(rule)
    def chunk_rule(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return rule(*args, **kwargs)
        given = arguments(rule, args, kwargs)
        wants_state = given.get("output_final_state", False)
        ours = is_in_chunk() or not (wants_state or "initial_state" in given)
        known = given.keys() >= _NEEDED and not given.keys() - _KNOWN - _UNUSED
        if not ours or not known or not replace_released(given["query"]):
            return rule(*args, **kwargs)
        if given["g"].ndim != 3 + by_channel or differs(rule, by_channel):
            return rule(*args, **kwargs)
        with torch.autocast(given["query"].device.type, enabled=False):
            out, state = _ours(given)
        return out, state if wants_state else None

    return chunk_rule


def _ours(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Run the op on the arguments of a released function."""
    return gated_delta_rule(
        **{name: given[name] for name in _NEEDED},
        initial_state=given.get("initial_state"),
        use_qk_l2norm=given.get("use_qk_l2norm_in_kernel", False),
    )


@functools.cache
def differs(rule: Callable[..., Any], by_channel: bool) -> str:
    """Say why a released rule is not what `compat.ops` computes; empty where it is.

    Args:
        rule: The released function.
        by_channel: Whether it has a gate for each channel of the keys, or one for a head.
    """

    def check(rule: Callable[..., Any]) -> None:
        draw, batch, heads, key_dim, value_dim = Draw(), 2, 4, 3, 5
        key_heads = heads if by_channel else 2
        state: Any = None
        for length in (4, 1, 67):
            given: dict[str, Any] = {
                "query": draw(batch, length, key_heads, key_dim),
                "key": draw(batch, length, key_heads, key_dim),
                "value": draw(batch, length, heads, value_dim),
                "g": -draw(batch, length, heads, *[key_dim] * by_channel).exp() / 4,
                "beta": draw(batch, length, heads).sigmoid(),
                "initial_state": state,
                "output_final_state": True,
                "use_qk_l2norm_in_kernel": True,
            }
            # By position, as the mixers do: a kernel has other names for these.
            first = [given[name] for name in _FIRST]
            others = {name: value for name, value in given.items() if name not in _FIRST}
            their_outputs, theirs = rule(*first, **others)
            with using("torch"):
                outputs, state = _ours(given)
            compare(f"{length} tokens", their_outputs, outputs)
            compare(f"the state after {length} tokens", theirs, state)

    return verdict(check, rule)


@functools.cache
def _convolution_on_ops(convolution: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(convolution)
    def convolve(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not is_in_chunk() or backend() != "native":
            return convolution(*args, **kwargs)
        given = {
            name: value
            for name, value in arguments(convolution, args, kwargs).items()
            if name not in _UNUSED
        }
        activation = given.pop("activation", None)
        known = {"hidden_states", "weight"} <= given.keys() <= _OF_CONVOLUTION
        if not known or activation not in ("silu", "swish"):
            return convolution(*args, **kwargs)
        if not replace_released(given["hidden_states"]) or convolution_differs(convolution):
            return convolution(*args, **kwargs)
        return causal_conv1d(given["hidden_states"], given["weight"], given.get("bias"))

    return convolve


@functools.cache
def convolution_differs(convolution: Callable[..., Any]) -> str:
    """Say why a released convolution is not what `compat.ops` computes; empty where it is."""

    def check(convolution: Callable[..., Any]) -> None:
        draw, channels = Draw(), 5
        for width, bias in ((4, None), (2, draw(channels))):
            x, weight = draw(2, channels, 9), draw(channels, width)
            theirs = convolution(x, weight, bias, activation="silu")
            with using("torch"):
                compare(f"a width of {width}", theirs, causal_conv1d(x, weight, bias))

    return verdict(check, convolution)


def _function(model_type: str, name: str, takes: set[str]) -> Any:
    """Return a function of the module of one of `RULES`; None for another, or a kernel's object.

    The package `kernels` makes an object of the function, so that a user can choose a kernel.
    """
    found = getattr(_module_of(model_type), name, None)
    return found if inspect.isfunction(found) and set(parameters(found)) >= takes else None


def _module_of(model_type: str) -> Any:
    return modeling(model_type.removesuffix("_text"))


def plan(model_type: str) -> list[Patch]:
    """List the patches of transformers for one of `RULES`; none where its rule differs."""
    module, name = _module_of(model_type), RULES[model_type]
    rule = _function(model_type, name, _KNOWN)
    if rule is None:
        return []
    patches: list[Patch] = [(module, name, _on_ops(rule, name == _OF_CHANNELS))]
    convolution = _function(model_type, _CONVOLUTION, _OF_CONVOLUTION)
    if convolution is not None:
        patches.append((module, _CONVOLUTION, _convolution_on_ops(convolution)))
    return patches


def on_cpu(model_type: str) -> str | None:
    """Say why `compat.ops` does not do the rule of one of `RULES` on a CPU, or only the rule.

    Returns:
        The reason; empty where it does; None where the installed transformers has no such model.
    """
    if _module_of(model_type) is None:
        return None
    name = RULES[model_type]
    rule = _function(model_type, name, _KNOWN)
    if rule is None:
        return f"not used, as there is no function {name} of the known arguments"
    if reason := differs(released(rule), name == _OF_CHANNELS):
        return f"not used, as its rule differs; {reason}"
    convolution = _function(model_type, _CONVOLUTION, _OF_CONVOLUTION)
    if convolution is None:
        return f"only its rule, as there is no function {_CONVOLUTION} of the known arguments"
    reason = convolution_differs(released(convolution))
    return reason and f"only its rule, as its convolution differs; {reason}"


PATCHED = {model_type: Held(functools.partial(plan, model_type)) for model_type in RULES}


class DeltaRule(OnOps):
    """Models of mixers with the gated delta rule."""

    patched = PATCHED
