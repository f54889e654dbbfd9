"""`python -m compat embed`: documents into a Parquet file, so that no finished row is ever lost.

Finished rows go to a journal beside the output, an Arrow IPC stream with one record batch for each
embedded batch. At the end the journal and the rows of an earlier output become the output in one
step. Journal and output carry in their schema's metadata the settings that decide the numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import joblib  # type: ignore[import-untyped]
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

import compat
from compat.errors import VerticalChunkingError
from compat.hooks import progress
from compat.hooks.cut_texts import CutTextWarning
from compat.hooks.streamed_texts import NoTokenError, counted, is_long
from compat.jobs.documents import Document, Known, Note, Problem, read_documents
from compat.jobs.limits import Limit
from compat.jobs.loading import in_short, is_of_memory, label, load_model
from compat.jobs.text_files import ChangedError
from compat.stream.token_ids import TokenIds

# The settings stand under this key of the metadata: a file without it is somebody else's.
SETTINGS_KEY = b"vertical_chunking"

_NO_TOKEN = "found a text of which the tokenizer makes no token, needed at least one"

# The first bytes of an Arrow IPC stream.
STREAM_START = b"\xff\xff\xff\xff"


class Row(NamedTuple):
    """A row of the output: what its columns are called and hold."""

    id: str
    num_tokens: int
    embedding: np.ndarray[Any, Any]
    sha256: str


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
) -> int:
    """Embed the documents that the output does not have yet; the command's help says the rest.

    Args:
        traceback: Whether to raise what one document alone made fail, instead of reporting it.

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
        for item in read_documents(inputs, text_column, id_column, traceback, known):
            if not isinstance(item, Document):
                report(item)
                continue
            order[item.id] = None
            if done.get(item.id) != item.sha256:
                yield item

    path = output.with_name(output.name + ".partial")
    with _locked(path) as journal:
        _take_granted_cpus()
        if (line := label(model)) is not None:
            print(line, file=sys.stderr)
        embedder = load_model(model, dtype, device)
        name = "default" if model is None else _name(model)
        settings = _settings(embedder, name)
        limit = Limit(embedder, max_seq_length, truncate)
        settings["texts cut"] = str(limit)
        done.update(_finished(output, path, settings))
        _drop_torn_batch(path, journal)
        # A first pass tells what is wrong before hours of work, and how much there is to do.
        size = sum(doc.size for doc in unfinished())
        start, count, tokens, passed = time.perf_counter(), 0, 0, 0
        bar = tqdm(total=size, unit="B", unit_scale=True, desc="Embedding", disable=None)
        with compat.vertical_chunking(), bar, progress.into(bar):
            for batch in _batches(unfinished(), batch_size):
                rows = []
                for item in _embed_batch(embedder, batch, vertical_chunk_size, limit, traceback):
                    if isinstance(item, Problem):
                        report(item)
                    else:
                        rows.append(item)
                if rows:
                    _append(journal, rows, settings)
                count += len(rows)
                tokens += sum(row.num_tokens for row in rows)
                # The bar has moved by characters; of the finished batch the bytes are known.
                passed += sum(doc.size for doc in batch)
                bar.update(passed - bar.n)
        seconds = time.perf_counter() - start
        kept = _merge(output, path, order)
        journal.truncate(0)
    if (line := limit.summary()) is not None:
        print(line, file=sys.stderr)
    if kept:
        speed = f"{tokens} tokens in {seconds:.1f} s ({tokens / seconds:.0f} tokens/s)"
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


def _settings(model: SentenceTransformer, name: str) -> dict[str, str]:
    """Say what decides the numbers, in words; chunk size and batch size do not.

    Nor does max_seq_length, unless texts are cut there: `Limit` says where they are.
    """
    try:
        release = version("vertical-chunking")
    except PackageNotFoundError:  # a checkout that is not installed
        release = "unknown"
    return {
        "model": name,
        "fingerprint": _fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "compat": release,
    }


def _fingerprint(model: SentenceTransformer) -> str:
    """A hash of the modules' configuration, the vocabulary and a sample of every weight."""
    config: list[Any] = [model.prompts, model.default_prompt_name]
    config += [model.truncate_dim, model.tokenizer.get_vocab()]
    config += [(type(m).__name__, getattr(m, "get_config_dict", dict)()) for m in model]
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for key, weight in model.state_dict().items():
        flat = weight.detach().flatten()
        # Training moves every weight, so that a sample of each tensor tells models apart.
        sample = flat[:: max(1, len(flat) // 1024)].to("cpu", torch.float64)
        digest.update(f"{key} {tuple(weight.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _embed_batch(
    model: SentenceTransformer,
    batch: Sequence[Document],
    size: int,
    limit: Limit,
    traceback: bool = False,
) -> list[Row | Problem]:
    """Embed documents side by side; where that fails, each alone, to find out which it was."""
    try:
        return list(_embed_texts(model, batch, size, limit))
    except VerticalChunkingError:
        raise
    except Exception as error:
        if traceback:
            raise
        if len(batch) == 1:
            return [Problem(batch[0].where, _what_failed(error))]
    # Not in the handler: its error holds what the batch had taken of the device's memory.
    return [item for doc in batch for item in _embed_batch(model, [doc], size, limit)]


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
        return _NO_TOKEN
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
            yield Problem(doc.where, _NO_TOKEN)
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
            what = "found an embedding that is not finite, needed numbers: try another --dtype"
            yield Problem(doc.where, what)


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The journal, opened for appending and locked; an empty one is deleted in the end."""
    with path.open("ab") as file:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise VerticalChunkingError(
                    f"another command that is writing {path}",
                    "an output for this one alone",
                    "wait for the other one, or give another --output",
                ) from error
            except OSError:
                pass  # a file system without locks
        try:
            yield file
        finally:
            if file.seek(0, os.SEEK_END) == 0:
                path.unlink()


def _append(journal: BinaryIO, rows: Sequence[Row], settings: dict[str, str]) -> None:
    """Write the rows as one record batch, so that they outlive this process and the machine."""
    vectors = np.stack([row.embedding for row in rows]).astype(np.float32)
    kind = pa.list_(pa.float32(), vectors.shape[1])
    batch = pa.record_batch(
        {
            "id": pa.array([row.id for row in rows], pa.string()),
            "num_tokens": pa.array([row.num_tokens for row in rows], pa.int64()),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), type=kind),
            "sha256": pa.array([row.sha256 for row in rows], pa.string()),
        },
        metadata={SETTINGS_KEY: json.dumps(settings)},
    )
    if journal.tell() == 0:
        journal.write(batch.schema.serialize())
    journal.write(batch.serialize())
    journal.flush()
    os.fsync(journal.fileno())


def _read_journal(path: Path) -> tuple[pa.Table | None, int]:
    """The rows of all whole batches, and where the last of them ends in bytes.

    The rows lie in the mapped file, not in memory. Without a whole schema there is no table.

    Raises:
        VerticalChunkingError: This is not even the beginning of a journal.
    """
    batches: list[pa.RecordBatch] = []
    source = pa.memory_map(str(path))
    try:
        reader = pa.ipc.open_stream(source)
    except (pa.ArrowInvalid, OSError) as error:
        source.seek(0)
        if not STREAM_START.startswith(source.read(4)):
            raise _foreign(path) from error
        return None, 0
    end = source.tell()
    try:
        for batch in reader:
            batch.validate(full=True)
            batches.append(batch)
            end = source.tell()
    except (pa.ArrowInvalid, OSError):
        pass  # the batch that was being written when the process was killed
    return pa.Table.from_batches(batches, reader.schema), end


def _read_output(path: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        # Not read_table, which would take a folder named a=b for a column.
        with pq.ParquetFile(path) as file:
            return file.read(columns)
    except pa.ArrowException as error:
        raise _foreign(path) from error


def _finished(output: Path, path: Path, settings: dict[str, str]) -> dict[str, str]:
    """The sha256 of every finished row's text, by id.

    Raises:
        VerticalChunkingError: One of the files was made with other settings, or by somebody else.
    """
    tables = []
    if output.exists():
        tables.append((output, _read_output(output, ["id", "sha256"])))
    rows, _ = _read_journal(path)
    if rows is not None:
        tables.append((path, rows))
    for file, table in tables:
        metadata = table.schema.metadata or {}
        if SETTINGS_KEY not in metadata:
            raise _foreign(file)
        found = json.loads(metadata[SETTINGS_KEY])
        if differing := [key for key in settings if found.get(key) != settings[key]]:
            raise VerticalChunkingError(
                f"{file} with " + ", ".join(f"{key} {found.get(key)}" for key in differing),
                ", ".join(f"{key} {settings[key]}" for key in differing),
                f"give another --output, or delete {file}",
            )
    return {
        name: digest
        for _, table in tables
        for name, digest in zip(table["id"].to_pylist(), table["sha256"].to_pylist(), strict=True)
    }


def _drop_torn_batch(path: Path, journal: BinaryIO) -> None:
    """Cut off what was being written when the process was killed."""
    _, end = _read_journal(path)
    journal.truncate(end)
    journal.seek(end)


def _foreign(path: Path) -> VerticalChunkingError:
    return VerticalChunkingError(
        f"{path}, which this command did not write",
        "a file that it wrote, or none",
        "give another --output, or move that file away",
    )


def _merge(output: Path, path: Path, order: Iterable[str]) -> int:
    """Make the rows of output and journal the output, the newest row of each id.

    Args:
        output: The Parquet file, if there is one already.
        path: The journal.
        order: Ids in the order of the inputs; rows with other ids come after them.

    Returns:
        The number of rows.
    """
    tables = [_read_output(output)] if output.exists() else []
    rows, _ = _read_journal(path)
    if rows is not None:
        tables.append(rows)
    if not tables:
        return 0
    table = pa.concat_tables(tables)
    newest = {name: row for row, name in enumerate(table["id"].to_pylist())}
    indices = [newest[name] for name in dict.fromkeys([*order, *newest]) if name in newest]
    temporary = output.with_name(output.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            pq.write_table(table.take(pa.array(indices, pa.int64())), file)
            os.fsync(file.fileno())
        temporary.replace(output)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return len(indices)
