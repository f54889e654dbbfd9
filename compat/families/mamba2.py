"""Mamba2's fused path: on a GPU the kernels of causal-conv1d and mamba-ssm, on a CPU `compat.ops`.

As of transformers 5.24.0 a mixer that continues from its cache copies the convolution's state and
the whole chunk into a new tensor for the convolution, and does the gated norm in plain torch, in
float32. The fused path passes the state to the convolution as an argument, and runs the norm as a
kernel too. The results are equal except for roundings that it leaves out: that of the normed values
before the norm's weight, and on a CPU those of dt, of the convolution and of its SiLU.

A chunk that continues from the cache takes the fused path. On a CPU, while `full_passes` is on, so
does a pass without a cache. A mixer is replaced if it gives the same results as the fused path on
tiny weights; if only its scan does, the scan alone is replaced. Where a call is not known to be
exact, the released forward runs.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from compat.families import mamba2_kernels, mamba2_probe
from compat.families.in_chunk import OnOps, is_differentiable, is_in_chunk, replace_released
from compat.families.mamba2_kernels import Run, portable, split, whole
from compat.installed import hub_kernels
from compat.installed.behaviour import Differs
from compat.installed.patches import Held, MixerCall, Patch, Patches, arguments, released, wraps
from compat.installed.recurrent_cache import modeling, parameters
from compat.ops.mamba2_scan import mamba_chunk_scan_combined

# The model types, and the class of their mixers in transformers.models.
MIXERS = {
    "bamba": "BambaMixer",
    "granitemoehybrid": "GraniteMoeHybridMambaLayer",
    "mamba2": "Mamba2Mixer",
    "nemotron_h": "NemotronHMamba2Mixer",
    "zamba2": "Zamba2MambaMixer",
}
_SCAN, _FUSED = "mamba2_chunk_scan", "mamba2_split_conv1d_scan_combined"
# Arguments that a mixer is given and does not use, and those that the scan of `compat.ops` takes.
_UNUSED = {"position_embeddings"}
_OF_SCAN = set(inspect.signature(mamba_chunk_scan_combined).parameters) - {"x"} | {"hidden_states"}

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_NORM_BYTES = 65536  # A group of channels must fit into one block of the norm's kernel.


# True while a pass without a cache is served too, on a CPU.
_full_passes = False
# True where the running mixer's scan is to be done by `compat.ops`.
_scan_on_ops: ContextVar[bool] = ContextVar("compat_mamba2_scan_on_ops", default=False)


def _has_kernels(tensor: Tensor) -> bool:
    """Return whether the kernels run on a tensor's device; tests replace this function."""
    return tensor.is_cuda


def is_native(model_type: str) -> bool:
    """Return whether the installed transformers runs the fused path itself, for one of `MIXERS`.

    A transformers that can do so asks its kernel whether that takes the states, as is done here.
    """
    module = modeling(model_type)
    asks, op = getattr(module, "kernel_func_takes", None), getattr(module, _FUSED, None)
    return bool(asks and op and asks(op, "initial_conv_states", "return_final_conv_states"))


def plan(model_type: str) -> list[Patch]:
    """List the patches of transformers for one of `MIXERS`; none where it has the path itself.

    A mixer or its scan is compared with the fused path when it is first run, not here.
    """
    module, mixer = _mixer_of(model_type)
    if mixer is None:
        return []
    patches: list[Patch] = [(mixer, "forward", _with_fused_path(model_type, mixer, mixer.forward))]
    if (scan := _scan_of(module)) is not None:
        patches.append((module, _SCAN, _with_fast_scan(scan)))
    return patches


def on_cpu(model_type: str) -> str | None:
    """Say why the mixers of one of `MIXERS` are not served on a CPU, or only their scan is.

    Returns:
        The reason; empty where the mixers are served; None where the installed transformers has no
        such mixers, or has the fused path itself.
    """
    module, mixer = _mixer_of(model_type)
    if mixer is None:
        missing = module is not None and not is_native(model_type)
        return f"not used, as there is no {MIXERS[model_type]}" if missing else None
    forward = released(mixer.forward)
    reason = mamba2_probe.of_mixer(model_type, mixer, forward, _on_torch).reason
    scan = _scan_of(module)
    if reason and scan is not None and not mamba2_probe.scan_differs(released(scan)):
        return f"only its scan, as its mixer differs; {reason}"
    return reason and f"not used, as its mixer differs; {reason}"


def _mixer_of(model_type: str) -> tuple[Any, Any]:
    """Return the module of one of `MIXERS`, and its mixer class; None where it is not served."""
    module = modeling(model_type)
    served = module is not None and not is_native(model_type)
    return module, getattr(module, MIXERS[model_type], None) if served else None


def _scan_of(module: Any) -> Any:
    """Return a module's scan; None where it has another, or one that `kernels` made an object."""
    scan = getattr(module, _SCAN, None)
    return scan if inspect.isfunction(scan) and "hidden_states" in parameters(scan) else None


PATCHED = {model_type: Held(functools.partial(plan, model_type)) for model_type in MIXERS}


class Mamba2(OnOps):
    """Models of Mamba2 mixers."""

    patched = PATCHED


@contextmanager
def full_passes() -> Iterator[None]:
    """Serve passes without a cache too, on a CPU and without gradients, in any thread."""
    with ExitStack() as stack:
        for held in PATCHED.values():
            stack.enter_context(held)
        switch = Patches([(sys.modules[__name__], "_full_passes", True)])
        stack.callback(switch.undo)
        yield


@functools.cache  # One object for each forward, as torch.compile watches it.
def _with_fused_path(
    model_type: str, mixer_class: Any, forward: Callable[..., Any]
) -> Callable[..., Any]:
    @wraps(forward)
    def mixer_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        call = MixerCall.read(forward, self, args, kwargs)
        own = vars(mixer_class).get("forward") is vars(type(self)).get("forward")
        if not own or not _is_served(call):
            return forward(self, *args, **kwargs)
        probed = mamba2_probe.of_mixer(model_type, mixer_class, forward, _on_torch)
        if not probed.reason:
            run = _run_for(self, call) if probed.stands_for(self) else None
            if run is not None:
                return _continue(run, self, call.inputs, call.state)
            return forward(self, *args, **kwargs)
        token = _scan_on_ops.set(replace_released(call.inputs))
        try:
            return forward(self, *args, **kwargs)
        finally:
            _scan_on_ops.reset(token)

    return mixer_forward


def _is_served(call: MixerCall) -> bool:
    """Return whether a call of a mixer may take the fused path."""
    known = not call.others.keys() - _UNUSED - {"attention_mask"}
    if not known or not isinstance(call.inputs, Tensor):
        return False
    if call.state is not None:
        return is_in_chunk()
    return _full_passes and replace_released(call.inputs)


@functools.cache
def _with_fast_scan(scan: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(scan)
    def chunk_scan(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not _scan_on_ops.get():
            return scan(*args, **kwargs)
        given = arguments(scan, args, kwargs)
        if given.keys() - _OF_SCAN or mamba2_probe.scan_differs(scan):
            return scan(*args, **kwargs)
        return mamba_chunk_scan_combined(given.pop("hidden_states"), **given)

    return chunk_scan


def _on_torch(mixer: Any, inputs: Tensor, cache: Any, seq_idx: Tensor | None) -> Any:
    """Run the fused path in plain torch, in the form that the probe calls."""
    if not _is_exact(mixer, inputs):
        raise Differs("its convolution or its norm differs")
    run = portable if seq_idx is None else functools.partial(portable, seq_idx=seq_idx)
    return _continue(run, mixer, inputs, cache)


def _run_for(mixer: Any, call: MixerCall) -> Run | None:
    """Return the function to run in a call that may be served; None for the mixer's own forward."""
    inputs, mask = call.inputs, call.others.get("attention_mask")
    on_ops = replace_released(inputs)
    run: Run | None = None
    if hub_kernels.is_used(mixer) and not is_differentiable():
        # A user asked for these kernels: use theirs, or the released forward, which calls them too.
        op = hub_kernels.fused_op(mixer)
        fits = not _has_kernels(inputs) or _suits_kernels(mixer, inputs)
        if op and fits and call.state is not None and mask is None:
            run = functools.partial(whole, op)
    elif call.state is not None and mask is None:
        run = mamba2_kernels.probe().run if _suits_kernels(mixer, inputs) else None
        run = run or (portable if on_ops else None)
    elif call.state is None and on_ops:
        run = portable
        if mask is not None:
            seq_idx = _seq_idx(mixer, mask)
            run = None if seq_idx is None else functools.partial(portable, seq_idx=seq_idx)
    return run if run and _is_exact(mixer, inputs) else None


def _seq_idx(mixer: Any, attention_mask: Tensor) -> Tensor | None:
    """Return int32 (batch, seqlen), 0 at tokens and -1 at padding; None where that is inexact.

    It is inexact where padding lies between tokens, because the state continues across it there. It
    is also inexact where the projection has a bias, or is more than a plain projection, because
    then the released convolution receives inputs at padding.
    """
    projection = mixer.in_proj
    plain = type(projection) is nn.Linear and projection.bias is None and _is_bare(projection)
    if attention_mask.dim() != 2 or not plain:
        return None
    real = attention_mask.bool()
    begins = real & ~torch.nn.functional.pad(real, (1, 0))[:, :-1]
    return real.int() - 1 if int(begins.sum(1).max()) <= 1 else None


def _is_exact(mixer: Any, hidden_states: Tensor) -> bool:
    """Return whether the fused path does all that the mixer's own forward does with the inputs."""
    norm = mixer.norm
    return (
        (hidden_states.dtype in _DTYPES or is_differentiable())
        and (is_differentiable() or not torch.is_autocast_enabled(hidden_states.device.type))
        and hidden_states.shape[1] > 1
        and mixer.activation in ("silu", "swish")
        and mixer.conv_kernel_size >= 2
        and norm.group_size * mixer.n_groups == mixer.intermediate_size
        and _is_bare(norm)
        and _is_bare(mixer.conv1d)
    )


def _suits_kernels(mixer: Any, hidden_states: Tensor) -> bool:
    """Return whether the kernels on a GPU support the mixer's sizes and settings."""
    return (
        _has_kernels(hidden_states)
        and not torch.is_grad_enabled()
        and mixer.conv_kernel_size <= 4
        # The convolution reads 8 channels at a time, and its first channel lies behind the gate's.
        and mixer.conv_dim % 8 == 0
        and mixer.intermediate_size % 8 == 0
        and mixer.norm.group_size * hidden_states.element_size() <= _NORM_BYTES
    )


def _is_bare(module: nn.Module) -> bool:
    """Return whether a module has neither hooks nor a forward of its own.

    Kernels only take its weights, so they would skip both.
    """
    hooks = module._forward_hooks or module._forward_pre_hooks
    return not hooks and "forward" not in vars(module)


def _continue(run: Run, mixer: Any, hidden_states: Tensor, cache: Any) -> Any:
    """Run a mixer's forward from its states in the cache, and write the new states into it."""
    if cache is None:
        return mixer.out_proj(run(mixer, mixer.in_proj(hidden_states), None, None)[0])
    layer, width = mixer.layer_idx, mixer.conv_kernel_size
    conv_state = cache.get_conv_state(layer)
    if conv_state is not None:
        # The cache keeps one column more than is needed, and the kernel wants channels side by
        # side.
        conv_state = conv_state[..., 1 - width :].transpose(1, 2).contiguous().transpose(1, 2)
    projected = mixer.in_proj(hidden_states)
    output, ssm_state = run(mixer, projected, conv_state, cache.get_recurrent_state(layer))
    _, last, _ = split(mixer, projected[:, -width:])
    cache.update_conv_state(last.transpose(1, 2), layer, conv_kernel_size=width)
    cache.update_recurrent_state(ssm_state, layer)
    return mixer.out_proj(output)
