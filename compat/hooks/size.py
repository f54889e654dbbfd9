"""The vertical chunk size on its way to other processes, to which it brings the hooks along."""

from contextvars import ContextVar

encoding: ContextVar[bool] = ContextVar("compat_encoding", default=False)
"""Whether a call of `encode` in chunks is under way, which holds the hooks."""


class Size(int):
    """A vertical chunk size that turns the hooks on in the process that unpickles it.

    The switch, which knows how, registers that with `copyreg`.
    """


class Share(Size):
    """The size with a worker's share of the texts, which asks for word of what was cut."""
