"""Whole corpora: documents in, rows out.

Other rooms use the modules in `__all__`; the remaining modules are private to this room.
"""

__all__ = [
    "embed",
    "loading",
    "text_files",
]
