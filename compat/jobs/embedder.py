"""Embed documents, some at a time, into rows or problems: what every way over a corpus shares."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import joblib  # type: ignore[import-untyped]
import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from compat.errors import VerticalChunkingError
from compat.hooks.cut_texts import CutTextWarning
from compat.hooks.streamed_texts import NoTokenError, counted, is_long
from compat.jobs.documents import NO_TOKEN, NOT_FINITE, Document, Problem
from compat.jobs.fingerprint import settings_of
from compat.jobs.journal import PassageRow, Row
from compat.jobs.limits import Limit
from compat.jobs.loading import in_short, is_of_memory, load_model
from compat.jobs.passages import Every, embed_passages
from compat.jobs.text_files import ChangedError
from compat.stream.rows import Auto
from compat.stream.spans import NoTokenInSpanError
from compat.stream.token_ids import TokenIds

# A document, and a row of it or why it has none.
Made = tuple[Document, Row | PassageRow | Problem]


class DocumentEmbedder:
    """A model that is loaded once, and embeds documents while the hooks are on.

    Args:
        model: The folder of a SentenceTransformer; None for the default model.
        vertical_chunk_size: Tokens of each text that go through the model at a time; "auto" for the
            fastest size.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: Where to compute; None for a GPU if there is one.
        max_seq_length: The most tokens of a text; None for the limit in the model's files.
        truncate: Whether longer texts are cut there.
        every: The tokens of the passages that are embedded in place of whole texts, and how many
            of them the next one has too.
        spans_column: The column that names the passages of each text, in place of `every`.

    Attributes:
        limit: The most tokens, and which texts had more.
        settings: What decides the numbers, in words.
        dimension: How many numbers an embedding has.
        passages: Whether there is a row for each passage.

    Raises:
        VerticalChunkingError: There is no such device or model, or it cannot be used.
    """

    def __init__(
        self,
        model: str | None,
        vertical_chunk_size: int | Auto,
        dtype: str = "auto",
        device: str | None = None,
        *,
        max_seq_length: int | None = None,
        truncate: bool = False,
        every: tuple[int, int] | None = None,
        spans_column: str | None = None,
    ) -> None:
        self._model = load_model(model, dtype, device)
        self.dimension = int(self._model.get_embedding_dimension() or 0)
        self._size = vertical_chunk_size
        self._every = None if every is None else Every(*every)
        self.passages = every is not None or spans_column is not None
        name = "default" if model is None else _name(model)
        self.settings = settings_of(self._model, name)
        self.limit = Limit(self._model, max_seq_length, truncate)
        self.settings["texts cut"] = str(self.limit)
        if self.passages:
            self.settings["spans"] = str(self._every or "in a column")

    def batches(self, documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
        """Yield documents to be embedded at the same time; those of passages are read alone."""
        rest = iter(documents)
        while batch := list(islice(rest, 1 if self.passages else size)):
            yield batch

    def __call__(self, batch: Sequence[Document], traceback: bool = False) -> list[Made]:
        """Embed documents side by side; where that fails, each alone, to find out which it was.

        Args:
            batch: The documents.
            traceback: Whether to raise what one document alone made fail, instead of reporting it.

        Returns:
            Each document with its row or a problem, or with each of its rows; problems that are
            seen early come first.
        """
        try:
            return list(self._read(batch))
        except VerticalChunkingError:
            raise
        except Exception as error:
            if traceback:
                raise
            if len(batch) == 1:
                return [(batch[0], Problem(batch[0].where, _what_failed(error)))]
        # Not in the handler: its error holds what the batch had taken of the device's memory.
        return [made for doc in batch for made in self([doc])]

    def _read(self, batch: Sequence[Document]) -> Iterator[Made]:
        if not self.passages:
            yield from _embed_texts(self._model, batch, self._size, self.limit)
            return
        for doc in batch:
            for item in embed_passages(self._model, doc, self._size, self.limit, self._every):
                yield doc, item


def take_granted_cpus() -> None:
    """Have no more threads than a container's quota of CPUs, which torch does not look at."""
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(min(torch.get_num_threads(), joblib.cpu_count()))


def _name(path: str) -> str:
    """The name by which the settings know a model."""
    return os.path.realpath(path) if Path(path).exists() else path


@contextmanager
def _counted_into(streamed: dict[int, TokenIds]) -> Iterator[None]:
    """Note the ids of each text that is streamed in a `with` block, by the text's `id`."""
    token = counted.set(lambda text, ids: streamed.update({id(text): ids}))
    try:
        yield
    finally:
        counted.reset(token)


def _what_failed(error: Exception) -> str:
    if isinstance(error, NoTokenError):
        return NO_TOKEN
    if isinstance(error, NoTokenInSpanError):
        return f"found that {str(error).partition(':')[0]}, needed a word in each span"
    if isinstance(error, ChangedError):
        return "found that it has changed since this command began, needed a file at rest"
    if is_of_memory(error):
        return "found too little memory for it, needed room: try a smaller --vertical-chunk-size"
    return f"found an error ({in_short(error)}), needed an embedding; --traceback shows where"


def _embed_texts(
    model: SentenceTransformer,
    batch: Sequence[Document],
    vertical_chunk_size: int | Auto,
    limit: Limit,
) -> Iterator[Made]:
    todo: list[tuple[Document, int | None]] = []
    streamed: dict[int, TokenIds] = {}
    for doc in batch:
        if is_long(doc.text):
            todo.append((doc, None))  # It is counted as it is read.
        elif (length := limit.num_tokens(doc)) is None:
            yield doc, Problem(doc.where, limit.problem(doc))
        elif length:
            todo.append((doc, length))
        else:
            yield doc, Problem(doc.where, NO_TOKEN)
    with warnings.catch_warnings(), _counted_into(streamed):
        # What is cut here is meant to be.
        warnings.simplefilter("ignore", CutTextWarning)
        vectors = model.encode_document(
            [doc.text for doc, _ in todo],
            prompt=limit.prompt,
            batch_size=len(batch),
            vertical_chunk_size=vertical_chunk_size,
        )
    for (doc, length), vector in zip(todo, vectors, strict=True):
        if length is None:
            ids = streamed.get(id(doc.text))
            length = limit.num_tokens(doc) if ids is None else limit.num_streamed(doc, ids)
        if length is None:
            yield doc, Problem(doc.where, limit.problem(doc))
        elif np.isfinite(vector).all():
            yield doc, Row(doc.id, length, vector, doc.sha256)
        else:
            yield doc, Problem(doc.where, NOT_FINITE)
