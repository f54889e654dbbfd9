"""Test the kernels of the forks without a GPU: emulated, interpreted, compiled."""
