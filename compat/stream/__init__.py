"""Texts that come in pieces: their token ids, in the memory of a window."""
