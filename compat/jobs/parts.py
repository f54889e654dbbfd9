"""A folder of Parquet files that many processes write, each whole or not at all.

A file is named for the run that made it and for the documents that it was made of: who does the
same work again, after an actor was killed, replaces the file. What is finished is asked of an index
in SQLite beside the files, so that no process holds all ids.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from itertools import groupby, repeat
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from compat.jobs.documents import Document
from compat.jobs.journal import (
    PassageRow,
    Row,
    check_settings,
    read_output,
    record_batch,
    write_whole,
)

# Readers of folders pass over names that begin with an underscore or a dot.
_INDEX = "_finished.sqlite"
_TEMPORARY = ".tmp-"


def parts(folder: Path) -> list[Path]:
    """Return the files of rows, those of later runs last."""
    return sorted(folder.glob("*.parquet"))


def next_run(folder: Path) -> int:
    """Return the number of a run that begins, and remove what killed ones were writing."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        path.unlink(missing_ok=True)
    names = [path.name.split("-") for path in folder.glob("part-*.parquet")]
    return max((int(name[1]) for name in names if name[1].isdigit()), default=0) + 1


def write_part(
    folder: Path,
    run: int,
    documents: Sequence[Document],
    rows: Sequence[Row | PassageRow],
    settings: dict[str, str],
) -> None:
    """Write the rows that were made of some documents, which decide the name of the file."""
    made_of = "".join(f"{doc.id!r} {doc.sha256}\n" for doc in documents)
    name = f"part-{run:06d}-{hashlib.sha256(made_of.encode()).hexdigest()[:32]}.parquet"
    _write(folder / name, pa.Table.from_batches([record_batch(rows, settings)]))


def _write(path: Path, table: pa.Table) -> None:
    write_whole(path, table, path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}"))
    with suppress(OSError):  # Not every system can keep the name of a file this way.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def build_index(folder: Path, settings: dict[str, str]) -> int:
    """Index what is finished; of an id with several files, only the newest one's rows stay.

    One file's ids are held at a time.

    Returns:
        The number of rows.

    Raises:
        VerticalChunkingError: A file was made with other settings, or by somebody else.
    """
    drop_index(folder)
    files = parts(folder)
    with closing(_connect(folder)) as base:
        base.execute("CREATE TABLE finished (id TEXT, sha256 TEXT, file INTEGER)")
        base.execute("CREATE TABLE doubled (id TEXT PRIMARY KEY)")
        for number, path in enumerate(files):
            table = read_output(path, ["id", "sha256"])
            check_settings(path, table, settings)
            columns = table["id"].to_pylist(), table["sha256"].to_pylist()
            base.executemany(
                "INSERT INTO finished VALUES (?, ?, ?)", zip(*columns, repeat(number), strict=False)
            )
        base.execute("CREATE INDEX by_id ON finished (id, file)")
        base.execute(
            "CREATE TEMP TABLE stale AS SELECT DISTINCT f.file, f.id FROM finished f JOIN "
            "(SELECT id, max(file) AS newest FROM finished GROUP BY id "
            "HAVING min(file) < max(file)) n "
            "ON f.id = n.id AND f.file < n.newest ORDER BY f.file"
        )
        stale = base.execute("SELECT file, id FROM stale ORDER BY file")
        for number, found in groupby(stale, lambda row: row[0]):
            _drop_rows(files[number], [name for _, name in found])
        base.execute("DELETE FROM finished WHERE (file, id) IN (SELECT file, id FROM stale)")
        base.commit()
        return int(base.execute("SELECT count(*) FROM finished").fetchone()[0])


def _drop_rows(path: Path, ids: list[str]) -> None:
    table = read_output(path)
    left = table.filter(pc.invert(pc.is_in(table["id"], pa.array(ids, pa.string()))))
    if len(left):
        _write(path, left)
    else:
        path.unlink()


def note_ids(folder: Path, ids: Iterable[Sequence[str]]) -> None:
    """Note in the index which ids come more than once, out of all of the input, in portions."""
    with closing(_connect(folder)) as base:
        base.execute("CREATE TABLE seen (id TEXT)")
        for some in ids:
            base.executemany("INSERT INTO seen VALUES (?)", ((name,) for name in some))
        base.execute("INSERT INTO doubled SELECT id FROM seen GROUP BY id HAVING count(*) > 1")
        base.execute("DROP TABLE seen")
        base.commit()


def drop_index(folder: Path) -> None:
    """Remove the index, of which the next run makes a new one."""
    (folder / _INDEX).unlink(missing_ok=True)


def _connect(folder: Path) -> sqlite3.Connection:
    base = sqlite3.connect(folder / _INDEX)
    # A torn index is of no use and no harm: every run begins with a new one.
    base.execute("PRAGMA journal_mode = OFF")
    base.execute("PRAGMA synchronous = OFF")
    return base


class Finished:
    """The index, opened for reading, in any process that sees the folder."""

    def __init__(self, folder: Path) -> None:
        # Nobody writes while it is read, and a shared file system may have no locks.
        place = (folder / _INDEX).resolve().as_uri()
        self._base = sqlite3.connect(f"{place}?mode=ro&immutable=1", uri=True)

    def has(self, doc: Document) -> bool:
        """Return whether a document has its rows, made of the text that it has now."""
        found = self._base.execute("SELECT sha256 FROM finished WHERE id = ? LIMIT 1", [doc.id])
        return bool(found.fetchone() == (doc.sha256,))

    def is_doubled(self, doc: Document) -> bool:
        """Return whether the id of a document comes again in the input."""
        found = self._base.execute("SELECT 1 FROM doubled WHERE id = ?", [doc.id])
        return found.fetchone() is not None


def in_blocks(items: Iterable[object], rows: int, size: int) -> Iterator[list[object]]:
    """Yield items in lists of at most so many, with at most so many bytes of text.

    A text that is longer than that is alone.
    """
    block: list[object] = []
    held = 0
    for item in items:
        bytes_of_text = item.size if isinstance(item, Document) else 0
        if block and (len(block) == rows or held + bytes_of_text > size):
            yield block
            block, held = [], 0
        block.append(item)
        held += bytes_of_text
    if block:
        yield block
