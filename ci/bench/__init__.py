"""Measure time and memory beside the alternatives: `python -m ci.bench`."""
