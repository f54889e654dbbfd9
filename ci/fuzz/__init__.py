"""Streamed token ids against those of the whole text, on random tokenizers and nasty texts."""
