"""The switch, and the hooks into sentence-transformers."""
