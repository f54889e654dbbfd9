"""Rotary embeddings whose base depends on the length of a call: use that of the whole text.

With the types "dynamic" and "longrope" of transformers, the base follows the largest position of a
call, from the length on that the model was trained for. A chunk would be rotated in another way
than the text that it belongs to. So while a chunk is run, the released code is given the chunk's
positions and also the text's last one, whose result is dropped; this is done once for each length
of text among the rows.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compat.errors import UnsupportedModelError

Settled = AbstractContextManager[None]


def settling(backbone: PreTrainedModel, longest: int) -> Callable[[Tensor], Settled]:
    """Look at how a model's positions are rotated, once for all chunks of some texts.

    Args:
        backbone: The model without its head.
        longest: Tokens of the longest text.

    Returns:
        A function of (batch,) int64, the number of tokens of each row's whole text. It returns a
        context in which the positions of a chunk are rotated as those of the whole text are, in
        this thread.

    Raises:
        UnsupportedModelError: The base depends on the length, and it is not known where the model
            takes it from.
    """
    if (found := _setting(backbone.config, longest)) is None:
        return lambda lengths: nullcontext()
    name, kind, limit = found
    modules = [m for m in backbone.modules() if _follows_length(getattr(m, "rope_type", None))]
    if not modules or any("position_ids" not in _parameters(m) for m in modules):
        raise UnsupportedModelError(
            f"a text of {longest} tokens for a {backbone.config.model_type} with {name} "
            f"of type {kind!r}, whose base depends on the length of a call from {limit} tokens on",
            f"texts of fewer than {limit} tokens, or positions of another type",
            "encode it without vertical_chunk_size, or split the text yourself",
        )
    return functools.partial(_settled, modules)


@contextmanager
def _settled(modules: Sequence[nn.Module], lengths: Tensor) -> Iterator[None]:
    thread = threading.get_ident()

    def whole(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        # Another thread may run the same model on another text meanwhile.
        if threading.get_ident() != thread:
            return output
        return _of_whole_text(module, args, kwargs, lengths)

    with ExitStack() as hooks:
        for module in modules:
            handle = module.register_forward_hook(whole, with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def need_length(config: Any) -> bool:
    """Return whether a text's length has to be known before its first chunk is read.

    Args:
        config: The model's configuration.
    """
    return _setting(config, sys.maxsize) is not None


def _setting(config: Any, longest: int) -> tuple[str, str, int] | None:
    """Return the setting's name, its type, and the length where it begins to matter; else None.

    Some configurations have a setting for each type of layer, one level below.
    """
    for name in ("rope_parameters", "rope_scaling"):
        setting = getattr(config, name, None) or {}
        nested = [value for value in setting.values() if isinstance(value, Mapping)]
        for rope in [setting, *nested]:
            kind = str(rope.get("rope_type", rope.get("type")))
            known = rope.get("original_max_position_embeddings")
            limit: Any = known or getattr(config, "max_position_embeddings", 0)
            if _follows_length(kind) and longest >= limit:
                return name, kind, int(limit)
    return None


def _follows_length(rope_type: object) -> bool:
    """Return whether a type of rotary embeddings, or one of several, depends on the length."""
    kinds = rope_type.values() if isinstance(rope_type, Mapping) else [rope_type]
    return any("dynamic" in str(kind) or kind == "longrope" for kind in kinds)


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _of_whole_text(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], lengths: Tensor
) -> tuple[Tensor, ...]:
    """Return the cosines and sines of a chunk, (batch, chunk, width) each.

    The module keeps the base of the longest text that it has met. So a copy of it is called, which
    begins from the base of the training for each length.
    """
    given = dict(zip(_parameters(module), args, strict=False)) | kwargs
    positions = given["position_ids"]  # (batch, chunk), or (axes, batch, chunk); batch may be 1.
    asked = copy.copy(module)
    asked._buffers = {name: value.clone() for name, value in module._buffers.items()}
    ask = type(module).forward
    found: list[Tensor] = []
    for length in lengths.unique().tolist():
        ask(asked, **given | {"position_ids": torch.zeros_like(positions)})
        last = torch.full_like(positions[..., :1], length - 1)
        # Positions beyond a row's end belong to padding.
        reached = torch.cat([positions.clamp(max=length - 1), last], -1)
        turned = [t[..., :-1, :] for t in ask(asked, **given | {"position_ids": reached})]
        own = (lengths == length)[:, None, None]
        if found:
            turned = [torch.where(own, *pair) for pair in zip(turned, found, strict=True)]
        found = turned
    return tuple(found)
