"""Mamba-1: a scan that begins from a state, around a scan that can only begin from zero.

The recurrence h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t (arXiv 2312.00752, equation 2 discretised as
in section 3.3) is linear in its initial state. So the released scan, kernel or torch, is left as it
is, and what the initial state h_0 adds is put on top:

    y_t += C_t . exp(A sum_{s<=t} dt_s) h_0,    last state += exp(A sum_s dt_s) h_0

with the gate applied to it. That is what a chunk of several tokens lacks in transformers 5.23.0.

On a CPU, where no gradient is recorded, the released scan is a loop over tokens; there the scan of
`compat.ops.mamba1` takes its place, which begins from the state directly.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus
from transformers import PreTrainedModel

from compat import _hub
from compat._errors import UnsupportedVersionError
from compat._family import Family
from compat._patches import Held, Patch
from compat._transformers import parameters
from compat.ops._where import in_chunk, is_in_chunk, replace_released
from compat.ops.mamba1 import selective_scan_fn

# The model types, and the class whose forward makes the scan, in transformers.models.
MIXERS = {
    "mamba": "MambaMixer",
    "falcon_mamba": "FalconMambaMixer",
    "jamba": "JambaMambaMixer",
    "zamba": "ZambaMambaMixer",
}
# What the scan of `compat.ops` takes by name; the others choose among transformers' own scans.
_ARGUMENTS = ("D", "z", "delta_bias", "delta_softplus", "return_last_state")


class _Scans(NamedTuple):
    """What the scans of the mixer that is running are to do.

    Attributes:
        states: For each scan, of which zamba has one for each head, where it begins; None for
            zeros.
        on_ops: Whether `compat.ops` does them.
    """

    states: Iterator[Tensor | None]
    on_ops: bool


_scans: ContextVar[_Scans | None] = ContextVar("compat_mamba_scans", default=None)


class Mamba(Family):
    """Mamba-1 models, whose mixers are patched while a chunk goes through."""

    def forward(
        self, backbone: PreTrainedModel, input_ids: Tensor, start: int, state: Any
    ) -> tuple[Tensor, Any]:
        """Run one chunk; see `Family.forward`."""
        with PATCHED[backbone.config.model_type], in_chunk():
            return super().forward(backbone, input_ids, start, state)


def with_initial_state(scan: Callable[..., Any]) -> Callable[..., Any]:
    """Let a Mamba-1 scan begin from the state that its mixer has in the cache.

    Args:
        scan: `selective_scan_fn` of mamba-ssm 2.3, or a function of the same arguments.
    """

    @functools.wraps(scan)
    def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **kw: Any) -> Any:
        scans = _scans.get()
        if scans is None:
            return scan(x, dt, A, B, C, **kw)
        state = next(scans.states)
        if scans.on_ops:
            known = {name: value for name, value in kw.items() if name in _ARGUMENTS}
            return selective_scan_fn(x, dt, A, B, C, **known, initial_states=state)
        if state is None:
            return scan(x, dt, A, B, C, **kw)
        output, last = scan(x, dt, A, B, C, **kw)
        added, decayed = _contribution(
            state, dt, A, C, kw.get("delta_bias"), kw.get("delta_softplus", False)
        )
        if (z := kw.get("z")) is not None:
            added = added * silu(z.float())
        return (output + added).to(output.dtype), last + decayed

    return selective_scan


def _contribution(
    state: Tensor, dt: Tensor, A: Tensor, C: Tensor, bias: Tensor | None, use_softplus: bool
) -> tuple[Tensor, Tensor]:
    """What an initial state adds to the outputs before the gate, and to the last state.

    Args:
        state: (batch, dim, dstate) float32.
        dt: (batch, dim, seqlen), before bias and softplus.
        A: (dim, dstate) float32, negative.
        C: (batch, dstate, seqlen).
        bias: (dim,) or None.
        use_softplus: Whether dt still has to go through softplus.

    Returns:
        (batch, dim, seqlen) and (batch, dim, dstate), both float32.
    """
    if find_spec("mamba_ssm") is not None:
        dt = dt.float()  # The kernel's arithmetic; transformers' own rounds to the model's dtype.
    if bias is not None:
        dt = dt + bias.to(dt.dtype)[:, None]
    if use_softplus:
        dt = softplus(dt)
    total = dt.float().cumsum(-1)
    added = torch.zeros_like(total)
    # One state dimension at a time: (batch, dim, seqlen, dstate) would be the largest tensor of
    # the model.
    for n in range(A.shape[-1]):
        decay = torch.exp(total * A[:, n, None])
        added.addcmul_(decay * state[..., n, None], C[:, None, n].float())
    return added, torch.exp(A * total[..., -1:]) * state


def _forward_with_state(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def mixer_forward(
        self: Any, hidden_states: Tensor, cache_params: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        state = None
        if cache_params is not None and hidden_states.shape[1] > 1:
            state = _recurrent_state(cache_params, self.layer_idx)
        on_ops = (cache_params is None or is_in_chunk()) and _is_slow(self, hidden_states)
        if state is None and not on_ops:
            return forward(self, hidden_states, cache_params, *args, **kwargs)
        if state is None:
            states: Iterator[Tensor | None] = itertools.repeat(None)
        else:  # zamba scans head by head: (batch, heads, dim, dstate).
            states = iter([state.clone()] if state.ndim == 3 else state.clone().unbind(1))
        token = _scans.set(_Scans(states, on_ops))
        try:
            return forward(self, hidden_states, cache_params, *args, **kwargs)
        finally:
            _scans.reset(token)

    return mixer_forward


def _recurrent_state(cache: Any, layer_idx: int) -> Tensor | None:
    """The state that a layer has in the cache; None before its first chunk.

    `get_recurrent_state`, which says the same, came with transformers 5.21.
    """
    if not cache.has_previous_state(layer_idx):
        return None
    state: Tensor = cache.layers[layer_idx].recurrent_states[0]
    return state


def _is_slow(mixer: Any, hidden_states: Tensor) -> bool:
    """Whether the mixer's own scan would be a loop in torch, without gradients, on a CPU."""
    return (
        replace_released(hidden_states)
        and find_spec("mamba_ssm") is None
        and not _hub.is_used(mixer)  # Somebody has asked for it.
    )


def plan(model_type: str) -> list[Patch]:
    """What to patch in transformers for one of `MIXERS`; nothing where its scan takes a state.

    Raises:
        UnsupportedVersionError: The model's module is not what the patches expect.
    """
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    mixer = getattr(module, MIXERS[model_type], None)
    scan = getattr(module, "mamba_selective_scan", None)
    if mixer is None or scan is None:
        raise UnsupportedVersionError(
            f"{module.__name__} without {MIXERS[model_type]} or mamba_selective_scan",
            "a release whose Mamba-1 models are those of transformers 5.15 to 5.23",
            'pip install "transformers>=5.15,<6"',
        )
    if "initial_states" in parameters(scan):
        return []
    return [
        (mixer, "forward", _forward_with_state(mixer.forward)),
        (module, "mamba_selective_scan", with_initial_state(scan)),
    ]


PATCHED = {model_type: Held(functools.partial(plan, model_type)) for model_type in MIXERS}
