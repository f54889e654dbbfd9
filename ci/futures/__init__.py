"""Models on mutated sources of transformers: `python -m ci.futures`."""
