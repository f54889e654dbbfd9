"""Run models on mutated sources of transformers: `python -m ci.futures`."""
