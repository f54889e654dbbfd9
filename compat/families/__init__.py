"""How each family of models carries its state, and which are supported.

Other rooms use the modules of `__all__`; the others are the room's own.
"""

__all__ = [
    "base",
    "exact",
    "lookup",
    "mamba1",
    "mamba2",
    "mamba2_kernels",
    "positions",
    "rwkv4",
    "supported",
    "tiny_models",
]
