"""Time and memory, measured beside what else there is: `python -m ci.bench`."""
