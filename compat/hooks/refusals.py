"""Raise early for models and inputs that cannot be read in chunks: modules, backends, features."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compat.errors import UnsupportedPipelineError
from compat.families.lookup import backbone_of
from compat.families.wrapped import without_compile

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

TOKENS = "token_embeddings"

# Entries that a call of `encode` adds for itself, and tokenizer output that no recurrent model
# reads.
_IGNORED_FEATURES = frozenset({"input_ids", "attention_mask", "modality", "prompt_length", "task"})


def check_inputs(
    model: SentenceTransformer, inputs: list[Any], prompt: str | None, task: str | None
) -> None:
    """Refuse texts without a token: there is nothing to embed, and no exact answer."""
    extra = {} if task is None else {"task": task}
    for index, text in enumerate(inputs):
        if isinstance(text, str) and (not text or text.isspace()):
            features = model.preprocess([text], prompt=prompt, **extra)
            if not int(features["attention_mask"].sum()):
                raise without_token(text, f"Text {index}")


def check_tokens(inputs: Sequence[Any], features: Mapping[str, Any]) -> None:
    """Refuse any other text that the tokenizer has turned into no token, once it has run."""
    for text, mask in zip(inputs, features.get("attention_mask", ()), strict=False):
        if not mask.any():
            raise without_token(text)


def without_token(text: object, name: str = "A text") -> ValueError:
    """Return the error for a text that the tokenizer turns into no token."""
    return ValueError(
        f"{name} is {text!r}, of which the tokenizer makes no token; there is nothing to embed. "
        "Leave it out, or use a tokenizer that ends each text with a special token."
    )


def check_modules(model: SentenceTransformer, pooled: bool, task: str | None) -> None:
    """Refuse a model with a module that cannot work on a stream of chunks.

    Args:
        model: The model; only the modules that a text of `task` goes through are checked.
        pooled: True where its sentence embeddings are wanted, not those of its tokens.
        task: "query", "document" or None, by which a Router chooses.
    """
    first, *rest = route(list(model.children()), task)
    check_transformer(first)
    _check_output(first)
    expansion = getattr(first, "query_expansion", None)
    if expansion and task == "query" and not expansion["attend"]:
        raise UnsupportedPipelineError(
            "query expansion by tokens that the attention mask hides from the model",
            "tokens that the model reads",
            "expand queries with attend=True, or encode them without vertical_chunk_size",
        )
    if pooled:
        _check_until_pooling(rest)


def route(modules: list[Any], task: str | None) -> list[Any]:
    """Return the modules in the order in which a text meets them, each Router as its route.

    One that `torch.compile` returned counts as the module in it.
    """
    from sentence_transformers.base.modules import Router

    met: list[Any] = []
    for module in map(without_compile, modules):
        if isinstance(module, Router):
            name = str(module._resolve_route(task=task, modality="text"))
            met += route(list(module.sub_modules[name].children()), task)
        else:
            met.append(module)
    return met


def check_transformer(module: Any) -> None:
    """Refuse a first module that cannot read in chunks, whatever it does with the output."""
    from sentence_transformers.base.modules import Transformer

    if not isinstance(module, Transformer) or type(module).forward is not Transformer.forward:
        raise UnsupportedPipelineError(
            f"{type(module).__name__} as the first module",
            "a Transformer with the forward of sentence-transformers itself",
            "encode without vertical_chunk_size",
        )
    if module.backend != "torch":
        raise UnsupportedPipelineError(
            f"the {module.backend} backend",
            "the torch backend, which alone can carry the recurrent state",
            'load the model with backend="torch"',
        )
    backbone, _ = backbone_of(module.model)
    if getattr(backbone.config, "output_hidden_states", False):
        raise UnsupportedPipelineError(
            "a model with output_hidden_states, which keeps every layer of every token",
            "the last hidden state alone",
            "set model.transformers_model.config.output_hidden_states = False",
        )


def _check_output(module: Any) -> None:
    """Refuse a Transformer whose output is not token embeddings."""
    outputs = module.modality_config.get("text", {}).get("method_output_name")
    if module.module_output_name != TOKENS or outputs != "last_hidden_state":
        raise UnsupportedPipelineError(
            f"a Transformer that puts {outputs!r} into {module.module_output_name!r}",
            f"one that puts 'last_hidden_state' into {TOKENS!r}",
            "encode without vertical_chunk_size",
        )


def _check_until_pooling(modules: list[Any]) -> None:
    from sentence_transformers.base.modules import Dense, Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling

    for module in modules:
        if isinstance(module, Pooling) and type(module).forward is Pooling.forward:
            return
        known = type(module) in (Dense, Normalize)
        if not known or {module.module_input_name, module.module_output_name} != {TOKENS}:
            raise UnsupportedPipelineError(
                f"{type(module).__name__} between Transformer and Pooling",
                "modules that work on one token at a time there: Dense or Normalize from "
                f"{TOKENS!r} to {TOKENS!r}",
                "encode without vertical_chunk_size, or put the module behind Pooling",
            )
    raise UnsupportedPipelineError(
        "a model without Pooling",
        "a Pooling module, which makes one embedding of the stream of chunks",
        'add one, or ask for output_value="token_embeddings"',
    )


def check_features(module: Transformer, features: dict[str, Any]) -> None:
    """Refuse inputs that the model would read and that cannot be cut into chunks."""
    backbone, _ = backbone_of(module.model)
    declared = set(inspect.signature(backbone.forward).parameters)
    if extra := sorted((set(features) & declared) - _IGNORED_FEATURES):
        raise UnsupportedPipelineError(
            f"the inputs {extra} for {type(backbone).__name__}",
            "input_ids and attention_mask alone, of shape (batch, seqlen)",
            "encode without vertical_chunk_size",
        )
