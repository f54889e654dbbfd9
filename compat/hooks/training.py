"""The hooks into sentence-transformers for training: a call of the model in chunks, with gradients.

    model.training_chunk_size = 2048
    model(features) -> Transformer: a stream of chunks -> Pooling: embeddings with exact gradients

The size belongs to a run of training, not to the model: it is never stored. Where torch.compile has
compiled the model, a part of it or what calls it, chunks are run as they are all the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from compat.families.base import Family
from compat.hooks.own_chunks import KEYWORD
from compat.hooks.refusals import TOKENS, check_features, check_modules, route
from compat.hooks.stored_default import in_training
from compat.installed.eager import eager
from compat.stream.gradients import gradient_stream, trainable
from compat.stream.rows import Auto, align_left, check_size_or_auto, require_tokens

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

NAME = "training_chunk_size"

Method = Callable[..., Any]
Hold = Callable[[], AbstractContextManager[None]]


class _Call(NamedTuple):
    """A call of a model whose embeddings are to carry gradients.

    Attributes:
        backbone: The model without its head.
        family: How its state is carried.
        size: Tokens in a vertical chunk, or "auto".
        modules: The modules that work on single tokens, before Pooling.
    """

    backbone: PreTrainedModel
    family: Family
    size: int | Auto
    modules: list[nn.Module]


_call: ContextVar[_Call | None] = ContextVar("compat_training", default=None)


def _get(model: SentenceTransformer) -> int | Auto | None:
    """Return the tokens in a chunk of a training step; None where texts are read at once."""
    size: int | Auto | None = vars(model).get(NAME)
    return size


def _set(model: SentenceTransformer, value: int | Auto | None) -> None:
    """Set the size if it is a valid one; None stands for the released way."""
    vars(model)[NAME] = None if value is None else check_size_or_auto(value, NAME)


size_property = property(_get, _set)


def hook_forward(held: Hold, original: Method) -> Method:
    """Let a call of a model in training mode follow its size, whatever of it is compiled."""

    @eager
    def in_chunks(
        self: SentenceTransformer, size: int | Auto, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        features = args[0] if args else kwargs["input"]
        task = kwargs.get("task", features.get("task"))
        met = route(list(self.children()), task)
        module = getattr(met[0], "model", None)
        # Before the checks of the modules: it knows more of training.
        found = trainable(module) if isinstance(module, nn.Module) else None
        check_modules(self, True, task)
        assert found is not None  # A first module without a model does not pass the checks.
        token = _call.set(_Call(*found, size, _before_pooling(met)))
        try:
            with held():
                return original(self, *args, **kwargs)
        finally:
            _call.reset(token)

    @functools.wraps(original)
    def forward(self: SentenceTransformer, *args: Any, **kwargs: Any) -> Any:
        size = _get(self)
        # A model whose dropout is off may be trained, too.
        trained = in_training(self) or (self.training and torch.is_grad_enabled())
        if size is None or not trained or kwargs.get(KEYWORD) is not None:
            return original(self, *args, **kwargs)
        return in_chunks(self, size, args, kwargs)

    return forward


def _before_pooling(met: list[Any]) -> list[nn.Module]:
    from sentence_transformers.sentence_transformer.modules import Pooling

    return met[1 : [isinstance(module, Pooling) for module in met].index(True)]


def hook_transformer(original: Method) -> Method:
    """Let a Transformer give a stream of chunks in a call that carries gradients."""

    @functools.wraps(original)
    def forward(self: Transformer, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        # Chunks are never compiled, and a graph would break where the call is asked for.
        if torch.compiler.is_compiling() or (call := _call.get()) is None:
            return original(self, features, **kwargs)  # type: ignore[no-any-return]
        check_features(self, {**features, **kwargs})
        tokens, lengths = align_left(features["input_ids"], features.get("attention_mask"))
        require_tokens(lengths)
        features[TOKENS] = gradient_stream(
            call.backbone, call.family, tokens, lengths, call.size, call.modules
        )
        return features

    return forward
