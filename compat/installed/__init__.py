"""The installed libraries: find out what they do, replace attributes, and put them back.

Other rooms use the modules in `__all__`; the remaining modules are private to this room.
"""

__all__ = ["behaviour", "eager", "hub_kernels", "patches", "recurrent_cache", "shared"]
