"""Whole corpora: documents in, rows out.

Other rooms use the modules in `__all__`; the remaining modules are private to this room.
`RowEmbedder` is for engines that spread a corpus over machines; README.md here has it for some.
"""

from __future__ import annotations

from importlib import import_module

__all__ = [
    "documents",
    "embed",
    "journal",
    "loading",
    "parts",
    "ray",
    "text_files",
]


def __getattr__(name: str) -> object:
    """Import the class when it is first asked for, since it needs pyarrow and torch."""
    if name == "RowEmbedder":
        return import_module("compat.jobs.rows").RowEmbedder
    raise AttributeError(f"module 'compat.jobs' has no attribute {name!r}")
