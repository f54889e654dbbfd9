"""Documents out of text files, folders, JSONL and Parquet: one at a time, and what is wrong."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")


class Document(NamedTuple):
    """A text to embed.

    Attributes:
        id: Its name: the path of a text file, `FILE:LINE`, or what the id column says.
        text: The text, never empty.
        size: Length of the text in bytes of UTF-8.
        sha256: SHA-256 of those bytes, in hexadecimal digits.
        where: The place it was read from: `FILE` or `FILE:LINE`, lines counted from 1.
    """

    id: str
    text: str
    size: int
    sha256: str
    where: str


class Problem(NamedTuple):
    """Something that is not a document: where, and what was found and is needed there."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


Items = Iterator[Document | Problem]


def read_documents(
    inputs: Sequence[Path], text_column: str, id_column: str | None, traceback: bool = False
) -> Items:
    """Read the inputs in their order, holding one document at a time (Parquet: a few rows).

    Args:
        inputs: Text files; folders, searched for `TEXT_SUFFIXES` in sorted order; `.jsonl` and
            `.parquet` files.
        text_column: Where the text is in JSONL and Parquet.
        id_column: Where the id is in JSONL and Parquet; without it, the id is `FILE:LINE`.
        traceback: Whether to raise an error that is not foreseen, instead of reporting it.

    Yields:
        Every document, and a `Problem` in place of what is not one. An id comes only once.
    """
    seen: dict[str, str] = {}
    for path in inputs:
        for item in _read_safely(path, text_column, id_column, traceback):
            if isinstance(item, Problem):
                yield item
            elif item.id in seen:
                what = f"found the id {item.id!r} of {seen[item.id]} again, needed an id of its own"
                yield Problem(item.where, what)
            else:
                seen[item.id] = item.where
                yield item


def _read_safely(path: Path, text_column: str, id_column: str | None, traceback: bool) -> Items:
    """Read an input, of which no fault keeps the other inputs from being read."""
    try:
        yield from _read_input(path, text_column, id_column)
    except MemoryError:
        what = "found too little memory for it, needed room: split it into smaller files"
        yield Problem(str(path), what)
    except Exception as error:
        if traceback:
            raise
        reason = f"{type(error).__name__}: {_one_line(error)}"
        yield Problem(str(path), f"found an error ({reason}), needed none; --traceback shows where")


def _read_input(
    path: Path, text_column: str, id_column: str | None
) -> Iterator[Document | Problem]:
    try:
        if path.is_dir():
            yield from _read_folder(path)
        elif not path.exists():
            yield Problem(str(path), "found nothing there, needed a file or a folder")
        elif not path.is_file():
            yield Problem(str(path), "found a device or a pipe, needed a file or a folder")
        elif path.suffix.lower() == ".jsonl":
            yield from _read_jsonl(path, text_column, id_column)
        elif path.suffix.lower() == ".parquet":
            yield from _read_parquet(path, text_column, id_column)
        else:
            yield _read_text(path)
    except OSError as error:
        yield _unreadable(path, error)


def _read_folder(folder: Path) -> Items:
    denied: list[OSError] = []
    paths = [
        Path(parent, name)
        for parent, _, names in os.walk(folder, onerror=denied.append)
        for name in names
        if name.lower().endswith(TEXT_SUFFIXES)
    ]
    for error in denied:
        yield _unreadable(Path(error.filename), error)
    if not paths and not denied:
        needed = " ".join(TEXT_SUFFIXES)
        yield Problem(str(folder), f"found no file for it, needed one that ends in {needed}")
    for path in sorted(paths):
        yield from _read_input(path, "", None)


def _read_text(path: Path) -> Document | Problem:
    data = path.read_bytes()
    try:
        return _document(str(path), str(path), data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        # The decoder counts from behind a byte order mark; what it holds is what it has decoded.
        line = error.object.count(b"\n", 0, error.start) + 1
        return _not_utf8(f"{path}:{line}", error)


def _read_jsonl(
    path: Path, text_column: str, id_column: str | None
) -> Iterator[Document | Problem]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig").strip()
                if not text:
                    continue
                record = json.loads(text)
            except UnicodeDecodeError as error:
                yield _not_utf8(where, error)
                continue
            except (ValueError, RecursionError) as error:
                # The decoder's own line number is always 1 here.
                reason = getattr(error, "msg", error)
                yield Problem(where, f"found broken JSON ({reason}), needed one object per line")
                continue
            if isinstance(record, dict):
                yield _from_record(where, record, text_column, id_column)
            else:
                yield Problem(where, f"found {_kind(record)}, needed a JSON object")


def _read_parquet(path: Path, text_column: str, id_column: str | None) -> Items:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    columns = [text_column] if id_column is None else [text_column, id_column]
    number = 0
    try:
        # The buffer makes it stream a column chunk instead of reading it whole.
        with pq.ParquetFile(path, buffer_size=1 << 20) as file:
            names = file.schema_arrow.names
            if missing := [column for column in columns if column not in names]:
                yield Problem(str(path), _no_column(missing[0], names))
                return
            if doubled := [column for column in columns if names.count(column) > 1]:
                yield Problem(str(path), _doubled(doubled[0]))
                return
            for batch in file.iter_batches(batch_size=16, columns=columns):
                for row in range(len(batch)):
                    number += 1
                    where = f"{path}:{number}"
                    try:
                        record = {name: batch[name][row].as_py() for name in columns}
                    except UnicodeDecodeError as error:
                        yield _not_utf8(where, error)
                    else:
                        yield _from_record(where, record, text_column, id_column)
    except MemoryError:  # Arrow's own is an ArrowException too.
        raise
    except pa.ArrowException as error:
        where = f"{path}:{number + 1}" if number else str(path)
        yield Problem(where, f"found broken Parquet ({_one_line(error)}), needed a whole file")


def _from_record(
    where: str, record: dict[str, Any], text_column: str, id_column: str | None
) -> Document | Problem:
    for column in (text_column, id_column):
        if column is not None and column not in record:
            return Problem(where, _no_column(column, record))
    text = record[text_column]
    name = where if id_column is None else record[id_column]
    if not isinstance(text, str):
        found = _kind(text)
        return Problem(where, f"found {found} in column {text_column!r}, needed a string")
    if isinstance(name, bool) or not isinstance(name, str | int):
        found = _kind(name)
        return Problem(where, f"found {found} in column {id_column!r}, needed a string or integer")
    return _document(where, str(name), text)


def _document(where: str, name: str, text: str) -> Document | Problem:
    if not text.strip():
        return Problem(where, "found an empty text, needed at least one character")
    try:
        # JSON's escapes and file names can hold half a surrogate pair.
        data = text.encode()
        name.encode()
    except UnicodeEncodeError:
        what = "found half a surrogate pair in the text or its id, needed whole characters"
        return Problem(where, what)
    return Document(name, text, len(data), hashlib.sha256(data).hexdigest(), where)


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _no_column(column: str, names: Any) -> str:
    there = ", ".join(map(repr, names)) or "nothing"
    return f"found {there}, needed the column {column!r}"


def _doubled(column: str) -> str:
    return f"found the column {column!r} more than once, needed one of that name"


def _not_utf8(where: str, error: UnicodeDecodeError) -> Problem:
    byte = error.object[error.start]
    return Problem(where, f"found the byte 0x{byte:02x} that is not UTF-8, needed UTF-8 text")


def _unreadable(path: Path, error: OSError) -> Problem:
    reason = _one_line(error.strerror or error)
    return Problem(str(path), f"found that it cannot be read ({reason}), needed a readable file")


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
