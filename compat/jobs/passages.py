"""Passages of documents, each embedded in the context of all the text before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from sentence_transformers import SentenceTransformer

from compat.hooks import progress
from compat.hooks.spans import encode_spans, find_cut
from compat.jobs.documents import NO_TOKEN, NOT_FINITE, Document, Problem
from compat.jobs.journal import PassageRow
from compat.jobs.limits import Limit
from compat.stream.rows import Auto
from compat.stream.spans import Span, spans_by_tokens
from compat.stream.text import TextStream

_TASK = "document"


class Every(NamedTuple):
    """Passages of so many tokens each, of which the next one has the last `overlap` too."""

    tokens: int
    overlap: int

    def __str__(self) -> str:
        return f"every={self.tokens},overlap={self.overlap}"


def embed_passages(
    model: SentenceTransformer,
    doc: Document,
    vertical_chunk_size: int | Auto,
    limit: Limit,
    every: Every | None,
) -> Iterator[PassageRow | Problem]:
    """Embed the passages of a document: those that it names, or else `every` so many tokens.

    Yields:
        A row for each passage, or one problem. Of a text that the limit cuts, there are those in
        front of the cut; a passage that it goes through ends there.
    """
    spans = doc.spans or []
    if every is not None:
        tokens, overlap = every
        spans = spans_by_tokens(model.tokenizer, doc.text, every=tokens, overlap=overlap)
        if not spans:
            yield Problem(doc.where, NO_TOKEN)
            return
    cut = None
    if limit.tokens is not None:
        read, cut = find_cut(model, doc.text, prompt=limit.prompt, task=_TASK)
        if not limit.admits(doc, read):
            yield Problem(doc.where, limit.problem(doc))
            return
    if cut is not None:
        spans = [(start, min(end, cut)) for start, end in spans if start < cut]
        if not spans:
            yield Problem(doc.where, "found no passage in front of the limit, needed one")
            return
    yield from _rows(model, doc, spans, vertical_chunk_size, limit)
    if cut is not None and isinstance(doc.text, TextStream):
        for _ in doc.text:  # Which tells in the end whether it is still the same text.
            pass


def _rows(
    model: SentenceTransformer,
    doc: Document,
    spans: list[Span],
    vertical_chunk_size: int | Auto,
    limit: Limit,
) -> Iterator[PassageRow | Problem]:
    with progress.opened(0, show=False) as bar:

        def moving() -> Iterator[str]:
            for piece in doc.text:
                yield piece
                bar.update(len(piece))

        text = TextStream(moving) if isinstance(doc.text, TextStream) else doc.text
        vectors = encode_spans(
            model,
            text,
            spans,
            vertical_chunk_size=vertical_chunk_size,
            prompt=limit.prompt,
            task=_TASK,
        )
    if not np.isfinite(vectors).all():
        yield Problem(doc.where, NOT_FINITE)
        return
    for (start, end), vector in zip(spans, vectors, strict=True):
        yield PassageRow(doc.id, start, end, vector, doc.sha256)
