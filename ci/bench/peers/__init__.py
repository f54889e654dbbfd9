"""Compare compat with what else reads a recurrent model on a CPU: `python -m ci.bench.peers`."""
