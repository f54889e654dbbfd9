"""Tokens in chunks through a model, and pooling over them."""
