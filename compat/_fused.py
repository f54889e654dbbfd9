"""Mamba2's fused path: on a GPU the kernels of causal-conv1d and mamba-ssm, on a CPU `compat.ops`.

As of transformers 5.24.0 a mixer that continues from its cache copies the convolution's state and
the whole chunk into a new tensor for the convolution, and does the gated norm in plain torch, in
float32. Here the convolution is given its initial state as one, and the norm is a kernel too. The
numbers are the same but for a rounding less: that of the normed values before the norm's weight,
and on a CPU those of dt, of the convolution and of its SiLU.

A chunk from the cache takes it; on a CPU, while `full_passes` is on, so does a pass without a
cache. A mixer is taken for what the fast path computes when both give the same on tiny weights;
where only its scan does, that alone is replaced. Where something is not known to be exact, the
released forward runs.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from compat import _hub, _mamba2_probe
from compat._behaviour import Differs
from compat._family import Family
from compat._patches import Held, MixerCall, Patch, Patches, arguments, released, wraps
from compat._transformers import modeling, parameters
from compat.ops import mamba2
from compat.ops._where import in_chunk, is_in_chunk, replace_released
from compat.ops.mamba2_scan import mamba_chunk_scan_combined

# The model types, and the class of their mixers, in transformers.models.
MIXERS = {
    "bamba": "BambaMixer",
    "granitemoehybrid": "GraniteMoeHybridMambaLayer",
    "mamba2": "Mamba2Mixer",
    "nemotron_h": "NemotronHMamba2Mixer",
    "zamba2": "Zamba2MambaMixer",
}
_SCAN = "mamba2_chunk_scan"
# Arguments that a mixer is given and does not use, and those that the scan of `compat.ops` takes.
_UNUSED = {"position_embeddings"}
_OF_SCAN = set(inspect.signature(mamba_chunk_scan_combined).parameters) - {"x"} | {"hidden_states"}

# With which a transformers has the fused path in inference itself.
SETTING = "use_fused_scan"

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_NORM_BYTES = 65536  # A group of channels must fit into one block of the norm's kernel.

Run = Callable[..., tuple[Tensor, Tensor]]
"""A mixer, its projected inputs (batch, seqlen, channels), the convolution's state (batch,
conv_dim, width - 1) and the SSM state, or None for both; gives the gated and normed outputs
(batch, seqlen, intermediate_size) and the SSM state after them."""

# Whether a pass without a cache is served too, on a CPU.
_full_passes = False
# Whether the scan of the mixer that is running is to be that of `compat.ops`.
_scan_on_ops: ContextVar[bool] = ContextVar("compat_mamba2_scan_on_ops", default=False)


@dataclass(frozen=True)
class FusedPath:
    """What the installed packages offer.

    Attributes:
        run: The kernels as one function; None where transformers' own path is taken.
        reason: What it is made of, or why it is not used.
    """

    run: Run | None
    reason: str


class Mamba2(Family):
    """Models of Mamba2 mixers, which are patched while a chunk goes through."""

    def forward(
        self, backbone: PreTrainedModel, input_ids: Tensor, start: int, state: Any
    ) -> tuple[Tensor, Any]:
        """Run one chunk; see `Family.forward`."""
        if torch.is_grad_enabled():
            return super().forward(backbone, input_ids, start, state)
        with PATCHED[backbone.config.model_type], in_chunk():
            return super().forward(backbone, input_ids, start, state)


def _has_kernels(tensor: Tensor) -> bool:
    """Whether the kernels run where a tensor is; replaced by tests."""
    return tensor.is_cuda


@functools.cache
def probe() -> FusedPath:
    """Look at the installed causal-conv1d and mamba-ssm, which need not be there."""
    try:
        conv = _import("causal-conv1d", "causal_conv1d")
        ssd = _import("mamba-ssm", "mamba_ssm.ops.triton.ssd_combined")
        norms = _import("mamba-ssm", "mamba_ssm.ops.triton.layernorm_gated")
        _require("causal-conv1d", conv, "causal_conv1d_fn", "initial_states", "activation")
        if _lacks(ssd, "mamba_split_conv1d_scan_combined", "initial_conv_states") is None:
            op = "mamba_split_conv1d_scan_combined"
            reason = f"{op} of {_named('mamba-ssm')}, with {_named('causal-conv1d')}"
            return FusedPath(functools.partial(_whole, getattr(ssd, op)), reason)
        scan = ("initial_states", "return_final_states", "dt_bias", "dt_softplus", "dt_limit")
        _require("mamba-ssm", ssd, "mamba_chunk_scan_combined", *scan)
        _require("mamba-ssm", norms, "rmsnorm_fn", "z", "group_size", "norm_before_gate")
    except ImportError as error:
        return FusedPath(None, f"not used, as {error}")
    run = functools.partial(
        _composed, conv.causal_conv1d_fn, ssd.mamba_chunk_scan_combined, norms.rmsnorm_fn
    )
    return FusedPath(run, f"composed of {_named('causal-conv1d')} and {_named('mamba-ssm')}")


def is_native(model_type: str) -> bool:
    """Whether the installed transformers has the fused path itself, for one of `MIXERS`."""
    return model_type in CONFIG_MAPPING and hasattr(CONFIG_MAPPING[model_type], SETTING)


def _import(distribution: str, name: str) -> Any:
    package = name.partition(".")[0]
    try:
        importlib.import_module(package)
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise ImportError(f"{distribution} is not installed") from error
        raise ImportError(f"{_named(distribution)} cannot be imported: {error}") from error
    except Exception as error:  # A package built for another torch fails in many ways.
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ImportError(f"{_named(distribution)} cannot be imported: {why}") from error


def _require(distribution: str, module: Any, function: str, *parameters: str) -> None:
    if lack := _lacks(module, function, *parameters):
        raise ImportError(f"{_named(distribution)} {lack}")


def _lacks(module: Any, function: str, *parameters: str) -> str | None:
    found = getattr(module, function, None)
    if found is None:
        return f"has no {function}"
    missing = [name for name in parameters if name not in inspect.signature(found).parameters]
    return f"has a {function} that takes no {', '.join(missing)}" if missing else None


def _named(distribution: str) -> str:
    try:
        return f"{distribution} {version(distribution)}"
    except PackageNotFoundError:
        return distribution


def plan(model_type: str) -> list[Patch]:
    """What to patch in transformers for one of `MIXERS`; nothing where it has the path itself.

    Whether a mixer, or its scan, is what the fast path computes is asked when it is first run.
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
        Empty where they are served; None where the installed transformers has no such mixers, or
        has the path itself.
    """
    module, mixer = _mixer_of(model_type)
    if mixer is None:
        missing = module is not None and not is_native(model_type)
        return f"not used, as there is no {MIXERS[model_type]}" if missing else None
    forward = released(mixer.forward)
    reason = _mamba2_probe.of_mixer(model_type, mixer, forward, _on_torch).reason
    scan = _scan_of(module)
    if reason and scan is not None and not _mamba2_probe.scan_differs(released(scan)):
        return f"only its scan, as its mixer is another; {reason}"
    return reason and f"not used, as its mixer is another; {reason}"


def _mixer_of(model_type: str) -> tuple[Any, Any]:
    """The module of one of `MIXERS`, and the mixers' class; None where they are not served."""
    module = modeling(model_type)
    served = module is not None and not is_native(model_type)
    return module, getattr(module, MIXERS[model_type], None) if served else None


def _scan_of(module: Any) -> Any:
    """A module's scan; None where it has another one, or one that `kernels` made an object of."""
    scan = getattr(module, _SCAN, None)
    return scan if inspect.isfunction(scan) and "hidden_states" in parameters(scan) else None


PATCHED = {model_type: Held(functools.partial(plan, model_type)) for model_type in MIXERS}


@contextmanager
def full_passes() -> Iterator[None]:
    """Serve passes without a cache too, on a CPU and without gradients, in any thread."""
    with ExitStack() as stack:
        for held in PATCHED.values():
            stack.enter_context(held)
        switch = Patches([(sys.modules[__name__], "_full_passes", True)])
        stack.callback(switch.undo)
        yield


@functools.cache  # One object for each forward, whatever watches it: torch.compile does.
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
        probed = _mamba2_probe.of_mixer(model_type, mixer_class, forward, _on_torch)
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
    """Whether a call of a mixer is one that may take the fused path."""
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
        if given.keys() - _OF_SCAN or _mamba2_probe.scan_differs(scan):
            return scan(*args, **kwargs)
        return mamba_chunk_scan_combined(given.pop("hidden_states"), **given)

    return chunk_scan


def _on_torch(mixer: Any, inputs: Tensor, cache: Any, seq_idx: Tensor | None) -> Any:
    """Run the fast path as the probe asks for it."""
    if not _is_exact(mixer, inputs):
        raise Differs("its convolution or its norm is another")
    run = _portable if seq_idx is None else functools.partial(_portable, seq_idx=seq_idx)
    return _continue(run, mixer, inputs, cache)


def _run_for(mixer: Any, call: MixerCall) -> Run | None:
    """What a mixer runs on in a call that may be served; None for its own forward."""
    inputs, mask = call.inputs, call.others.get("attention_mask")
    on_ops = replace_released(inputs)
    run: Run | None = None
    if _hub.is_used(mixer):
        # Somebody has asked for them: theirs, or the released forward, which calls them too.
        op = _hub.fused_op(mixer)
        fits = not _has_kernels(inputs) or _suits_kernels(mixer, inputs)
        if op and fits and call.state is not None and mask is None:
            run = functools.partial(_whole, op)
    elif call.state is not None and mask is None:
        run = probe().run if _suits_kernels(mixer, inputs) else None
        run = run or (_portable if on_ops else None)
    elif call.state is None and on_ops:
        run = _portable
        if mask is not None:
            seq_idx = _seq_idx(mixer, mask)
            run = None if seq_idx is None else functools.partial(_portable, seq_idx=seq_idx)
    return run if run and _is_exact(mixer, inputs) else None


def _seq_idx(mixer: Any, attention_mask: Tensor) -> Tensor | None:
    """Zeros at tokens and -1 at padding, int32 (batch, seqlen), where that is the same thing.

    It is not between tokens, where the state goes on; and a projection that has a bias, or is more
    than a projection, gives the released convolution inputs at padding.
    """
    projection = mixer.in_proj
    plain = type(projection) is nn.Linear and projection.bias is None and _is_bare(projection)
    if attention_mask.dim() != 2 or not plain:
        return None
    real = attention_mask.bool()
    begins = real & ~torch.nn.functional.pad(real, (1, 0))[:, :-1]
    return real.int() - 1 if int(begins.sum(1).max()) <= 1 else None


def _is_exact(mixer: Any, hidden_states: Tensor) -> bool:
    """Whether the fused path does all that the mixer's own forward does with these inputs."""
    norm = mixer.norm
    return (
        hidden_states.dtype in _DTYPES
        and not torch.is_autocast_enabled(hidden_states.device.type)
        and hidden_states.shape[1] > 1
        and mixer.activation in ("silu", "swish")
        and mixer.conv_kernel_size >= 2
        and norm.group_size * mixer.n_groups == mixer.intermediate_size
        and _is_bare(norm)
        and _is_bare(mixer.conv1d)
    )


def _suits_kernels(mixer: Any, hidden_states: Tensor) -> bool:
    """Whether the kernels on a GPU take what the mixer has."""
    return (
        _has_kernels(hidden_states)
        and not torch.is_grad_enabled()
        and mixer.conv_kernel_size <= 4
        # The convolution reads 8 channels at a time, and its first one lies behind the gate's.
        and mixer.conv_dim % 8 == 0
        and mixer.intermediate_size % 8 == 0
        and mixer.norm.group_size * hidden_states.element_size() <= _NORM_BYTES
    )


def _is_bare(module: nn.Module) -> bool:
    """Whether nothing hangs on the call of a module, of which the kernels only take the weights."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return not hooks and "forward" not in vars(module)


def _continue(run: Run, mixer: Any, hidden_states: Tensor, cache: Any) -> Any:
    """A mixer's forward from its states in the cache, and the states after it into the cache."""
    if cache is None:
        return mixer.out_proj(run(mixer, mixer.in_proj(hidden_states), None, None)[0])
    layer, width = mixer.layer_idx, mixer.conv_kernel_size
    conv_state = cache.get_conv_state(layer)
    if conv_state is not None:
        # The cache keeps one column more than is needed; the kernel wants channels side by side.
        conv_state = conv_state[..., 1 - width :].transpose(1, 2).contiguous().transpose(1, 2)
    projected = mixer.in_proj(hidden_states)
    output, ssm_state = run(mixer, projected, conv_state, cache.get_recurrent_state(layer))
    _, last, _ = _split(mixer, projected[:, -width:])
    cache.update_conv_state(last.transpose(1, 2), layer, conv_kernel_size=width)
    cache.update_recurrent_state(ssm_state, layer)
    return mixer.out_proj(output)


def _split(mixer: Any, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gate, the convolution's inputs, and the time steps, as views."""
    sizes = [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads]
    gate, inputs, dt = projected.split(sizes, dim=-1)
    return gate, inputs, dt


def _whole(
    op: Callable[..., Any],
    mixer: Any,
    projected: Tensor,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    **rows: Tensor,
) -> tuple[Tensor, Tensor]:
    """One call of mamba-ssm's op, where it takes a conv state; without out_proj, a module."""
    output, final = op(
        projected,
        mixer.conv1d.weight.squeeze(1),
        mixer.conv1d.bias,
        mixer.dt_bias,
        -torch.exp(mixer.A_log.float()),
        mixer.D,
        mixer.chunk_size,
        initial_states=ssm_state,
        initial_conv_states=conv_state,
        dt_limit=mixer.time_step_limit,
        return_final_states=True,
        activation=mixer.activation,
        rmsnorm_weight=mixer.norm.weight,
        rmsnorm_eps=mixer.norm.variance_epsilon,
        headdim=mixer.head_dim,
        ngroups=mixer.n_groups,
        norm_before_gate=False,
        **rows,
    )
    return output, final


_portable: Run = functools.partial(_whole, mamba2.mamba_split_conv1d_scan_combined)


def _composed(
    conv: Callable[..., Any],
    scan: Callable[..., Any],
    rmsnorm: Callable[..., Any],
    mixer: Any,
    projected: Tensor,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same of three kernels, which released packages have."""
    gate, inputs, dt = _split(mixer, projected)
    if inputs.stride(1) % 8:
        inputs = inputs.contiguous()  # The kernel loads 8 channels at a time.
    convolved = conv(
        inputs.transpose(1, 2),
        mixer.conv1d.weight.squeeze(1),
        mixer.conv1d.bias,
        initial_states=conv_state,
        activation=mixer.activation,
    ).transpose(1, 2)
    grouped = mixer.n_groups * mixer.ssm_state_size
    x, B, C = convolved.split([mixer.intermediate_size, grouped, grouped], dim=-1)
    output, final = scan(
        x.unflatten(-1, (mixer.num_heads, mixer.head_dim)),
        dt,
        -torch.exp(mixer.A_log.float()),
        B.unflatten(-1, (mixer.n_groups, mixer.ssm_state_size)),
        C.unflatten(-1, (mixer.n_groups, mixer.ssm_state_size)),
        chunk_size=mixer.chunk_size,
        D=mixer.D,
        dt_bias=mixer.dt_bias,
        initial_states=ssm_state,
        dt_softplus=True,
        dt_limit=mixer.time_step_limit,
        return_final_states=True,
    )
    normed = rmsnorm(
        output.flatten(2),
        mixer.norm.weight,
        None,
        z=gate,
        eps=mixer.norm.variance_epsilon,
        group_size=mixer.norm.group_size,
        norm_before_gate=False,
    )
    return normed, final
