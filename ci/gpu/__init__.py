"""The kernels on a machine with a GPU."""
