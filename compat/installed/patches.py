"""Replace attributes of released libraries, and put the very same objects back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from compat.installed.recurrent_cache import STATES, parameters
from compat.installed.shared import Shared

Patch = tuple[Any, str, object]
"""A class or module, the name of an attribute, and what to put there."""


def wraps(original: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a function stand for a released one, as `functools.wraps` does, and remember which."""

    def mark(wrapper: Callable[..., Any]) -> Callable[..., Any]:
        wrapper = functools.wraps(original)(wrapper)
        wrapper._compat_released = original  # type: ignore[attr-defined]
        return wrapper

    return mark


def released(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the released function that one of compat's stands for; any other function as it is."""
    found: Callable[..., Any] = getattr(function, "_compat_released", function)
    return found


def arguments(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a call of a released function by name, without those that are None.

    The names are those under the function's decorators, and any that `**kwargs` would take.
    """
    names = parameters(function)
    named = dict(zip(names, args, strict=False))
    named |= {f"argument {place}": args[place] for place in range(len(names), len(args))}
    return {name: value for name, value in (named | dict(kwargs)).items() if value is not None}


class MixerCall(NamedTuple):
    """The arguments of a mixer's forward.

    Attributes:
        inputs: The first argument, (batch, seqlen, hidden_size); None where it cannot be found.
        state: The state to continue from, under any of its names.
        others: All other arguments that are not None, by name.
    """

    inputs: Any
    state: Any
    others: dict[str, Any]

    @classmethod
    def read(
        cls, forward: Callable[..., Any], mixer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> MixerCall:
        """Read a call of `forward(mixer, *args, **kwargs)`."""
        others = arguments(forward, (mixer, *args), kwargs)
        own, *names = parameters(forward) or ("",)
        others.pop(own, None)
        inputs = others.pop(names[0], None) if names else None
        states = [others.pop(name) for name in STATES if name in others]
        return cls(inputs, states[0] if states else None, others)


class Patches:
    """Attributes that were replaced, with their former values, for the length of a `with` block.

    Args:
        planned: The patches; if one of them fails, those before it are undone.
    """

    def __init__(self, planned: Sequence[Patch]) -> None:
        self._undo: list[Patch] = []
        try:
            for owner, name, value in planned:
                self._set(owner, name, value)
        except BaseException:
            self.undo()
            raise

    def __len__(self) -> int:
        return len(self._undo)

    def __enter__(self) -> Patches:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def _set(self, owner: Any, name: str, value: object) -> None:
        # An inherited attribute is overridden here, and the override is deleted later.
        before = vars(owner).get(name, self)
        setattr(owner, name, value)
        self._undo.append((owner, name, before))

    def undo(self) -> None:
        """Put back the very objects that were there before."""
        while self._undo:
            owner, name, before = self._undo.pop()
            if before is self:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


class Held(Shared[Patches]):
    """Patches that are in place while anybody holds them, in any thread."""

    def __init__(self, plan: Callable[[], Sequence[Patch]]) -> None:
        super().__init__(lambda: Patches(plan()))

    @property
    def patched(self) -> bool:
        """Return whether anything is replaced at this moment."""
        return bool(self.value)
