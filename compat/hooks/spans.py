"""Embed spans of a text, each in the context of all the text before it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compat.hooks.pipeline import Pipeline
from compat.stream.chunk_size import settled
from compat.stream.rows import Auto
from compat.stream.spans import Span, SpanPooling, pieces_of, spans_of
from compat.stream.text import TextStream

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def encode_spans(
    model: SentenceTransformer,
    text: str | TextStream,
    spans: Iterable[Any],
    *,
    vertical_chunk_size: int | Auto,
    prompt: str | None = None,
    task: str | None = None,
) -> NDArray[Any]:
    """Embed spans of a text, each with all the text before it as its context.

    The text is read once, in vertical chunks, and the token embeddings of each span are pooled with
    the model's own pooling, then go through the modules behind it. A token belongs to the spans
    that its first character lies in; the tokens of the prompt, and those that the tokenizer puts
    around a text, belong to none. With the pooling `lasttoken` a span's embedding is that of the
    text up to the span's end, without an end token. This is "late chunking" (arXiv 2409.04701) for
    models that read forwards. The hooks of `enable_vertical_chunking` are not needed.

    The memory is that of a chunk, a window of text, the result, and of sums for the spans that are
    open at a time; a hybrid's keys and values grow with the text. What is behind the last span is
    not read.

    Example:
        >>> spans = compat.spans_by_tokens(model.tokenizer, book, every=256, overlap=32)
        >>> rows = compat.encode_spans(model, book, spans, vertical_chunk_size=512)
        >>> nearest = spans[int((rows @ model.encode("a question")).argmax())]

    Args:
        model: A SentenceTransformer of a supported family.
        text: The text.
        spans: Pairs (start, end) of characters, overlapping or not, in any order. Documents of
            LangChain from a splitter with `add_start_index=True`, and nodes of LlamaIndex, are
            taken as they are.
        vertical_chunk_size: Tokens in a chunk; "auto" for the fastest size.
        prompt: What stands before the text; None for the model's default prompt.
        task: "query" or "document", by which a Router chooses the modules; None for its default.

    Returns:
        The embeddings, (spans, dim), in the order of `spans`, and the dtype of `encode`.

    Raises:
        TypeError: An argument is of another type.
        ValueError: A span is empty, ends beyond the text or the model's limit, or has no token.
        UnsupportedTokenizerError: It cannot be shown that the ids would be those of the whole
            text.
        VerticalChunkingError: The model cannot be read in chunks.
    """
    wanted, text_pieces = spans_of(spans), pieces_of(text)
    if isinstance(text, str):
        _check_ends(wanted, range(len(wanted)), len(text))
    pipeline = Pipeline(model, prompt, task)
    size = max(settled(vertical_chunk_size, model.device), 2)
    if not wanted:
        return np.zeros((0, model.get_embedding_dimension() or 0), np.float32)
    pooling, chars = SpanPooling(wanted, pipeline.modes), 0

    def pieces() -> Iterator[str]:
        nonlocal chars
        yield pipeline.prompt
        for piece in text_pieces:
            chars += len(piece)
            yield piece

    tokens = _tokens(pipeline, pieces())
    reading, room = pipeline.reading(), _room(pipeline)
    while not pooling.done:
        chunk = list(islice(tokens, size if room is None else min(size, room - reading.start)))
        if not chunk:
            break
        ids, starts = zip(*chunk, strict=True)
        pooling.update(pipeline.token_wise(reading.read(ids)), starts)
    if not pooling.done:
        behind = next(tokens, None)
        if behind is not None:
            pooling.end_before(behind[1])
            _refuse_limit(wanted, pooling.unfinished(), pipeline.limit)
        else:
            _check_ends(wanted, pooling.unfinished(), chars)
            pooling.end_before(chars)
    return pipeline.finish(pooling.finalize())


def find_cut(
    model: SentenceTransformer,
    text: str | TextStream,
    *,
    prompt: str | None = None,
    task: str | None = None,
) -> tuple[int, int | None]:
    """Find where the model's limit cuts a text; its arguments are those of `encode_spans`.

    Returns:
        How many tokens the text has, the prompt's and special ones counted, and the character at
        which the first one begins that is not read; None where all are.
    """
    pipeline = Pipeline(model, prompt, task)
    room, place, count = _room(pipeline), None, 0
    for _, start in _tokens(pipeline, chain([pipeline.prompt], pieces_of(text))):
        if count == room:
            place = max(start, 0)
        count += 1
    return count + len(pipeline.tokenizer.special_tokens[1]), place


def _tokens(pipeline: Pipeline, pieces: Iterable[str]) -> Iterator[tuple[int, int]]:
    """The ids, and the characters of the text at which they begin: below 0 in front of it."""
    before, _ = pipeline.tokenizer.special_tokens
    shift = len(pipeline.prompt)
    for token in before:
        yield token, -1 - shift
    for ids, offsets in pipeline.tokenizer.offsets(pieces, add_special_tokens=False):
        for token, (start, _) in zip(ids, offsets, strict=True):
            yield token, start - shift


def _room(pipeline: Pipeline) -> int | None:
    """Return how many tokens are read, without those that are put behind a text."""
    if pipeline.limit is None:
        return None
    return max(pipeline.limit - len(pipeline.tokenizer.special_tokens[1]), 0)


def _check_ends(spans: list[Span], among: Iterable[int], chars: int) -> None:
    if beyond := [index for index in among if spans[index][1] > chars]:
        raise ValueError(
            f"Span {beyond[0]}, {spans[beyond[0]]}, ends beyond the text, which has {chars} "
            f"characters{_more(beyond)}: needed is end <= {chars}."
        )


def _refuse_limit(spans: list[Span], cut: list[int], limit: int | None) -> None:
    if cut:
        raise ValueError(
            f"Span {cut[0]}, {spans[cut[0]]}, ends beyond the model's limit of {limit} tokens, "
            f"where encode cuts a text{_more(cut)}: raise model.max_seq_length."
        )


def _more(indices: list[int]) -> str:
    return f" (and so do {len(indices) - 1} more)" if len(indices) > 1 else ""
