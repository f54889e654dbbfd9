"""Run Mamba2's mixers on the kernels of causal-conv1d and mamba-ssm, in one call or composed."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from compat.ops import mamba2

Run = Callable[..., tuple[Tensor, Tensor]]
"""A mixer, its projected inputs (batch, seqlen, channels), the convolution's state (batch,
conv_dim, width - 1) and the SSM state, or None for both; gives the gated and normed outputs
(batch, seqlen, intermediate_size) and the SSM state after them."""


@dataclass(frozen=True)
class FusedPath:
    """The fused path that the installed packages offer.

    Attributes:
        run: The kernels as one function; None where transformers' own path is taken.
        reason: The packages that it is made of, or why it is not used.
    """

    run: Run | None
    reason: str


@functools.cache
def probe() -> FusedPath:
    """Look for a fused path in the installed causal-conv1d and mamba-ssm; either may be absent."""
    try:
        conv = _import("causal-conv1d", "causal_conv1d")
        ssd = _import("mamba-ssm", "mamba_ssm.ops.triton.ssd_combined")
        norms = _import("mamba-ssm", "mamba_ssm.ops.triton.layernorm_gated")
        _require("causal-conv1d", conv, "causal_conv1d_fn", "initial_states", "activation")
        if _lacks(ssd, "mamba_split_conv1d_scan_combined", "initial_conv_states") is None:
            op = "mamba_split_conv1d_scan_combined"
            reason = f"{op} of {_named('mamba-ssm')}, with {_named('causal-conv1d')}"
            return FusedPath(functools.partial(whole, getattr(ssd, op)), reason)
        scan = ("initial_states", "return_final_states", "dt_bias", "dt_softplus", "dt_limit")
        _require("mamba-ssm", ssd, "mamba_chunk_scan_combined", *scan)
        _require("mamba-ssm", norms, "rmsnorm_fn", "z", "group_size", "norm_before_gate")
    except ImportError as error:
        return FusedPath(None, f"not used, as {error}")
    run = functools.partial(
        _composed, conv.causal_conv1d_fn, ssd.mamba_chunk_scan_combined, norms.rmsnorm_fn
    )
    return FusedPath(run, f"composed of {_named('causal-conv1d')} and {_named('mamba-ssm')}")


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


def split(mixer: Any, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gate, the convolution's inputs and the time steps, as views of the projection."""
    sizes = [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads]
    gate, inputs, dt = projected.split(sizes, dim=-1)
    return gate, inputs, dt


def whole(
    op: Callable[..., Any],
    mixer: Any,
    projected: Tensor,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    **rows: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run a mixer by one call of mamba-ssm's op, where that takes a conv state.

    The op is not given out_proj, because that is a module, which may be more than its weights.
    """
    output, final = op(
        projected,
        mixer.conv1d.weight.squeeze(1),
        mixer.conv1d.bias,
        mixer.dt_bias,
        -torch.exp(mixer.A_log.to(torch.promote_types(mixer.A_log.dtype, torch.float32))),
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


def portable(
    mixer: Any,
    projected: Tensor,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    **rows: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run a mixer by compat's own op, whose products autocast must not round."""
    with torch.autocast(projected.device.type, enabled=False):
        op = mamba2.mamba_split_conv1d_scan_combined
        return whole(op, mixer, projected, conv_state, ssm_state, **rows)


def _composed(
    conv: Callable[..., Any],
    scan: Callable[..., Any],
    rmsnorm: Callable[..., Any],
    mixer: Any,
    projected: Tensor,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run a mixer as `whole` does, by the three kernels that released packages have."""
    gate, inputs, dt = split(mixer, projected)
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
