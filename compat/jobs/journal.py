"""The journal of finished rows beside the output, and the output that becomes of both."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from compat.errors import VerticalChunkingError

# The settings stand under this key of the metadata: a file without it is somebody else's.
SETTINGS_KEY = b"vertical_chunking"
# The first bytes of an Arrow IPC stream.
STREAM_START = b"\xff\xff\xff\xff"


class Row(NamedTuple):
    """A row of the output: what its columns are called and hold."""

    id: str
    num_tokens: int
    embedding: np.ndarray[Any, Any]
    sha256: str


class PassageRow(NamedTuple):
    """A row of an output of passages; those of one document are written together."""

    id: str
    start: int
    end: int
    embedding: np.ndarray[Any, Any]
    sha256: str


_TYPES = {
    "id": pa.string(),
    "num_tokens": pa.int64(),
    "start": pa.int64(),
    "end": pa.int64(),
    "sha256": pa.string(),
}


@contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """The journal, opened for appending and locked; an empty one is deleted in the end."""
    with path.open("ab") as file:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise VerticalChunkingError(
                    f"another command that is writing {path}",
                    "an output that no other command writes",
                    "wait for the other one, or give another --output",
                ) from error
            except OSError:
                pass  # a file system without locks
        try:
            yield file
        finally:
            if file.seek(0, os.SEEK_END) == 0:
                path.unlink()


def append(journal: BinaryIO, rows: Sequence[Row | PassageRow], settings: dict[str, str]) -> None:
    """Write the rows as one record batch, so that they outlive this process and the machine."""
    batch = record_batch(rows, settings)
    if journal.tell() == 0:
        journal.write(batch.schema.serialize())
    journal.write(batch.serialize())
    journal.flush()
    os.fsync(journal.fileno())


def record_batch(rows: Sequence[Row | PassageRow], settings: dict[str, str]) -> pa.RecordBatch:
    """Make a record batch of rows, with the settings in its schema's metadata."""
    columns = dict(zip(rows[0]._fields, zip(*rows, strict=True), strict=True))
    vectors = np.stack(columns["embedding"]).astype(np.float32)
    kind = pa.list_(pa.float32(), vectors.shape[1])
    embeddings = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), type=kind)
    arrays = {
        name: embeddings if name == "embedding" else pa.array(values, _TYPES[name])
        for name, values in columns.items()
    }
    return pa.record_batch(arrays, metadata={SETTINGS_KEY: json.dumps(settings)})


def read_journal(path: Path) -> tuple[pa.Table | None, int]:
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
            raise foreign(path) from error
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


def read_output(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read an output, or some columns of it; a file that is none raises that it is foreign."""
    try:
        # Not read_table, which would take a folder named a=b for a column.
        with pq.ParquetFile(path) as file:
            return file.read(columns)
    except pa.ArrowException as error:
        raise foreign(path) from error


def finished(output: Path, path: Path, settings: dict[str, str]) -> dict[str, str]:
    """The sha256 of every finished row's text, by id.

    Raises:
        VerticalChunkingError: One of the files was made with other settings, or by somebody else.
    """
    tables = []
    if output.exists():
        tables.append((output, read_output(output, ["id", "sha256"])))
    rows, _ = read_journal(path)
    if rows is not None:
        tables.append((path, rows))
    for file, table in tables:
        check_settings(file, table, settings)
    return {
        name: digest
        for _, table in tables
        for name, digest in zip(table["id"].to_pylist(), table["sha256"].to_pylist(), strict=True)
    }


def check_settings(file: Path, table: pa.Table, settings: dict[str, str]) -> None:
    """Raise if the rows of a file were made with other settings, or by somebody else."""
    metadata = table.schema.metadata or {}
    if SETTINGS_KEY not in metadata:
        raise foreign(file)
    found = json.loads(metadata[SETTINGS_KEY])
    # A file of whole texts, and the settings for one, do not speak of passages.
    keys = dict.fromkeys([*settings, *found])
    if differing := [key for key in keys if found.get(key) != settings.get(key)]:
        raise VerticalChunkingError(
            f"{file} with " + ", ".join(f"{key} {found.get(key)}" for key in differing),
            ", ".join(f"{key} {settings.get(key)}" for key in differing),
            f"give another --output, or delete {file}",
        )


def drop_torn_batch(path: Path, journal: BinaryIO) -> None:
    """Cut off what was being written when the process was killed."""
    _, end = read_journal(path)
    journal.truncate(end)
    journal.seek(end)


def foreign(path: Path) -> VerticalChunkingError:
    """Make the error for a file that the command did not write."""
    return VerticalChunkingError(
        f"{path}, which this command did not write",
        "a file that it wrote, or none",
        "give another --output, or move that file away",
    )


def merge(output: Path, path: Path, order: Iterable[str]) -> int:
    """Make the rows of output and journal the output: the newest row of each id, or passages.

    Args:
        output: The Parquet file, if there is one already.
        path: The journal.
        order: Ids in the order of the inputs; rows with other ids come after them.

    Returns:
        The number of rows.
    """
    tables = [read_output(output)] if output.exists() else []
    rows, _ = read_journal(path)
    if rows is not None:
        tables.append(rows)
    if not tables:
        return 0
    table = pa.concat_tables(tables)
    newest = _newest(tables)
    indices = [row for name in dict.fromkeys([*order, *newest]) for row in newest.get(name, ())]
    temporary = output.with_name(output.name + ".tmp")
    write_whole(output, table.take(pa.array(indices, pa.int64())), temporary)
    return len(indices)


def write_whole(path: Path, table: pa.Table, temporary: Path) -> None:
    """Write a Parquet file, by another name beside it: it is there whole or not at all."""
    try:
        with temporary.open("wb") as file:
            pq.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _newest(tables: Sequence[pa.Table]) -> dict[str, list[int]]:
    """Return for each id its newest rows, counted through all tables: those written together."""
    found: dict[str, list[int]] = {}
    row, last = 0, None
    for place, table in enumerate(tables):
        names, digests = table["id"].to_pylist(), table["sha256"].to_pylist()
        for name, digest in zip(names, digests, strict=True):
            if (place, name, digest) != last:
                found[name] = []
                last = place, name, digest
            found[name].append(row)
            row += 1
    return found
