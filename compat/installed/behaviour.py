"""Compare a released function with its replacement, by running both on tiny inputs.

A function is recognised by what it computes. Its text would not do: it does not show what the
functions that it calls do, and it may change while the numbers stay.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compat.installed.patches import Held
from compat.installed.recurrent_cache import beneath, innermost

# Both compute in float32, in another order, which costs some 4e-7. A difference in meaning is much
# larger, as inputs and weights are of order 1.
_TOLERANCE = 2e-5


class Differs(Exception):
    """Raised where a released function computes something else than its replacement; says what."""


_UNSAID = Held(lambda: [(logging.Logger, "warning_once", lambda *_args, **_kwargs: None)])


@contextmanager
def shielded() -> Iterator[None]:
    """Run tiny models whatever the caller's modes are, and leave these modes unchanged.

    What transformers says once, it does not say of them: that a function is slower than a kernel is
    true of the caller's model only if that calls it, and then it is said there.
    """
    with ExitStack() as stack:
        stack.enter_context(_UNSAID)
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        yield


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """Let what is drawn in a `with` block, on the CPU and a device, change nothing drawn later."""
    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    with torch.random.fork_rng(devices, device_type=kind):
        yield


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and afterwards back on in the modules in which it was on."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Draw:
    """Draw normal random numbers in float32 from a separate generator."""

    def __init__(self) -> None:
        self._generator = torch.Generator("cpu").manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        """Draw a tensor of the given shape."""
        return torch.randn(shape, generator=self._generator, dtype=torch.float32)


def compare(case: str, released: Tensor, ours: Tensor) -> None:
    """Compare the result of a released function with that of its replacement.

    Raises:
        Differs: They are not the same; the message has the case, and both figures where they differ
            most.
    """
    if released.shape != ours.shape:
        raise Differs(f"{case}: it gives a shape of {tuple(released.shape)}, ours {ours.shape}")
    difference = (released.double() - ours.double()).abs().flatten()
    if not difference.numel():
        return
    worst = int(difference.nan_to_num(nan=torch.inf).argmax())
    if not difference[worst] <= _TOLERANCE * max(1.0, float(released.abs().max())):
        a, b = float(released.flatten()[worst]), float(ours.flatten()[worst])
        raise Differs(f"{case}: it gives {a:.6g} where ours gives {b:.6g}")


def verdict(check: Callable[[Callable[..., Any]], None], function: Callable[..., Any]) -> str:
    """Say in one line why a check of a released function fails; empty where it passes.

    Any exception counts as a failure: another constructor, other attributes, other arguments. Where
    kernels for a GPU are installed, the functions that it calls cannot be run on a CPU; then
    transformers' own functions in torch are run in their place.
    """
    error: Exception = NotImplementedError()
    for run in (function, in_torch(function)):
        try:
            with shielded():
                check(run)
            return ""
        except Differs as difference:
            return str(difference)
        except Exception as other:
            error = other
    said = str(error).partition("\n")[0]
    return f"it cannot be run on tiny weights ({type(error).__name__}: {said})"


def _stands_for(found: Any, inner: Callable[..., Any]) -> bool:
    """Return whether a decorator calls this: the function itself, or a kernel of a package."""
    package, own = (f"{getattr(f, '__module__', '')}".partition(".")[0] for f in (found, inner))
    return found is inner or (isinstance(found, types.FunctionType) and package != own)


def in_torch(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a released function, with its decorators, call the released functions in plain torch."""
    inner = beneath(function)
    if not isinstance(function, types.FunctionType):
        return innermost(function)
    names, cells = function.__globals__, function.__closure__ or ()
    if inner is None:
        names = names | {
            name: innermost(names[name])
            for name in function.__code__.co_names
            if callable(names.get(name)) and not isinstance(names[name], type)
        }
    else:
        copied = in_torch(inner)
        cells = tuple(
            types.CellType(copied) if _stands_for(cell.cell_contents, inner) else cell
            for cell in cells
        )
    copy = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, cells or None
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return functools.wraps(function)(copy)
