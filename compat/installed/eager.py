"""Run a function as it is, where torch.compile would trace it, or what it calls.

What compiled code computes in a chunk is the released code, which not every family continues
exactly; and a chunk with gradients is run twice, by the same code both times. So chunks are never
compiled, whoever has compiled the model, a part of it, or the function that calls it.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from compat.installed.shared import Shared

P = ParamSpec("P")
T = TypeVar("T")

# Runs compiled functions and modules as they are; it cannot be entered in compiled code.
nothing_compiled = Shared(lambda: torch.compiler.set_stance("force_eager"))
_alone: Callable[..., Any] | None = None

_REASON = (
    "Found: vertical chunks in a function compiled with fullgraph=True. Needed: a graph that "
    "may break where chunks are run, which are never compiled. Remedy: compile it without "
    "fullgraph=True"
)


def eager(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function, and all that it calls, run as if nothing were compiled.

    Whoever calls it from compiled code gets a break of the graph there; with fullgraph=True, torch
    raises an error that says so. While it runs, other threads do not run compiled code either,
    which changes none of their results.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if "torch._dynamo" not in sys.modules:  # Nothing was compiled; the import takes seconds.
            return function(*args, **kwargs)
        found: T = _outside()(function, args, kwargs)
        return found

    return run


def _outside() -> Callable[..., Any]:
    """Return `_run` so that torch.compile leaves it alone, where compiled code calls it."""
    global _alone
    if _alone is None:
        takes = inspect.signature(torch.compiler.disable).parameters
        said = {"reason": _REASON} if "reason" in takes else {}  # Since torch 2.7.
        _alone = torch.compiler.disable(_run, **said)
    return _alone


def _run(function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    with nothing_compiled:
        return function(*args, **kwargs)
