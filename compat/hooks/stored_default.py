"""The default chunk size that a model carries in memory, and that is stored with it.

It is kept in the instance's __dict__ under its own name, so that it stays a plain attribute when
the hooks are off.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from compat.hooks.own_chunks import KEYWORD
from compat.stream.chunk_size import settled
from compat.stream.rows import Auto, check_size_or_auto

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_told: WeakSet[Any] = WeakSet()


def get_default(model: SentenceTransformer) -> int | Auto | None:
    """Return the tokens in a vertical chunk that `encode` uses where it is given none.

    None stands for reading whole texts, "auto" for the fastest size.
    """
    default: int | Auto | None = vars(model).get(KEYWORD)
    return default


def set_default(model: SentenceTransformer, value: int | Auto | None) -> None:
    """Set the default if it is a valid size; None removes it."""
    vars(model)[KEYWORD] = None if value is None else check_size_or_auto(value)


def settled_default(model: SentenceTransformer) -> int | None:
    """Return the default as a number; None where there is none."""
    default = get_default(model)
    return None if default is None else settled(default, model.device)


def hook_encode(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let an `encode` that takes the size itself be given the default."""

    @functools.wraps(original)
    def encode(self: SentenceTransformer, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get(KEYWORD) is None and (default := settled_default(self)) is not None:
            kwargs[KEYWORD] = default
        return original(self, *args, **kwargs)

    return encode


def hook_get_model_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let a model be saved with its default."""

    @functools.wraps(original)
    def _get_model_config(self: SentenceTransformer) -> dict[str, Any]:
        config: dict[str, Any] = original(self)
        if (default := get_default(self)) is not None:
            config[KEYWORD] = default
        return config

    return _get_model_config


def hook_parse_model_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let a model be loaded with its default."""

    @functools.wraps(original)
    def _parse_model_config(self: SentenceTransformer, model_config: dict[str, Any]) -> None:
        original(self, model_config)
        set_default(self, model_config.get(KEYWORD))

    return _parse_model_config


def hook_of_others(original: Callable[..., Any]) -> Callable[..., Any]:
    """Warn where a default is stored with an encoder that the hooks do not serve."""

    @functools.wraps(original)
    def _parse_model_config(self: Any, model_config: dict[str, Any]) -> None:
        original(self, model_config)
        if (default := model_config.get(KEYWORD)) is not None:
            warnings.warn(
                f"This {type(self).__name__} is stored with {KEYWORD}={default}, which is ignored: "
                "compat's hooks serve SentenceTransformer alone. It gives what it is meant to, but "
                "reads each text at once, in memory that grows with the text.",
                stacklevel=2,
            )

    return _parse_model_config


def in_training(model: SentenceTransformer) -> bool:
    """Return whether a call of the model is to give gradients; not so for a freshly loaded one."""
    # The encoder's own training flag is set from the start.
    backbone = model.transformers_model
    return model.training and (backbone is None or backbone.training)


def warn_of_whole_texts(model: SentenceTransformer, features: Any) -> None:
    """Warn, once for each model, that a call of its forward does not follow its default.

    No warning is due where a gradient is to come, or where all texts fit into one chunk.
    """
    default, ids = settled_default(model), features.get("input_ids")
    if default is None or in_training(model) or model in _told or ids is None:
        return
    if (longest := ids.shape[-1]) > default:
        _told.add(model)
        warnings.warn(
            f"This {type(model).__name__} has {KEYWORD}={default}, which encode follows, and a "
            f"call of the model does not: it reads texts of {longest} tokens at once, in memory "
            "that grows with them. Call encode, or pass the size: "
            f"model(features, {KEYWORD}={default}).",
            stacklevel=3,
        )
