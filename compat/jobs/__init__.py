"""Whole corpora: documents in, rows out."""
