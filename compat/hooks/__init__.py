"""The switch that turns vertical chunking on, and the hooks into sentence-transformers.

Other rooms use the modules in `__all__`; the remaining modules are private to this room.
"""

__all__ = [
    "cut_texts",
    "progress",
    "refusals",
    "report",
    "spans",
    "streamed_texts",
    "switch",
]
