"""Models that take the chunk size themselves, in a module that names it in `forward_kwargs`.

This is sentence-transformers' own route from `encode` to a module, and that module then decides
what it reads in chunks. The hooks do not touch such a model, whatever the size is.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from compat.hooks.refusals import route

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

KEYWORD = "vertical_chunk_size"

_logger = logging.getLogger(__name__)
_told: weakref.WeakSet[Any] = weakref.WeakSet()


def is_native() -> bool:
    """Return whether the installed library's own Transformer takes the size."""
    from sentence_transformers.base.modules import Transformer

    return KEYWORD in inspect.signature(Transformer.forward).parameters


def reads_by_itself(model: SentenceTransformer, task: str | None) -> bool:
    """Return whether a module that a text of `task` goes through takes the size from the library.

    Where one does, an info message says so, once for each model.
    """
    named = dict(model.named_children())
    by_name = model.module_kwargs or {}
    takers = [module for name, module in named.items() if KEYWORD in by_name.get(name, ())]
    if not takers:
        modules = list(named.values())
        if all(KEYWORD not in _forward_kwargs(module) for module in model.modules()):
            return False  # A Router is not asked, as it may lack a route for the task.
        takers = [module for module in route(modules, task) if KEYWORD in _forward_kwargs(module)]
    if takers and model not in _told:
        _told.add(model)
        _logger.info(
            "%s takes %s itself: it is native for this model, and compat leaves it alone.",
            type(takers[0]).__name__,
            KEYWORD,
        )
    return bool(takers)


def _forward_kwargs(module: Any) -> Any:
    return getattr(module, "forward_kwargs", ())


def for_preprocess(model: SentenceTransformer, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments for `preprocess`, without the size if the input module does not take it.

    Given the size, such a module raises TypeError, and the library would try again with the prompt
    as a part of the text.
    """
    if KEYWORD not in kwargs or _takes(_reader(model, kwargs.get("task")), KEYWORD):
        return kwargs
    return {name: value for name, value in kwargs.items() if name != KEYWORD}


def _reader(model: SentenceTransformer, task: str | None) -> Callable[..., Any]:
    """Return the method that makes features of texts: `preprocess`, or the older `tokenize`."""
    from sentence_transformers.base.modules import InputModule

    module = route(list(model.children()), task)[0]
    read = getattr(type(module), "preprocess", None)
    old: Callable[..., Any] = module.tokenize if hasattr(module, "tokenize") else module.preprocess
    return old if read in (None, InputModule.preprocess) else module.preprocess


def _takes(function: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(function).parameters
    any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return any_name or name in parameters
