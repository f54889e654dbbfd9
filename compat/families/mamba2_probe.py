"""Run a released Mamba2 mixer, or its scan, beside the fused path, and compare their results."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig

from compat import ops
from compat.families import tiny_models
from compat.installed.behaviour import Draw, compare, verdict
from compat.installed.recurrent_cache import innermost, parameters, state_argument
from compat.ops.mamba2_scan import mamba_chunk_scan_combined

_LENGTHS = (9, 2, 13)
_LIMIT = (0.05, 0.6)

Continue = Callable[..., Any]
"""The fast path: a mixer, its inputs, a cache or None, and seq_idx or None; gives the outputs."""


# Attributes that a mixer's forward may read: those that the fused path reads too, or that only
# describe shapes.
# fmt: off
_KNOWN = frozenset([
    "A_log", "D", "act", "activation", "chunk_size", "conv1d", "conv_dim", "conv_kernel_size",
    "dt_bias", "head_dim", "hidden_size", "in_proj", "intermediate_size", "layer_idx", "n_groups",
    "num_heads", "out_proj", "ssm_state_size", "time_step_limit", "training",
])
# fmt: on


class Probed(NamedTuple):
    """The verdict on a class of mixers.

    Attributes:
        reason: Why it differs from the fused path; empty where it does not.
        mixer: The instance that was compared; None where none could be made.
        read: Attributes beyond the known ones that its forward reads.
    """

    reason: str
    mixer: Any
    read: frozenset[str]

    def stands_for(self, mixer: Any) -> bool:
        """Return whether an instance differs from the compared one in known attributes alone."""
        return all(
            _alike(getattr(self.mixer, name, None), getattr(mixer, name, None))
            for name in self.read
        )


def _alike(asked: Any, other: Any) -> bool:
    """Return whether attributes are of one class, and equal unless they are weights or callable."""
    of_weights = isinstance(asked, nn.Module | Tensor)
    return type(asked) is type(other) and bool(of_weights or callable(asked) or asked == other)


def _names(function: Any, owner: type) -> set[str]:
    """Return the names in a function of a class, and in the methods of the class that it names."""
    code = getattr(innermost(function), "__code__", None)
    found = set(code.co_names) if code else set()
    for name in set(found):
        if inspect.isfunction(method := vars(owner).get(name)) and method is not function:
            found |= _names(method, owner)
    return found


@functools.cache
def of_mixer(
    model_type: str, mixer_class: type, forward: Callable[..., Any], run: Continue
) -> Probed:
    """Find out, once for each mixer class, whether it computes the same as the fused path.

    Args:
        model_type: The model type whose tiny configuration the mixer is made with.
        mixer_class: The mixer's class.
        forward: Its released forward.
        run: The fused path in plain torch.
    """
    mixer: Any = None

    def check(forward: Callable[..., Any]) -> None:
        nonlocal mixer
        with ops.using("torch"):
            config, draw = tiny_models.config(model_type), Draw()
            mixer = _tiny_mixer(mixer_class, config, 0, draw)
            caches = DynamicCache(config=config), DynamicCache(config=config)
            _compare_mixers(mixer, caches, forward, run, draw)
            second = _tiny_mixer(mixer_class, config, 1, draw)
            inputs = draw(1, 9, second.in_proj.in_features)
            theirs = forward(second, **{parameters(forward)[1]: inputs})
            compare("another layer", theirs, run(second, inputs, None, None))

    reason = verdict(check, forward)
    return Probed(reason, mixer, frozenset(_names(forward, mixer_class) - _KNOWN))


def _tiny_mixer(mixer_class: type, config: PreTrainedConfig, layer_idx: int, draw: Draw) -> Any:
    with tiny_models.Draws(0):
        mixer: Any = mixer_class(config, layer_idx=layer_idx)
    mixer = mixer.float().eval()
    mixer.time_step_limit = _LIMIT
    for parameter in mixer.parameters():
        parameter.copy_(0.5 * draw(*parameter.shape))
    mixer.A_log.abs_()
    mixer.dt_bias.sub_(1)
    return mixer


def _compare_mixers(
    mixer: Any,
    caches: tuple[DynamicCache, DynamicCache],
    forward: Callable[..., Any],
    run: Continue,
    draw: Draw,
) -> None:
    x = draw(2, sum(_LENGTHS), mixer.in_proj.in_features)
    mask = torch.ones(x.shape[:2], dtype=torch.int64)
    mask[1, :5] = 0
    real = mask.bool()

    # Padding is tested on a projection without a bias, everything else on one with a bias.
    mixer.in_proj.bias = None
    name, state = parameters(forward)[1], state_argument(forward)
    masked = forward(mixer, **{name: x}, attention_mask=mask)
    compare("left padding", masked[real], run(mixer, x, None, mask.int() - 1)[real])
    mixer.in_proj.bias = nn.Parameter(draw(mixer.in_proj.out_features))
    compare("a whole text", forward(mixer, **{name: x}), run(mixer, x, None, None))

    theirs, ours = caches
    for chunk in x.split(_LENGTHS, dim=1):
        case = f"a chunk of {chunk.shape[1]}"
        released = forward(mixer, **{name: chunk, state: theirs})
        compare(case, released, run(mixer, chunk, ours, None))
        states: list[Any] = [cache.get_recurrent_state(0) for cache in caches]
        compare(f"the state after {case}", *states)
        width = mixer.conv_kernel_size
        states = [cache.get_conv_state(0) for cache in caches]
        compare(f"the convolution's state after {case}", *(s[..., 1 - width :] for s in states))


@functools.cache
def scan_differs(scan: Callable[..., Any]) -> str:
    """Say why a released scan is not `mamba_chunk_scan_combined`; empty where it is."""

    def check(scan: Callable[..., Any]) -> None:
        with ops.using("torch"):
            _compare_scans(scan)

    return verdict(check, scan)


def _compare_scans(scan: Callable[..., Any]) -> None:
    draw = Draw()
    batch, nheads, headdim, ngroups, dstate = 2, 4, 8, 2, 6
    weights = {"A": -draw(nheads).exp(), "D": draw(nheads), "dt_bias": draw(nheads) - 1}
    options: dict[str, Any] = {"dt_softplus": True, "dt_limit": _LIMIT, "return_final_states": True}
    state = draw(batch, nheads, headdim, dstate)
    for length in _LENGTHS:
        inputs = {"dt": draw(batch, length, nheads)}
        inputs |= {name: draw(batch, length, ngroups, dstate) for name in "BC"}
        x = draw(batch, length, nheads, headdim)
        given = inputs | weights | options | {"chunk_size": 8, "initial_states": state}
        theirs = scan(hidden_states=x, **given)
        ours = mamba_chunk_scan_combined(x, **given)
        compare(f"{length} tokens", theirs[0], ours[0])
        compare(f"the state after {length} tokens", theirs[1], ours[1])
        state = ours[1]
