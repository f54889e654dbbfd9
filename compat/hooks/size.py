"""The vertical chunk size on its way to other processes, where it turns the hooks on."""

from contextvars import ContextVar

encoding: ContextVar[bool] = ContextVar("compat_encoding", default=False)
"""Whether a call of `encode` in chunks is under way, which holds the hooks."""


class Size(int):
    """A vertical chunk size that turns the hooks on in the process that unpickles it.

    The switch knows how to do that, and registers it with `copyreg`.
    """


class Share(Size):
    """A size that comes with a worker's share of the texts, and asks for a report of those cut."""
