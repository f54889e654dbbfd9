"""The switch, and the hooks into sentence-transformers.

Other rooms use the modules of `__all__`; the others are the room's own.
"""

__all__ = [
    "cut_texts",
    "progress",
    "refusals",
    "report",
    "streamed_texts",
    "switch",
]
