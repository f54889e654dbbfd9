"""Documents out of text files, folders, JSON lines and tables: one at a time; what is wrong."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from compat.jobs.formats import (
    DELIMITERS,
    JSON_LINES,
    TEXTS,
    is_torn,
    open_file,
    refusal,
    suffixes,
    tally,
)
from compat.jobs.span_column import Span, digest, read_spans
from compat.jobs.text_files import NotTextError, TextFile, scan
from compat.stream.text import TextStream

# The csv module's own limit is 128 KiB a field; this is the largest that it takes everywhere.
csv.field_size_limit(2**31 - 1)


class Document(NamedTuple):
    """A text to embed.

    Attributes:
        id: Its name: the path of a text file, `FILE:LINE`, or what the id column says.
        text: The text, never empty; that of a long file is read in pieces.
        size: Length of the text in bytes of UTF-8.
        sha256: SHA-256 of those bytes, in hexadecimal digits.
        where: The place it was read from: `FILE` or `FILE:LINE`, lines counted from 1.
        spans: The passages that a column names, in characters; the sha256 is of both then.
    """

    id: str
    text: str | TextStream
    size: int
    sha256: str
    where: str
    spans: list[Span] | None = None


NO_TOKEN = "found a text of which the tokenizer makes no token, needed at least one"
NOT_FINITE = "found an embedding that is not finite, needed numbers: try another --dtype"


class Problem(NamedTuple):
    """Something that is not a document: where, and what was found and is needed there."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class Note(NamedTuple):
    """Something that is no fault, but that the user should know: where, and what."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class Columns(NamedTuple):
    """The names of the columns of JSON lines and tables; None where there is none."""

    text: str
    id: str | None
    spans: str | None

    def wanted(self) -> list[str]:
        """Return the names."""
        return [name for name in self if name is not None]


Items = Iterator[Document | Problem | Note]
Known = dict[Path, Document]


def read_documents(
    inputs: Sequence[Path],
    text_column: str,
    id_column: str | None,
    traceback: bool = False,
    known: Known | None = None,
    spans_column: str | None = None,
) -> Items:
    """Read the inputs in their order, holding one document at a time (Parquet: a few rows).

    Of a long text file nothing is held: its document reads it again.

    Args:
        inputs: Text files; folders, searched for `TEXTS` in sorted order; JSON lines, `.csv`,
            `.tsv` and `.parquet` files. All but the last may be compressed.
        text_column: Where the text is in JSON lines and tables.
        id_column: Where the id is there; without it, the id is `FILE:LINE`.
        traceback: Whether to raise an error that is not foreseen, instead of reporting it.
        known: Long text files that have been read before, and need not be read to be known.
        spans_column: Where the spans of a text's passages are; without it, texts have none.

    Yields:
        Every document, a `Problem` in place of what is not one, and a `Note` for what a folder
        has that is not read. An id comes only once.
    """
    seen: dict[str, str] = {}
    known = {} if known is None else known
    columns = Columns(text_column, id_column, spans_column)
    for path in inputs:
        for item in _read_safely(path, columns, traceback, known):
            if not isinstance(item, Document):
                yield item
            elif item.id in seen:
                what = f"found the id {item.id!r} of {seen[item.id]} again, needed an id of its own"
                yield Problem(item.where, what)
            else:
                seen[item.id] = item.where
                yield item


def _read_safely(path: Path, columns: Columns, traceback: bool, known: Known) -> Items:
    """Read an input, of which no fault keeps the other inputs from being read."""
    try:
        yield from _read_input(path, columns, known)
    except MemoryError:
        what = "found too little memory for it, needed room: split it into smaller files"
        yield Problem(str(path), what)
    except Exception as error:
        if traceback:
            raise
        reason = f"{type(error).__name__}: {_one_line(error)}"
        yield Problem(str(path), f"found an error ({reason}), needed none; --traceback shows where")


def _read_input(path: Path, columns: Columns, known: Known) -> Items:
    suffix, packed = suffixes(path)
    try:
        if path.is_dir():
            yield from _read_folder(path, columns, known)
        elif not path.exists():
            yield Problem(str(path), "found nothing there, needed a file or a folder")
        elif not path.is_file():
            yield Problem(str(path), "found a device or a pipe, needed a file or a folder")
        elif (what := refusal(path)) is not None:
            yield Problem(str(path), what)
        elif suffix in JSON_LINES:
            yield from _read_json_lines(path, columns)
        elif suffix in DELIMITERS:
            yield from _read_csv(path, DELIMITERS[suffix], columns)
        elif suffix == ".parquet":
            yield from _read_parquet(path, columns)
        elif columns.spans is not None:
            what = f"found a text file, needed a table or JSON lines with column {columns.spans!r}"
            yield Problem(str(path), what)
        else:
            yield known.get(path) or _read_text(path, known)
    except Exception as error:
        if is_torn(path, error):
            reason = _one_line(error)
            yield Problem(str(path), f"found broken {packed} ({reason}), needed a whole file")
        elif isinstance(error, OSError):
            yield _unreadable(path, error)
        else:
            raise


def _read_folder(folder: Path, columns: Columns, known: Known) -> Items:
    denied: list[OSError] = []
    files, again = _walk(folder, denied)
    paths = [path for path in files if _is_text(path)]
    left = [path for path in files if not _is_text(path)]
    for error in denied:
        yield _unreadable(Path(error.filename), error)
    if not paths and not denied:
        found = f"found no file for it ({tally(left)})" if left else "found no file for it"
        yield Problem(str(folder), f"{found}, needed one that ends in {' '.join(TEXTS)}")
    elif left:
        count = "1 file" if len(left) == 1 else f"{len(left)} files"
        yield Note(str(folder), f"{count} not read ({tally(left)})")
    if again:
        links = "1 link" if len(again) == 1 else f"{len(again)} links"
        what = f"{links} not followed ({again[0]}): that folder is read already"
        yield Note(str(folder), what)
    for path in sorted(paths):
        yield from _read_input(path, columns, known)


def _is_text(path: Path) -> bool:
    _, packed = suffixes(path)
    return path.name.lower().removesuffix(packed).endswith(TEXTS)


def _walk(folder: Path, denied: list[OSError]) -> tuple[list[Path], list[Path]]:
    """The files of all levels, and links to folders that other paths lead to.

    Links come last, so that a file has the path without them if there is one.
    """
    files: list[Path] = []
    again: list[Path] = []
    seen: set[tuple[int, int]] = set()
    tops = [folder]
    for top in tops:  # It grows.
        for parent, folders, names in os.walk(top, onerror=denied.append):
            place = Path(parent)
            try:
                status = place.stat()
            except OSError as error:
                denied.append(error)
                folders.clear()
                continue
            if (key := (status.st_dev, status.st_ino)) in seen:
                again.append(place)
                folders.clear()
                continue
            seen.add(key)
            files += [place / name for name in names]
            tops += [place / name for name in sorted(folders) if (place / name).is_symlink()]
    return files, again


def _read_text(path: Path, known: Known) -> Document | Problem:
    """Read a text file; a long one is not held, but is known from now on."""
    try:
        found = scan(path)
    except NotTextError as error:
        where = f"{path}:{error.line}"
        if error.byte:
            return _not_utf8(where, error.byte)
        return Problem(where, "found the byte 0x00, needed a text file in UTF-8")
    short = "" if found.blank else found.text
    made = _document(str(path), str(path), "long" if short is None else short)
    if short is None and isinstance(made, Document):
        text = TextStream(TextFile(path, found.sha256), found.size)
        made = known[path] = made._replace(text=text, size=found.size, sha256=found.sha256)
    return made


def _read_json_lines(path: Path, columns: Columns) -> Items:
    with open_file(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig").strip()
                if not text:
                    continue
                record = json.loads(text)
            except UnicodeDecodeError as error:
                yield _not_utf8(where, error.object[error.start])
                continue
            except (ValueError, RecursionError) as error:
                # The decoder's own line number is always 1 here.
                reason = getattr(error, "msg", error)
                yield Problem(where, f"found broken JSON ({reason}), needed one object per line")
                continue
            if isinstance(record, dict):
                yield _from_record(where, record, columns)
            else:
                yield Problem(where, f"found {_kind(record)}, needed a JSON object")


def _read_csv(path: Path, delimiter: str, columns: Columns) -> Items:
    # The csv module has rows of any length; pyarrow's has none longer than a block.
    with io.TextIOWrapper(
        open_file(path), encoding="utf-8-sig", errors="surrogateescape", newline=""
    ) as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        rows = _csv_rows(path, reader)
        names = next(rows, None)
        if names is None:
            yield Problem(str(path), "found no line, needed one with the names of the columns")
            return
        if isinstance(names, Problem):
            yield names
            return
        if problem := _columns_problem(path, columns.wanted(), names[1]):
            yield problem
            return
        for row in rows:
            if isinstance(row, Problem):
                yield row
                continue
            where, fields = row
            if len(fields) == len(names[1]):
                record = dict(zip(names[1], fields, strict=True))
                yield _from_record(where, record, columns)
            else:
                what = f"found {len(fields)} fields, needed {len(names[1])}, one for each column"
                yield Problem(where, what)


def _csv_rows(path: Path, reader: Any) -> Iterator[tuple[str, list[str]] | Problem]:
    """Return where each row begins, and its fields; empty lines are left out."""
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Problem(where, f"found a broken row ({error}), needed whole quoted fields")
            continue
        if (byte := _stray_byte(fields)) is not None:
            yield _not_utf8(where, byte)
        elif fields:
            yield where, fields


def _stray_byte(fields: Sequence[str]) -> int | None:
    """The first byte that was not UTF-8, in strings that were decoded with "surrogateescape"."""
    for field in fields:
        try:
            field.encode()
        except UnicodeEncodeError as error:
            return ord(field[error.start]) - 0xDC00
    return None


def _read_parquet(path: Path, columns: Columns) -> Items:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    wanted = columns.wanted()
    number = 0
    try:
        # The buffer makes it stream a column chunk instead of reading it whole.
        with pq.ParquetFile(path, buffer_size=1 << 20) as file:
            if problem := _columns_problem(path, wanted, file.schema_arrow.names):
                yield problem
                return
            for batch in file.iter_batches(batch_size=16, columns=wanted):
                yield from read_rows(batch, columns, str(path), number)
                number += len(batch)
    except MemoryError:  # Arrow's own is an ArrowException too.
        raise
    except pa.ArrowException as error:
        where = f"{path}:{number + 1}" if number else str(path)
        yield Problem(where, f"found broken Parquet ({_one_line(error)}), needed a whole file")


def read_rows(
    table: Any, columns: Columns, place: str, before: int = 0
) -> Iterator[Document | Problem]:
    """Read each row of an Arrow table or batch, which has the columns.

    Args:
        table: The rows.
        columns: The names of what is wanted of them.
        place: What the table is called where a row is named.
        before: How many rows of it came before these.
    """
    wanted = columns.wanted()
    for row in range(len(table)):
        where = f"{place}:{before + row + 1}"
        try:
            record = {name: table[name][row].as_py() for name in wanted}
        except UnicodeDecodeError as error:
            yield _not_utf8(where, error.object[error.start])
        else:
            yield _from_record(where, record, columns)


def _columns_problem(path: Path, wanted: Sequence[str], names: list[str]) -> Problem | None:
    for column in wanted:
        if column not in names:
            return Problem(str(path), _no_column(column, names))
        if names.count(column) > 1:
            what = f"found the column {column!r} more than once, needed one of that name"
            return Problem(str(path), what)
    return None


def _from_record(where: str, record: dict[str, Any], columns: Columns) -> Document | Problem:
    for column in columns.wanted():
        if column not in record:
            return Problem(where, _no_column(column, record))
    text = record[columns.text]
    name = where if columns.id is None else record[columns.id]
    if not isinstance(text, str):
        found = _kind(text)
        return Problem(where, f"found {found} in column {columns.text!r}, needed a string")
    if isinstance(name, bool) or not isinstance(name, str | int):
        found = _kind(name)
        return Problem(where, f"found {found} in column {columns.id!r}, needed a string or integer")
    made = _document(where, str(name), text)
    if columns.spans is None or isinstance(made, Problem):
        return made
    spans = read_spans(record[columns.spans], columns.spans, text)
    if isinstance(spans, str):
        return Problem(where, spans)
    return made._replace(spans=spans, sha256=digest(made.sha256, spans))


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


def _not_utf8(where: str, byte: int) -> Problem:
    return Problem(where, f"found the byte 0x{byte:02x} that is not UTF-8, needed UTF-8 text")


def _unreadable(path: Path, error: OSError) -> Problem:
    reason = _one_line(error.strerror or error)
    return Problem(str(path), f"found that it cannot be read ({reason}), needed a readable file")


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
