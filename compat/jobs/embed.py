"""`python -m compat embed`: documents into a Parquet file, so that no finished row is ever lost.

Finished rows go to a journal beside the output, an Arrow IPC stream with one record batch for each
embedded batch. At the end the journal and the rows of an earlier output become the output in one
step. Journal and output carry in their schema's metadata the settings that decide the numbers.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm.auto import tqdm

import compat
from compat.hooks import progress
from compat.jobs.documents import Document, Known, Note, Problem, read_documents
from compat.jobs.embedder import DocumentEmbedder, take_granted_cpus
from compat.jobs.journal import append, drop_torn_batch, finished, locked, merge
from compat.jobs.loading import label
from compat.stream.rows import Auto


def embed(
    inputs: Sequence[Path],
    output: Path,
    *,
    model: str | None,
    vertical_chunk_size: int | Auto,
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

    path = output.with_name(output.name + ".partial")
    with locked(path) as journal:
        take_granted_cpus()
        if (line := label(model)) is not None:
            print(line, file=sys.stderr)
        embedder = DocumentEmbedder(
            model,
            vertical_chunk_size,
            dtype,
            device,
            max_seq_length=max_seq_length,
            truncate=truncate,
            every=every,
            spans_column=spans_column,
        )
        settings = embedder.settings
        done.update(finished(output, path, settings))
        drop_torn_batch(path, journal)
        # A first pass tells what is wrong before hours of work, and how much there is to do.
        size = sum(doc.size for doc in unfinished())
        start, count, made, passed = time.perf_counter(), 0, 0, 0

        bar = tqdm(total=size, unit="B", unit_scale=True, desc="Embedding", disable=None)
        with compat.vertical_chunking(), bar, progress.into(bar):
            for batch in embedder.batches(unfinished(), batch_size):
                rows = []
                for _, item in embedder(batch, traceback):
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
    if (line := embedder.limit.summary()) is not None:
        print(line, file=sys.stderr)
    if kept:
        unit = "passages" if embedder.passages else "tokens"
        say_made(count, made, unit, seconds, f"{kept} rows in {output}")
    return sum(isinstance(item, Problem) for item in reported)


def say_made(documents: int, made: int, unit: str, seconds: float, where: str) -> None:
    """Say on stdout what a run has made, how fast, and where it is."""
    speed = f"{made} {unit} in {seconds:.1f} s ({made / seconds:.0f} {unit}/s)"
    _say(f"{documents} documents, {speed}; {where}")


def _say(line: str) -> None:
    """Print on stdout; who has closed it does not want the line, and the rows are written."""
    try:
        print(line, flush=True)
    except OSError:
        # Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
