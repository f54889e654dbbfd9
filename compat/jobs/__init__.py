"""Whole corpora: documents in, rows out.

Other rooms use the modules of `__all__`; the others are the room's own.
"""

__all__ = [
    "embed",
    "loading",
    "text_files",
]
