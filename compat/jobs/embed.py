"""`python -m compat embed`: documents into a Parquet file, so that no finished row is ever lost.

Finished rows go to a journal beside the output, an Arrow IPC stream with one record batch for each
embedded batch. At the end the journal and the rows of an earlier output become the output in one
step. Journal and output carry in their schema's metadata the settings that decide the numbers.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import joblib  # type: ignore[import-untyped]
import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

import compat
from compat.errors import VerticalChunkingError
from compat.hooks import progress
from compat.hooks.cut_texts import CutTextWarning
from compat.hooks.streamed_texts import NoTokenError, counted, is_long
from compat.jobs.documents import (
    NO_TOKEN,
    NOT_FINITE,
    Document,
    Known,
    Note,
    Problem,
    read_documents,
)
from compat.jobs.fingerprint import settings_of
from compat.jobs.journal import PassageRow, Row, append, drop_torn_batch, finished, locked, merge
from compat.jobs.limits import Limit
from compat.jobs.loading import in_short, is_of_memory, label, load_model
from compat.jobs.passages import Every, embed_passages
from compat.jobs.text_files import ChangedError
from compat.stream.spans import NoTokenInSpanError
from compat.stream.token_ids import TokenIds


def embed(
    inputs: Sequence[Path],
    output: Path,
    *,
    model: str | None,
    vertical_chunk_size: int,
    batch_size: int,
    dtype: str,
    device: str | None,
    text_column: str,
    id_column: str | None,
    max_seq_length: int | None = None,
    truncate: bool = False,
    traceback: bool = False,
    every: tuple[int, int] | None = None,
    spans_column: str | None = None,
) -> int:
    """Embed the documents that the output does not have yet; the command's help says the rest.

    Args:
        traceback: Whether to raise what one document alone made fail, instead of reporting it.
        every: The tokens of the passages that are embedded in place of whole texts, and how many
            of them the next one has too.
        spans_column: The column that names the passages of each text, in place of `every`.

    Returns:
        The number of problems; each was one line on stderr.

    Raises:
        VerticalChunkingError: The command cannot be carried out; finished rows are kept.
        OSError: The output cannot be written; finished rows are kept.
    """
    reported: set[Problem | Note] = set()
    order: dict[str, None] = {}
    done: dict[str, str] = {}
    known: Known = {}

    def report(item: Problem | Note) -> None:
        # Both passes over the inputs meet the same ones.
        if item not in reported:
            reported.add(item)
            tqdm.write(str(item), file=sys.stderr)

    def unfinished() -> Iterator[Document]:
        for item in read_documents(inputs, text_column, id_column, traceback, known, spans_column):
            if not isinstance(item, Document):
                report(item)
                continue
            order[item.id] = None
            if done.get(item.id) != item.sha256:
                yield item

    size_of_passages = None if every is None else Every(*every)
    passages = every is not None or spans_column is not None
    path = output.with_name(output.name + ".partial")
    with locked(path) as journal:
        _take_granted_cpus()
        if (line := label(model)) is not None:
            print(line, file=sys.stderr)
        embedder = load_model(model, dtype, device)
        name = "default" if model is None else _name(model)
        settings = settings_of(embedder, name)
        limit = Limit(embedder, max_seq_length, truncate)
        settings["texts cut"] = str(limit)
        if passages:
            settings["spans"] = str(size_of_passages or "in a column")
        done.update(finished(output, path, settings))
        drop_torn_batch(path, journal)
        # A first pass tells what is wrong before hours of work, and how much there is to do.
        size = sum(doc.size for doc in unfinished())
        start, count, made, passed = time.perf_counter(), 0, 0, 0

        def read(batch: Sequence[Document]) -> Iterator[Row | PassageRow | Problem]:
            if passages:
                for doc in batch:
                    yield from embed_passages(
                        embedder, doc, vertical_chunk_size, limit, size_of_passages
                    )
            else:
                yield from _embed_texts(embedder, batch, vertical_chunk_size, limit)

        bar = tqdm(total=size, unit="B", unit_scale=True, desc="Embedding", disable=None)
        with compat.vertical_chunking(), bar, progress.into(bar):
            # Each document of passages is read by itself, and its rows are kept at once.
            for batch in _batches(unfinished(), 1 if passages else batch_size):
                rows = []
                for item in _embed_batch(read, batch, traceback):
                    if isinstance(item, Problem):
                        report(item)
                    else:
                        rows.append(item)
                if rows:
                    append(journal, rows, settings)
                count += len({row.id for row in rows})
                made += sum(getattr(row, "num_tokens", 1) for row in rows)
                # The bar has moved by characters; of the finished batch the bytes are known.
                passed += sum(doc.size for doc in batch)
                bar.update(passed - bar.n)
        seconds = time.perf_counter() - start
        kept = merge(output, path, order)
        journal.truncate(0)
    if (line := limit.summary()) is not None:
        print(line, file=sys.stderr)
    if kept:
        unit = "passages" if passages else "tokens"
        speed = f"{made} {unit} in {seconds:.1f} s ({made / seconds:.0f} {unit}/s)"
        _say(f"{count} documents, {speed}; {kept} rows in {output}")
    return sum(isinstance(item, Problem) for item in reported)


def _say(line: str) -> None:
    """Print on stdout; who has closed it does not want the line, and the rows are written."""
    try:
        print(line, flush=True)
    except OSError:
        # Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _batches(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    rest = iter(documents)
    while batch := list(islice(rest, size)):
        yield batch


def _name(path: str) -> str:
    """The name by which the settings know a model."""
    return os.path.realpath(path) if Path(path).exists() else path


def _take_granted_cpus() -> None:
    """Have no more threads than a container's quota of CPUs, which torch does not look at."""
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(min(torch.get_num_threads(), joblib.cpu_count()))


def _embed_batch(
    read: Callable[[Sequence[Document]], Iterator[Row | PassageRow | Problem]],
    batch: Sequence[Document],
    traceback: bool = False,
) -> list[Row | PassageRow | Problem]:
    """Embed documents side by side; where that fails, each alone, to find out which it was."""
    try:
        return list(read(batch))
    except VerticalChunkingError:
        raise
    except Exception as error:
        if traceback:
            raise
        if len(batch) == 1:
            return [Problem(batch[0].where, _what_failed(error))]
    # Not in the handler: its error holds what the batch had taken of the device's memory.
    return [item for doc in batch for item in _embed_batch(read, [doc])]


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
    model: SentenceTransformer, batch: Sequence[Document], vertical_chunk_size: int, limit: Limit
) -> Iterator[Row | Problem]:
    todo: list[tuple[Document, int | None]] = []
    streamed: dict[int, TokenIds] = {}
    for doc in batch:
        if is_long(doc.text):
            todo.append((doc, None))  # It is counted as it is read.
        elif (length := limit.num_tokens(doc)) is None:
            yield Problem(doc.where, limit.problem(doc))
        elif length:
            todo.append((doc, length))
        else:
            yield Problem(doc.where, NO_TOKEN)
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
            yield Problem(doc.where, limit.problem(doc))
        elif np.isfinite(vector).all():
            yield Row(doc.id, length, vector, doc.sha256)
        else:
            yield Problem(doc.where, NOT_FINITE)
