"""Model families: the way each carries its state, and the list of those supported.

Other rooms use the modules in `__all__`; the remaining modules are private to this room.
"""

__all__ = [
    "base",
    "delta",
    "exact",
    "fla_rwkv",
    "gradients",
    "lookup",
    "mamba1",
    "mamba2",
    "mamba2_kernels",
    "positions",
    "rwkv4",
    "states",
    "supported",
    "tiny_models",
    "wrapped",
]
