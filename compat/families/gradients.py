"""Find out whether a model's chunks can carry gradients, and run a chunk that does.

A kernel that is differentiable in its inputs may still ignore the gradient of the state that it
gives out: then the gradient is cut off at each border between chunks, without an error. So before a
model is trained in chunks, the tiny model of its class is run in one pass and in chunks, and the
gradients are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compat import ops
from compat.errors import UnsupportedModelError
from compat.families.base import Family
from compat.families.carried import CARRIERS, carrier_of
from compat.families.exact import Verdicts
from compat.families.fla import FlaRwkv
from compat.families.in_chunk import differentiable
from compat.installed.behaviour import in_eval_mode, shielded

# As a share of a parameter's largest gradient, in float32 on a CPU. Sums are taken in another
# order: up to 3e-6 was measured, and 0.5 to 1 where the gradient of the states is cut off.
_TOLERANCE = 1e-3
# Elsewhere, where products may be rounded more: as a share of the error with such cuts.
_SHARE = 0.25
_ENDS = (0, 9, 11, 20)
_ELSE = "train it in one pass, without chunks"
# Stock selective_scan_fn gives out a state and ignores its gradient.
_MENDED = "install mamba-ssm with the request selective-scan-states of forks/mamba-ssm, "
_MENDED_BY = {"mamba": _MENDED, "falcon_mamba": _MENDED}


def run(
    backbone: PreTrainedModel,
    family: Family,
    input_ids: Tensor,
    start: int,
    tensors: Sequence[Tensor] | None,
) -> tuple[Tensor, list[Tensor]]:
    """Run one chunk from a state that autograd can follow, which is not written to.

    Args:
        backbone: The model without its head.
        family: How its state is carried.
        input_ids: (batch, chunk) int64, without padding before any token.
        start: How many tokens of the text came before the chunk.
        tensors: The state after the chunk before, (batch, ...) each; None for the first chunk.

    Returns:
        The last hidden state, (batch, chunk, hidden_size), and the state after the chunk.
    """
    carrier = carrier_of(backbone, family)
    assert carrier is not None  # Asked by require_gradients.
    state = carrier.state(backbone, family, input_ids, tensors)
    with differentiable():
        hidden, state = family.forward(backbone, input_ids, start, state)
    return hidden, carrier.tensors(state)


def back(
    family: Family,
    outputs: Sequence[Tensor],
    sources: Sequence[Tensor],
    gradients: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """Take the gradients of a chunk that `run` has run.

    Args:
        family: How its state is carried.
        outputs: What came of the chunk.
        sources: Those whose gradients are wanted: a state, parameters.
        gradients: Those of the outputs.

    Returns:
        The gradients of the sources; None where one has no part in the outputs.
    """
    with differentiable(), family.backward():
        return torch.autograd.grad(outputs, sources, gradients, allow_unused=True)


def require_no_checkpointing(model: nn.Module) -> None:
    """Raise where gradient checkpointing is on, which would run a chunk's layers a third time.

    It runs them from a cache that their first run has changed.

    Raises:
        UnsupportedModelError: It is on, in a module in training mode.
    """
    if any(m.training and getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        raise UnsupportedModelError(
            f"a {type(model).__name__} with gradient checkpointing, which turns its cache off",
            "layers that give out their state; chunks keep no more activations than those of one",
            "call activation_checkpointing_disable() of the transformers model",
        )


def require_gradients(backbone: PreTrainedModel, family: Family) -> None:
    """Raise unless the gradients of a model in chunks are those of one pass.

    Raises:
        UnsupportedModelError: The model has attention, is of a family that is not known to carry
            gradients, has parameters in shards, or does not hand the gradient of its state on.
    """
    kind = getattr(backbone.config, "model_type", "")
    name = type(backbone).__name__
    if family.grows:
        raise UnsupportedModelError(
            f"{name}, whose attention layers keep keys and values: each chunk's gradient would "
            "reach all chunks before it",
            "a model without attention layers: " + ", ".join(CARRIERS),
            _ELSE,
        )
    if carrier_of(backbone, family) is None:
        raise UnsupportedModelError(
            f"{name}, whose layers are not known to hand on the gradient of a state",
            f"a model of transformers of one of the types {', '.join(CARRIERS)}, or one of "
            "flash-linear-attention of the types rwkv6, rwkv7",
            _ELSE,
        )
    if _is_sharded(backbone):
        raise UnsupportedModelError(
            f"{name} with its parameters in shards (FSDP or ZeRO-3), which are gathered for one "
            "forward and one backward of each layer",
            "whole parameters, as with DistributedDataParallel or ZeRO-2",
            "train it without shards",
        )
    if getattr(backbone, "_is_replica", False):
        raise UnsupportedModelError(
            f"{name} as a replica of DataParallel, which has no parameters of its own",
            "one process for each device, as with DistributedDataParallel",
            "start it with torchrun or accelerate launch",
        )
    if not any(p.requires_grad for p in backbone.parameters()):
        return  # A module behind it is trained, and its gradients need no state.
    if reason := verdicts.of(backbone, family):
        raise UnsupportedModelError(
            f"{name}, which {reason}",
            "layers that are differentiable in the state that they begin from and give out",
            _MENDED_BY.get(kind, "")
            + 'run it without kernels, as with compat.ops.using("torch"), or '
            + _ELSE,
        )


def _is_sharded(backbone: PreTrainedModel) -> bool:
    """Return whether DeepSpeed, or torch's FSDP of either kind, holds a share of the parameters."""
    return any(
        hasattr(p, name)
        for p in backbone.parameters()
        for name in ("ds_id", "_is_flat_param", "_fsdp_flattened", "placements")
    )


def _why_not(model: PreTrainedModel, family: Family) -> str:
    """Say in which way a model does not carry gradients; empty where it does."""
    with shielded(), model.device, in_eval_mode(model), torch.enable_grad():
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        vocabulary = cast(Any, model.get_input_embeddings()).weight.shape[0]
        generator = torch.Generator("cpu").manual_seed(0)
        ids = torch.randint(3, vocabulary, (2, _ENDS[-1]), generator=generator, device="cpu")
        ids = ids.to(model.device)
        try:
            whole = _in_one_pass(model, family, ids)
            weights = torch.randn(whole.shape, generator=generator, device="cpu").to(whole)
            wanted, found, cut = (
                back(family, [hidden], [*named.values()], [weights])
                for hidden in (
                    whole,
                    _in_chunks(model, family, ids),
                    _in_chunks(model, family, ids, cut=True),
                )
            )
        except Exception as error:  # Released layers may raise anything.
            said = str(error).partition("\n")[0]
            return f"cannot be run with gradients in chunks ({type(error).__name__}: {said})"
    off = _errors(wanted, found)
    if model.device.type == "cpu" and model.dtype in (torch.float32, torch.float64):
        exact = max(off) <= _TOLERANCE
    else:
        exact = sum(off) <= _SHARE * sum(_errors(wanted, cut))
    if exact:
        return ""
    worst = [*named][off.index(max(off))]
    return f"does not hand the gradient of its state on: that of {worst} is off by {max(off):.1g}"


def _in_one_pass(model: PreTrainedModel, family: Family, ids: Tensor) -> Tensor:
    """Return the hidden states by the released code; by the ops where it runs on a GPU alone."""
    if isinstance(family, FlaRwkv) and model.device.type == "cpu":
        return run(model, family, ids, 0, None)[0]
    with ops.using("released"):
        hidden: Tensor = model(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state
    return hidden


def _in_chunks(model: PreTrainedModel, family: Family, ids: Tensor, cut: bool = False) -> Tensor:
    """Return the hidden states in chunks; if `cut`, without the gradient of the states."""
    pieces, state = list[Tensor](), None
    for start, end in pairwise(_ENDS):
        hidden, state = run(model, family, ids[:, start:end], start, state)
        state = [part.detach() for part in state] if cut else state
        pieces.append(hidden)
    return torch.cat(pieces, 1)


def _errors(wanted: Sequence[Tensor | None], found: Sequence[Tensor | None]) -> list[float]:
    """Return the error of each gradient, as a share of its largest number."""
    errors = []
    for one, other in zip(wanted, found, strict=True):
        if one is None or other is None:
            errors.append(0.0 if one is other else 1.0)
            continue
        scale = max(float(one.abs().max()), torch.finfo(torch.float32).tiny)
        errors.append(float((one.double() - other.double()).abs().max()) / scale)
    return errors


verdicts = Verdicts(_why_not)
