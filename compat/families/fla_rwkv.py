"""RWKV-7 and RWKV-6 of flash-linear-attention on a CPU, where no Triton kernel runs.

Their layers call functions of fla that launch such kernels, for the recurrence and for what is
around it. While a chunk is run on a CPU, functions of the same arguments take their place: the
recurrences are those of `compat.ops`, the rest is a line or two of torch. fla has references in
torch; with these they are compared before the first chunk, as the kernels themselves do not run on
a machine without a GPU. A call with arguments that are not known here is left to fla, and so is
everything on a GPU.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from compat import ops
from compat.errors import UnsupportedModelError
from compat.families.in_chunk import in_chunk, is_in_chunk, replace_released
from compat.installed.behaviour import Draw, compare, verdict
from compat.installed.patches import Held, Patch, arguments, released, wraps
from compat.installed.recurrent_cache import parameters
from compat.ops.rwkv6 import wkv6
from compat.ops.rwkv7 import wkv7

_NORMS = "fla.modules.norm.layernorm"
_ACTIVATIONS = "fla.modules.activations.ops"


def forward(
    run: Callable[..., tuple[Tensor, Any]], backbone: PreTrainedModel, *given: Any
) -> tuple[Tensor, Any]:
    """Run a model's `Family.forward` with the functions replaced.

    Raises:
        UnsupportedModelError: The model is on a CPU, and the installed functions are others.
    """
    on_ops = backbone.device.type == "cpu" and ops.backend() != "released"
    if on_ops and (reason := differs(backbone.config.model_type)):
        raise UnsupportedModelError(
            f"{type(backbone).__name__} of flash-linear-attention {version('fla-core')} on a CPU, "
            f"where {reason}",
            "functions around its recurrence that compute what those of compat do without Triton",
            "install flash-linear-attention 0.6.0, or run the model on a GPU",
        )
    with PATCHED, in_chunk():
        return run(backbone, *given)


# The functions that take the place of fla's; each has the arguments of fla's that it knows.


def _token_shift(
    x: Tensor, cache: Tensor | None = None, output_cache: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    before = torch.zeros_like(x[:, 0]) if cache is None else cache.reshape(x[:, 0].shape)
    delta = torch.cat([before[:, None], x[:, :-1]], 1) - x
    return (delta, x[:, -1].clone()) if output_cache else delta


def _fused_addcmul(
    hidden_states: Tensor,
    delta: Tensor,
    xr: Tensor,
    xw: Tensor,
    xk: Tensor,
    xv: Tensor,
    xa: Tensor,
    xg: Tensor,
) -> tuple[Tensor, ...]:
    return tuple(torch.addcmul(hidden_states, delta, x) for x in (xr, xw, xk, xv, xa, xg))


def _l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    wide = _wide(x)
    return (wide * (wide.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def _fused_k(k: Tensor, a: Tensor, ka: Tensor) -> Tensor:
    return k.addcmul(k * (a - 1), ka)


def _chunk_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    safe_gate: bool = False,
    chunk_size: int | None = None,
    disable_recompute: bool = False,
    lower_bound: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    out, last = wkv7(r if scale == 1 else r * scale, w, k, v, a, b, initial_state)
    return out, last if output_final_state else None


def _fused_mul_recurrent_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kk: Tensor,
    a: Tensor,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    return _chunk_rwkv7(r, w, k, v, -kk, kk * a, scale, initial_state, output_final_state)


def _gate_output_correction(
    o: Tensor, r: Tensor, k: Tensor, r_k: Tensor, v: Tensor, g: Tensor
) -> Tensor:
    own = (r * k * r_k).sum(-1, keepdim=True) * v
    return (o + own.view(o.shape)) * g


def _rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    scale = r.shape[-1] ** -0.5 if scale is None else scale
    out, last = wkv6(r if scale == 1 else r * scale, w, k, v, u, initial_state)
    return out, last if output_final_state else None


def _layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Any:
    if is_rms_norm or residual_in_fp32:
        return NotImplemented
    x = x if residual is None else x + residual
    out = functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return (out, x) if prenorm else out


def _group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Any:
    if is_rms_norm or residual_in_fp32 or prenorm:
        return NotImplemented
    return functional.group_norm(x.flatten(0, -2), num_groups, weight, bias, eps).view(x.shape)


def _sqrelu(x: Tensor) -> Tensor:
    return torch.relu(x).square()


def _sigmoid(x: Tensor, output_contiguous: bool = False) -> Tensor:
    return torch.sigmoid(x)


def _swish(x: Tensor, output_contiguous: bool = False) -> Tensor:
    return functional.silu(x)


def _sqrelu_back(g: Tensor, x: Tensor) -> Tensor:
    return 2 * g * torch.relu(x)


def _sigmoid_back(x: Tensor, dy: Tensor, output_contiguous: bool = False) -> Tensor:
    s = torch.sigmoid(_wide(x))
    return (dy * s * (1 - s)).to(x.dtype)


def _swish_back(x: Tensor, dy: Tensor, output_contiguous: bool = False) -> Tensor:
    s = torch.sigmoid(_wide(x))
    return (dy * s * (1 + x * (1 - s))).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


_SHARED: dict[tuple[str, str], Callable[..., Any]] = {
    (_NORMS, "layer_norm"): _layer_norm,
    (_NORMS, "group_norm"): _group_norm,
    (_ACTIVATIONS, "sqrelu_fwd"): _sqrelu,
    (_ACTIVATIONS, "sigmoid_fwd"): _sigmoid,
    (_ACTIVATIONS, "swish_fwd"): _swish,
}
# What is called when gradients are taken; whether these are right is asked of the gradients.
_BACKWARD: dict[tuple[str, str], Callable[..., Any]] = {
    (_ACTIVATIONS, "sqrelu_bwd"): _sqrelu_back,
    (_ACTIVATIONS, "sigmoid_bwd"): _sigmoid_back,
    (_ACTIVATIONS, "swish_bwd"): _swish_back,
}
# For each model type the names in modules of fla, and what takes their place.
_OURS: dict[str, dict[tuple[str, str], Callable[..., Any]]] = {
    "rwkv6": {
        ("fla.layers.rwkv6", "token_shift"): _token_shift,
        ("fla.layers.rwkv6", "chunk_rwkv6"): _rwkv6,
        ("fla.layers.rwkv6", "fused_recurrent_rwkv6"): _rwkv6,
        ("fla.models.rwkv6.modeling_rwkv6", "token_shift"): _token_shift,
        **_SHARED,
    },
    "rwkv7": {
        ("fla.layers.rwkv7", "token_shift"): _token_shift,
        ("fla.layers.rwkv7", "fused_addcmul_rwkv7"): _fused_addcmul,
        ("fla.layers.rwkv7", "l2_norm"): _l2_norm,
        ("fla.layers.rwkv7", "fused_k_rwkv7"): _fused_k,
        ("fla.layers.rwkv7", "chunk_rwkv7"): _chunk_rwkv7,
        ("fla.layers.rwkv7", "fused_mul_recurrent_rwkv7"): _fused_mul_recurrent_rwkv7,
        ("fla.layers.rwkv7", "gate_output_correction"): _gate_output_correction,
        ("fla.models.rwkv7.modeling_rwkv7", "token_shift"): _token_shift,
        **_SHARED,
    },
}


def _in_place_of(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    known = set(parameters(ours))

    @wraps(theirs)
    def function(*args: Any, **kwargs: Any) -> Any:
        given = arguments(theirs, args, kwargs)
        tensor = next((x for x in given.values() if isinstance(x, Tensor)), None)
        if (
            tensor is not None
            and is_in_chunk()
            and given.keys() <= known
            and replace_released(tensor)
            and (found := ours(**given)) is not NotImplemented
        ):
            return found
        return theirs(*args, **kwargs)

    return function


def plan() -> list[Patch]:
    """List the patches of fla: of what is imported of it, so that nothing is imported here."""
    found = {
        (module, name): ours
        for table in (*_OURS.values(), _BACKWARD)
        for (module, name), ours in table.items()
        if hasattr(sys.modules.get(module), name)
    }
    return [
        (sys.modules[module], name, _in_place_of(getattr(sys.modules[module], name), ours))
        for (module, name), ours in found.items()
    ]


# References of fla in torch, each with the case that it is compared in.


def _check_shift(reference: Callable[..., Any]) -> None:
    x = Draw()(2, 7, 5)
    _, cache = cast(tuple[Tensor, Tensor], _token_shift(x[:, :3], output_cache=True))
    rest = cast(Tensor, _token_shift(x[:, 3:], cache))
    compare("the token shift", reference(x), cast(Tensor, _token_shift(x)))
    compare("the token shift of a later chunk", reference(x)[:, 3:], rest)


def _check_addcmul(reference: Callable[..., Any]) -> None:
    draw = Draw()
    given = [draw(2, 3, 4), draw(2, 3, 4), *(draw(1, 1, 4) for _ in range(6))]
    for theirs, ours in zip(reference(*given), _fused_addcmul(*given), strict=True):
        compare("the mixed inputs", theirs, ours)


def _check_k(reference: Callable[..., Any]) -> None:
    draw = Draw()
    given = draw(2, 3, 4), draw(2, 3, 4), draw(4)
    compare("the replacement key", reference(*given), _fused_k(*given))


def _check_gate(reference: Callable[..., Any]) -> None:
    draw, heads = Draw(), (2, 3, 2, 4)
    given = [draw(2, 3, 8), draw(*heads), draw(*heads), draw(2, 4), draw(*heads), draw(2, 3, 8)]
    compare("the gate of the output", reference(*given), _gate_output_correction(*given))


def _check_layer_norm(reference: Callable[..., Any]) -> None:
    draw = Draw()
    given: dict[str, Any] = {"x": draw(2, 3, 8), "residual": draw(2, 3, 8)}
    given |= {"weight": draw(8), "bias": draw(8)}
    given |= {"eps": 0.1, "prenorm": True}
    for theirs, ours in zip(reference(**given), _layer_norm(**given), strict=True):
        compare("the norm", theirs, ours)


def _check_group_norm(reference: Callable[..., Any]) -> None:
    draw = Draw()
    given: dict[str, Any] = {"x": draw(2, 3, 8), "weight": draw(8), "bias": draw(8)}
    given |= {"num_groups": 2, "eps": 0.1}
    compare("the norm of heads", reference(**given), _group_norm(**given))


def _check_recurrence(ours: Callable[..., Any], reference: Callable[..., Any]) -> None:
    draw, keys = Draw(), (2, 5, 2, 4)
    r, k, w, v = draw(*keys), draw(*keys), -draw(*keys).abs(), draw(2, 5, 2, 3)
    state = draw(2, 2, 4, 3)
    given = {"q": r, "k": k, "v": v}
    if ours is _rwkv6:
        own: dict[str, Any] = {"w": w, "u": draw(2, 4)}
        given |= {"w": w}
        more: dict[str, Any] = {"u": own["u"], "scale": 4**-0.5}
    else:
        own, more = {"w": w, "a": draw(*keys), "b": draw(*keys)}, {}
        given |= {"alpha": own["a"], "beta": own["b"], "gk": w}
    given = {name: x.transpose(1, 2) for name, x in given.items()} | more  # Heads before tokens.
    theirs, last = reference(**given, initial_state=state, output_final_state=True)
    with ops.using("torch"):
        outputs, ours_last = ours(
            r=r, k=k, v=v, **own, scale=4**-0.5, initial_state=state, output_final_state=True
        )
    compare("the recurrence", theirs.transpose(1, 2), outputs)
    compare("the state behind it", last, ours_last)


_Check = tuple[str, str, Callable[[Callable[..., Any]], None]]
_NORM_CHECKS: list[_Check] = [
    ("fla.modules.token_shift", "token_shift_ref", _check_shift),
    (_NORMS, "layer_norm_ref", _check_layer_norm),
    (_NORMS, "group_norm_ref", _check_group_norm),
]
_CHECKS: dict[str, list[_Check]] = {
    "rwkv6": [
        *_NORM_CHECKS,
        (
            "fla.ops.rwkv6.recurrent_naive",
            "naive_recurrent_rwkv6",
            functools.partial(_check_recurrence, _rwkv6),
        ),
    ],
    "rwkv7": [
        *_NORM_CHECKS,
        ("fla.ops.rwkv7.fused_addcmul", "torch_addcmul_rwkv7", _check_addcmul),
        ("fla.ops.rwkv7.fused_k_update", "k_update_ref", _check_k),
        ("fla.ops.rwkv7.gate_output_correction", "gate_output_correction_ref", _check_gate),
        (
            "fla.ops.generalized_delta_rule.dplr.naive",
            "dplr_recurrence",
            functools.partial(_check_recurrence, _chunk_rwkv7),
        ),
    ],
}


def _required(function: Callable[..., Any]) -> set[str]:
    taken = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in taken if parameter.default is inspect.Parameter.empty}


@functools.cache
def differs(model_type: str) -> str:
    """Say why the functions of a model type are not those that are known; empty where they are.

    fla must have been imported.
    """
    for (module, name), ours in _OURS[model_type].items():
        theirs = getattr(sys.modules.get(module), name, None)
        if theirs is None:
            return f"there is no {module}.{name}"
        if missing := _required(ours) - set(parameters(released(theirs))):
            return f"{module}.{name} takes no {', '.join(sorted(missing))}"
    for module, name, check in _CHECKS[model_type]:
        try:
            reference = getattr(import_module(module), name)
        except (ImportError, AttributeError):
            return f"there is no {module}.{name} to compare with"
        if reason := verdict(check, reference):
            return f"{module}.{name} computes something else; {reason}"
    return ""


def on_cpu() -> dict[str, str]:
    """Say for each of the model types why it does not run without Triton; empty where it does.

    Returns:
        Nothing where fla has not been imported.
    """
    return {name: differs(name) for name in _OURS} if "fla.models.rwkv7" in sys.modules else {}


PATCHED = Held(plan)
