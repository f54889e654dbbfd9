"""Tokens in chunks through a model, and pooling over them; texts in pieces, spans of them.

Other rooms use the modules of `__all__`; the others are the room's own.
"""

__all__ = [
    "chunk",
    "chunk_size",
    "gradients",
    "growing_text",
    "hidden_states",
    "loop",
    "pooling",
    "reading",
    "rows",
    "shared_prefix",
    "spans",
    "text",
    "text_loop",
    "token_ids",
    "tokenizer",
    "training_size",
]
