"""What is installed and what it can do; attributes replaced and put back.

Other rooms use the modules of `__all__`; the others are the room's own.
"""

__all__ = ["behaviour", "hub_kernels", "patches", "recurrent_cache"]
