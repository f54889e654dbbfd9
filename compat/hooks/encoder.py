"""List what is replaced in sentence-transformers, after a look at all that the hooks rely on.

    encode(vertical_chunk_size=...) -> _inference -> Transformer: a stream of chunks
                                                  -> Dense, Normalize: chunk by chunk
                                                  -> Pooling: the sentence embedding

`calls` has the hooks up to the modules, `modules` those in them, and `run` what both share.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from compat.errors import UnsupportedVersionError
from compat.hooks import calls, modules, training
from compat.hooks.own_chunks import KEYWORD, is_native
from compat.hooks.stored_default import (
    get_default,
    hook_encode,
    hook_get_model_config,
    hook_of_others,
    hook_parse_model_config,
    set_default,
)
from compat.installed.patches import Patch

Hold = Callable[[], AbstractContextManager[None]]
_Hooks = dict[type, dict[str, Callable[[Any], Callable[..., Any]]]]


def installed() -> bool:
    """Return whether sentence-transformers can be imported."""
    return importlib.util.find_spec("sentence_transformers") is not None


def plan(held: Hold) -> list[Patch]:
    """The class attributes to replace, after a look at all that the replacements rely on.

    Args:
        held: Holds the hooks for the length of a `with` block.

    Returns:
        Nothing where the library is not installed; where it does it itself, the default that is
        stored with a model, unless it has that too.

    Raises:
        UnsupportedVersionError: Something that a hook relies on is not there.
    """
    if not installed():
        return []
    if is_native():
        return _plan_default()
    try:
        from sentence_transformers import (
            CrossEncoder,
            MultiVectorEncoder,
            SentenceTransformer,
            SparseEncoder,
        )
        from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
        from sentence_transformers.sentence_transformer.modules import Pooling
    except ImportError as error:
        raise _unsupported(str(error)) from error
    hooks: _Hooks = {
        SentenceTransformer: {
            "encode": functools.partial(calls.hook_encode, held),
            "forward": lambda released: training.hook_forward(
                held, calls.hook_forward(held, released)
            ),
            "get_model_kwargs": calls.hook_get_model_kwargs,
            "_inference": calls.hook_inference,
            "_multi_process": calls.hook_multi_process,
            "preprocess": calls.hook_preprocess,
            "_get_model_config": hook_get_model_config,
            "_parse_model_config": hook_parse_model_config,
        },
        Transformer: {
            "forward": lambda released: training.hook_transformer(
                modules.hook_transformer(released)
            )
        },
        Dense: {"forward": modules.hook_token_wise},
        Normalize: {"forward": modules.hook_token_wise},
        Pooling: {"forward": modules.hook_pooling},
        CrossEncoder: {"predict": calls.hook_predict, "_parse_model_config": hook_of_others},
        MultiVectorEncoder: {"_parse_model_config": hook_of_others},
        SparseEncoder: {"_parse_model_config": hook_of_others},
    }
    _require_methods(hooks)
    if not callable(getattr(Router, "_resolve_route", None)):
        raise _unsupported("Router has no method _resolve_route")
    needed = {"inputs", "show_progress_bar", "output_value"}
    if missing := needed - set(inspect.signature(SentenceTransformer._inference).parameters):
        raise _unsupported(f"SentenceTransformer._inference has no argument {sorted(missing)}")
    for method in (SentenceTransformer.encode, SentenceTransformer._inference):
        if not _takes_keywords(method):
            raise _unsupported(f"SentenceTransformer.{method.__name__} takes no **kwargs")
    return [
        (SentenceTransformer, KEYWORD, property(get_default, set_default)),
        (SentenceTransformer, training.NAME, training.size_property),
        *_patches(hooks),
    ]


def _plan_default() -> list[Patch]:
    from sentence_transformers import SentenceTransformer

    if hasattr(SentenceTransformer, KEYWORD):
        return []
    hooks: _Hooks = {
        SentenceTransformer: {
            "encode": hook_encode,
            "_get_model_config": hook_get_model_config,
            "_parse_model_config": hook_parse_model_config,
        }
    }
    _require_methods(hooks)
    return [(SentenceTransformer, KEYWORD, property(get_default, set_default)), *_patches(hooks)]


def _require_methods(hooks: _Hooks) -> None:
    for owner, factories in hooks.items():
        for name in factories:
            method = getattr(owner, name, None)
            if not callable(method) or getattr(method, "__isabstractmethod__", False):
                raise _unsupported(f"{owner.__name__} has no method {name}")


def _patches(hooks: _Hooks) -> list[Patch]:
    return [
        (owner, name, make(getattr(owner, name)))
        for owner, factories in hooks.items()
        for name, make in factories.items()
    ]


def _unsupported(what: str) -> UnsupportedVersionError:
    import sentence_transformers

    return UnsupportedVersionError(
        f"sentence-transformers {sentence_transformers.__version__}: {what}",
        "a release whose SentenceTransformer, Transformer and Pooling are those of 6.2",
        'pip install "sentence-transformers>=6.2,<7"',
    )


def _takes_keywords(function: Callable[..., Any]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
