"""Check the kernels on a machine with a GPU."""
