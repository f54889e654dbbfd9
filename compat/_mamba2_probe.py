"""Whether a released Mamba2 mixer, or its scan, computes what the fast path does: both are run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig

from compat import _tiny, ops
from compat._behaviour import Draw, compare, verdict
from compat._transformers import state_argument
from compat.ops.mamba2_scan import mamba_chunk_scan_combined

_LENGTHS = (9, 2, 13)
_LIMIT = (0.05, 0.6)

Continue = Callable[..., Any]
"""The fast path: a mixer, its inputs, a cache or None, and seq_idx or None; gives the outputs."""


class Probed(NamedTuple):
    """What was found of a mixer.

    Attributes:
        reason: Why it is not what the fast path computes; empty where it is.
        norm: The class of the norm with which it was asked.
    """

    reason: str
    norm: type | None


@functools.cache
def of_mixer(
    model_type: str, mixer_class: type, forward: Callable[..., Any], run: Continue
) -> Probed:
    """Ask whether a released mixer computes what the fast path does; once for each.

    Args:
        model_type: Whose tiny configuration the mixer is made with.
        mixer_class: The mixer's class.
        forward: Its released forward.
        run: The fast path in plain torch.
    """
    norm: type | None = None

    def check(forward: Callable[..., Any]) -> None:
        nonlocal norm
        with ops.using("torch"):
            config, draw = _tiny.config(model_type), Draw()
            mixer = _tiny_mixer(mixer_class, config, draw)
            norm = type(mixer.norm)
            caches = DynamicCache(config=config), DynamicCache(config=config)
            _compare_mixers(mixer, caches, forward, run, draw)

    return Probed(verdict(check, forward), norm)


def _tiny_mixer(mixer_class: type, config: PreTrainedConfig, draw: Draw) -> Any:
    with _tiny.Draws(0):
        mixer: Any = mixer_class(config, layer_idx=0)
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

    # Padding goes with a projection without a bias; the rest has one.
    mixer.in_proj.bias = None
    masked = forward(mixer, x, attention_mask=mask)
    compare("left padding", masked[real], run(mixer, x, None, mask.int() - 1)[real])
    mixer.in_proj.bias = nn.Parameter(draw(mixer.in_proj.out_features))
    compare("a whole text", forward(mixer, x), run(mixer, x, None, None))

    name, (theirs, ours) = state_argument(forward), caches
    for chunk in x.split(_LENGTHS, dim=1):
        case = f"a chunk of {chunk.shape[1]}"
        compare(case, forward(mixer, chunk, **{name: theirs}), run(mixer, chunk, ours, None))
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
