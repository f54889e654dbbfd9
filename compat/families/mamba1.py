"""Mamba-1: a scan that begins from a state, built around a scan that can only begin from zero.

The recurrence h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t (arXiv 2312.00752, equation 2 discretised as
in section 3.3) is linear in its initial state. So the released scan, kernel or torch, is run as it
is, and the contribution of the initial state h_0 is added to its results:

    y_t += C_t . exp(A sum_{s<=t} dt_s) h_0,    last state += exp(A sum_s dt_s) h_0

The gate is applied to that contribution. In transformers 5.24.0 a chunk of several tokens lacks it.

On a CPU, where no gradient is recorded, the released scan is a loop over tokens. There the scan of
`compat.ops.mamba1`, which begins from the state directly, takes its place. Either replacement is
used only if it agrees with the installed scan when both are run on tiny inputs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus
from transformers import PreTrainedModel

from compat.errors import UnsupportedModelError, UnsupportedVersionError
from compat.families.base import Family
from compat.families.in_chunk import in_chunk, is_differentiable, is_in_chunk, replace_released
from compat.installed import hub_kernels
from compat.installed.behaviour import Draw, compare, verdict
from compat.installed.patches import Held, MixerCall, Patch, arguments, released, wraps
from compat.installed.recurrent_cache import modeling, parameters
from compat.ops import using
from compat.ops.mamba1 import selective_scan_fn

# The model types, and the class in transformers.models whose forward calls the scan.
MIXERS = {
    "mamba": "MambaMixer",
    "falcon_mamba": "FalconMambaMixer",
    "jamba": "JambaMambaMixer",
    "zamba": "ZambaMambaMixer",
}
_SCAN = "mamba_selective_scan"
# The arguments of a released scan, and the names that `selective_scan_fn` has for them.
_ARGUMENTS = {
    "hidden_states": "u",
    "dt": "delta",
    "A": "A",
    "B": "B",
    "C": "C",
    "D": "D",
    "z": "z",
    "delta_bias": "delta_bias",
    "delta_softplus": "delta_softplus",
    "return_last_state": "return_last_state",
}
# Arguments that choose among transformers' own scans.
_CHOICES = {"use_mambapy", "use_associative_scan"}


class _Scans(NamedTuple):
    """Instructions for the scans of the mixer that is running.

    Attributes:
        mixer: The mixer.
        states: The initial state of each scan; None for zeros. zamba has a scan for each head.
        on_ops: True where `compat.ops` may do the scans, if the released scan computes the same.
    """

    mixer: Any
    states: Iterator[Tensor | None]
    on_ops: bool


_scans: ContextVar[_Scans | None] = ContextVar("compat_mamba_scans", default=None)
# The mixers, in the chunk that is being run, whose scans were given their initial state.
_begun: ContextVar[set[Any] | None] = ContextVar("compat_mamba_begun", default=None)


class Mamba(Family):
    """Mamba-1 models, whose mixers are patched while a chunk is run."""

    def forward(
        self, backbone: PreTrainedModel, input_ids: Tensor, start: int, state: Any
    ) -> tuple[Tensor, Any]:
        """Run one chunk; see `Family.forward`.

        Raises:
            UnsupportedModelError: A layer did not begin from its state.
        """
        held = PATCHED[backbone.config.model_type]
        with held, in_chunk(), ExitStack() as stack:
            if not held.patched:  # The release begins from the state itself.
                return super().forward(backbone, input_ids, start, state)
            stack.callback(_scans.reset, _scans.set(None))
            mixers = _mixers(backbone)
            for mixer in mixers:
                if "forward" in vars(mixer):
                    _hook(mixer, stack)
            begun: set[Any] = set()
            stack.callback(_begun.reset, _begun.set(begun))
            # A single token takes another path, which begins from the state in the release already.
            wanted = {m for m in mixers if input_ids.shape[1] > 1 and _has_state(m, state)}
            output = super().forward(backbone, input_ids, start, state)
        if missed := sorted(mixer.layer_idx for mixer in wanted - begun):
            raise UnsupportedModelError(
                f"a {type(backbone).__name__} of which layers {missed} began from no state",
                "mixers that run transformers' own mamba_selective_scan",
                "remove what replaces their forward, or encode without vertical_chunk_size",
            )
        return output


def _mixers(backbone: PreTrainedModel) -> list[Any]:
    """Return the mixers of a model, whatever replaced their forward."""
    name = MIXERS[str(backbone.config.model_type)]
    return [m for m in backbone.modules() if any(c.__name__ == name for c in type(m).__mro__)]


def _has_state(mixer: Any, cache: Any) -> bool:
    return cache is not None and _recurrent_state(cache, mixer.layer_idx) is not None


def _hook(mixer: Any, stack: ExitStack) -> None:
    """Tell the scans of a mixer where they begin, even if its class's forward is not reached.

    That happens with accelerate, which keeps the forward that it found and calls it from its own.
    """

    def before(mixer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_in_chunk():
            _scans.set(_scans_of(mixer, type(mixer).forward, args, kwargs))

    def after(*_: Any) -> None:
        if is_in_chunk():
            _scans.set(None)

    stack.enter_context(mixer.register_forward_pre_hook(before, with_kwargs=True))
    stack.enter_context(mixer.register_forward_hook(after, always_call=True))


def with_initial_state(scan: Callable[..., Any]) -> Callable[..., Any]:
    """Let a Mamba-1 scan begin from the state that its mixer has in the cache.

    Args:
        scan: `selective_scan_fn` of mamba-ssm 2.3, or a function of the same arguments.
    """

    @wraps(scan)
    def selective_scan(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or (scans := _scans.get()) is None:
            return scan(*args, **kwargs)
        state = next(scans.states)
        if (begun := _begun.get()) is not None:
            begun.add(scans.mixer)
        given = arguments(scan, args, kwargs)
        known = not given.keys() - _ARGUMENTS.keys() - _CHOICES
        if scans.on_ops and known and not differs(scan):
            ours = {_ARGUMENTS[name]: given[name] for name in given.keys() & _ARGUMENTS.keys()}
            with torch.autocast(ours["u"].device.type, enabled=False):
                return selective_scan_fn(**ours, initial_states=state)
        if state is None:
            return scan(*args, **kwargs)
        reason = _is_not_linear(scan) if known else f"it is given {', '.join(given)}"
        if not reason:
            return _continued(scan, state, args, kwargs)
        if not is_in_chunk():
            return scan(*args, **kwargs)
        raise UnsupportedVersionError(
            f"a released mamba_selective_scan that cannot begin from a state: {reason}",
            "a scan that is linear in its state, as in transformers 5.15 to 5.24",
            'pip install "transformers>=5.15,<=5.24"',
        )

    return selective_scan


def _continued(
    scan: Callable[..., Any], state: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Run a released scan from zeros, and add the contribution of the state to its results."""
    given = arguments(scan, args, kwargs)
    output, last = scan(*args, **kwargs)
    bias, softplus_ = given.get("delta_bias"), given.get("delta_softplus", False)
    added, decayed = _contribution(state, given["dt"], given["A"], given["C"], bias, softplus_)
    if (z := given.get("z")) is not None:
        added = added * silu(z.float())
    return (output + added).to(output.dtype), last + decayed


@functools.cache
def differs(scan: Callable[..., Any]) -> str:
    """Say why a released scan is not what `compat.ops` computes; empty where it is."""

    def check(scan: Callable[..., Any]) -> None:
        given = _tiny_inputs()
        theirs = scan(**given)
        with using("torch"):
            ours = selective_scan_fn(**{_ARGUMENTS[name]: value for name, value in given.items()})
        compare("the outputs", theirs[0], ours[0])
        compare("the last state", theirs[1], ours[1])

    return verdict(check, scan)


@functools.cache
def _is_not_linear(scan: Callable[..., Any]) -> str:
    """Say why a state's contribution cannot be added to a released scan; empty where it can."""

    def check(scan: Callable[..., Any]) -> None:
        given = _tiny_inputs()
        over_time = ("hidden_states", "dt", "B", "C", "z")
        head, tail = (
            given | {name: given[name][..., piece] for name in over_time}
            for piece in (slice(None, 4), slice(4, None))
        )
        outputs, last = scan(**given)
        first, state = scan(**head)
        second, last_in_pieces = _continued(scan, state, (), tail)
        compare("the outputs in two pieces", outputs, torch.cat([first, second], -1))
        compare("the last state in two pieces", last, last_in_pieces)

    return verdict(check, scan)


def _tiny_inputs() -> dict[str, Any]:
    """Return tiny arguments for a scan, under the names of a released one."""
    batch, dim, dstate, seqlen = 2, 5, 3, 9
    draw = Draw()
    return {
        "hidden_states": draw(batch, dim, seqlen),
        "dt": draw(batch, dim, seqlen),
        "A": -draw(dim, dstate).exp(),
        "B": draw(batch, dstate, seqlen),
        "C": draw(batch, dstate, seqlen),
        "D": draw(dim),
        "z": draw(batch, dim, seqlen),
        "delta_bias": draw(dim) - 1,
        "delta_softplus": True,
        "return_last_state": True,
    }


def _contribution(
    state: Tensor, dt: Tensor, A: Tensor, C: Tensor, bias: Tensor | None, use_softplus: bool
) -> tuple[Tensor, Tensor]:
    """Return the contribution of an initial state to the outputs before the gate and to the state.

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
        dt = dt.float()  # As in the kernel; transformers' own scan rounds to the model's dtype.
    if bias is not None:
        dt = dt + bias.to(dt.dtype)[:, None]
    if use_softplus:
        dt = softplus(dt)
    total = dt.float().cumsum(-1)
    added = torch.zeros_like(total)
    # One state dimension is done at a time, as (batch, dim, seqlen, dstate) would be the largest
    # tensor of the model.
    for n in range(A.shape[-1]):
        decay = torch.exp(total * A[:, n, None])
        added.addcmul_(decay * state[..., n, None], C[:, None, n].float())
    return added, torch.exp(A * total[..., -1:]) * state


def _forward_with_state(model_type: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def mixer_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A model that is loaded meanwhile may keep this function after the last holder has let go.
        if torch.compiler.is_compiling() or not PATCHED[model_type].patched:
            return forward(self, *args, **kwargs)
        if (scans := _scans_of(self, forward, args, kwargs)) is None:
            return forward(self, *args, **kwargs)
        token = _scans.set(scans)
        try:
            return forward(self, *args, **kwargs)
        finally:
            _scans.reset(token)

    return mixer_forward


def _scans_of(
    mixer: Any, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> _Scans | None:
    """Return the instructions for a mixer's scans in a call; None where the release serves."""
    inputs, cache, others = MixerCall.read(forward, mixer, args, kwargs)
    known = isinstance(inputs, Tensor) and hasattr(mixer, "layer_idx")
    if not known or others.keys() - {"attention_mask"}:
        return None
    state = None
    if cache is not None and inputs.shape[1] > 1:
        state = _recurrent_state(cache, mixer.layer_idx)
    on_ops = (cache is None or is_in_chunk()) and _is_slow(mixer, inputs)
    if state is None and not on_ops:
        return None
    if state is None:
        return _Scans(mixer, itertools.repeat(None), on_ops)
    # zamba scans head by head, and its state is (batch, heads, dim, dstate).
    states = [state.clone()] if state.ndim == 3 else state.clone().unbind(1)
    return _Scans(mixer, iter(states), on_ops)


def _recurrent_state(cache: Any, layer_idx: int) -> Tensor | None:
    """Return a layer's state in the cache; None before its first chunk, and in another cache.

    `get_recurrent_state` came with transformers 5.21.
    """
    state: Tensor | None
    try:
        if hasattr(cache, "get_recurrent_state"):
            state = cache.get_recurrent_state(layer_idx)
        else:
            has_state = cache.has_previous_state(layer_idx)
            state = cache.layers[layer_idx].recurrent_states[0] if has_state else None
    except AttributeError:
        return None
    return state


def _is_slow(mixer: Any, hidden_states: Tensor) -> bool:
    """Return whether the mixer's own scan would be a loop in torch, without gradients, on a CPU."""
    if not replace_released(hidden_states):
        return False
    if is_differentiable():  # A kernel may ignore the gradient of its last state.
        return True
    # A user asked for the hub's kernel, where one is used.
    return find_spec("mamba_ssm") is None and not hub_kernels.is_used(mixer)


def plan(model_type: str) -> list[Patch]:
    """List the patches of transformers for one of `MIXERS`; none where its scan takes a state.

    Raises:
        UnsupportedVersionError: The model's module is not what the patches expect.
    """
    module = modeling(model_type)
    if module is None:
        return []
    mixer = getattr(module, MIXERS[model_type], None)
    scan = getattr(module, _SCAN, None)
    if mixer is None or scan is None or _ARGUMENTS.keys() - set(parameters(scan)):
        raise UnsupportedVersionError(
            f"{module.__name__} without {MIXERS[model_type]}, or without a {_SCAN} of "
            f"{', '.join(_ARGUMENTS)}",
            "a release whose Mamba-1 models are those of transformers 5.15 to 5.24",
            'pip install "transformers>=5.15,<=5.24"',
        )
    if "initial_states" in parameters(scan):
        return []
    return [
        (mixer, "forward", _forward_with_state(model_type, mixer.forward)),
        (module, _SCAN, with_initial_state(scan)),
    ]


def on_cpu(model_type: str) -> str | None:
    """Say why `compat.ops` does not do the scan of one of `MIXERS` on a CPU.

    Returns:
        The reason; empty where `compat.ops` does it; None where the installed transformers has no
        such model, or a scan that takes a state.
    """
    try:
        if not plan(model_type):
            return None
    except UnsupportedVersionError as error:
        return f"not used, and not read in chunks; {error.found}"
    if find_spec("mamba_ssm") is not None:
        return "not used, as mamba-ssm is installed"
    reason = differs(released(getattr(modeling(model_type), _SCAN)))
    return reason and f"not used, as its scan differs; {reason}"


PATCHED = {model_type: Held(functools.partial(plan, model_type)) for model_type in MIXERS}
