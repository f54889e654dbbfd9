"""Wrappers around a transformers model: look through them where they change no result.

A model that `torch.compile` returned computes what the model in it does. A PEFT model does if it
passes its inputs on unchanged and all additions of an adapter lie in the layers; to find out, the
wrapper and the model in it are run on a few tokens and compared.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from compat.errors import UnsupportedModelError
from compat.installed.behaviour import in_eval_mode, shielded
from compat.installed.eager import nothing_compiled

# Both run the same layers on the same tokens, but a GPU may sum in another order.
_TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}
_TOLERANCE = 1e-2

# For each PEFT model, its parts when it was checked, and in which way it differed from the model in
# it.
_asked: weakref.WeakKeyDictionary[nn.Module, tuple[object, str]] = weakref.WeakKeyDictionary()


def unwrapped(model: Any) -> Any:
    """Return the model under wrappers of PEFT and `torch.compile`; any other model as it is.

    Raises:
        UnsupportedModelError: A wrapper does something of its own, or is another's.
    """
    while not isinstance(model, PreTrainedModel):
        if _is_compiled(model):
            _require_no_hooks(model, "compile the model in place: model.compile()")
            model = model._orig_mod
        elif _is_peft(model):
            model = _of_peft(model)
        else:
            _require_no_wrapper(model)
            break
    return model


def without_compile(module: Any) -> Any:
    """Return the module in one that `torch.compile` returned; any other as it is."""
    return module._orig_mod if _is_compiled(module) else module


def _is_compiled(model: Any) -> bool:
    """Return whether `torch.compile` returned this, without importing it, which takes seconds."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(model, cast(Any, dynamo).OptimizedModule)


def _is_peft(model: Any) -> bool:
    return isinstance(model, nn.Module) and all(
        hasattr(model, name) for name in ("peft_config", "base_model", "get_base_model")
    )


_INTO_THE_MODEL = (
    "put the adapter into the model itself: add_adapter(config) of the transformers model, or, "
    "once it is trained, merge_and_unload() of PEFT's"
)


def _of_peft(model: nn.Module) -> Any:
    """Return the model that PEFT has put its layers into."""
    configs: Any = model.peft_config
    for config in configs.values():
        kind = getattr(config.peft_type, "value", config.peft_type)
        why = ""
        if getattr(config, "is_prompt_learning", False):
            why = "puts tokens of its own before the text"
        elif getattr(config, "alora_invocation_tokens", None):
            why = "begins to work behind certain tokens of the whole text"
        if why:
            raise UnsupportedModelError(
                f"an adapter of PEFT of type {kind}, which {why}",
                "an adapter that lies in the layers, such as LoRA",
                "encode without vertical_chunk_size",
            )
    tuner: Any = model.base_model
    for wrapper in (model, tuner):
        _require_no_hooks(wrapper, _INTO_THE_MODEL)
    inner = cast(Any, model).get_base_model()
    key = (id(inner), type(tuner), tuple(sorted(configs)))
    known, reason = _asked.get(model, (None, ""))
    if known != key:
        reason = _difference(model, inner)
        _asked[model] = key, reason
    if reason:
        raise UnsupportedModelError(
            f"a {type(model).__name__} of PEFT, which {reason}",
            "a wrapper that gives the same as the model in it",
            _INTO_THE_MODEL,
        )
    return inner


def _difference(wrapper: nn.Module, inner: Any) -> str:
    """Say in which way a wrapper computes something else than its model; empty if it does not."""
    device, dtype = inner.device, inner.dtype
    vocabulary = inner.get_input_embeddings().weight.shape[0]
    generator = torch.Generator("cpu").manual_seed(0)
    # A comparison is not worth compiling for.
    with shielded(), in_eval_mode(wrapper), nothing_compiled:
        ids = torch.randint(3, vocabulary, (2, 12), generator=generator).to(device)
        try:
            found, wanted = (
                model(input_ids=ids, return_dict=True)[0] for model in (wrapper, inner)
            )
        except Exception as error:  # A wrapper may raise anything.
            said = str(error).partition("\n")[0]
            return f"cannot be run on tokens alone ({type(error).__name__}: {said})"
    if found.shape != wanted.shape:
        return f"gives a shape of {tuple(found.shape)} for one of {tuple(wanted.shape)}"
    difference = float((found.double() - wanted.double()).abs().max())
    scale = float(wanted.abs().max())
    same = difference <= _TOLERANCES.get(dtype, _TOLERANCE) * scale
    return "" if same else f"differs by {difference:.1g} from the model in it"


def _require_no_hooks(wrapper: nn.Module, remedy: str) -> None:
    if "forward" in vars(wrapper) and not _is_compiled(wrapper):
        own = "a forward of its own"
    elif wrapper._forward_hooks or wrapper._forward_pre_hooks:
        own = "hooks of its own"
    else:
        return
    raise UnsupportedModelError(
        f"a {type(wrapper).__name__} with {own} around the model",
        "hooks in the model itself, which chunks go through",
        remedy,
    )


def _require_no_wrapper(model: Any) -> None:
    """Refuse any other module around a transformers model, and say where in it the model is."""
    inside = model.named_modules() if isinstance(model, nn.Module) else ()
    for path, module in inside:
        if isinstance(module, PreTrainedModel):
            if all(name.isidentifier() for name in path.split(".")):
                raise UnsupportedModelError(
                    f"a {type(model).__name__} around a {type(module).__name__}",
                    "the transformers model itself, or in a wrapper of PEFT or torch.compile",
                    f"put the model in its place, which is its .{path}",
                )
            return
