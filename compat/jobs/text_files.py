"""Text files of any length, compressed or not: read once to know them, and again to embed them."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from compat.jobs.formats import open_file

# Bytes of a file that are held; of a longer one, a piece at a time.
LONG, PIECE = 1 << 17, 1 << 16


class ChangedError(Exception):
    """A file is not what it was when it was read before."""


class NotTextError(Exception):
    """A file is not text in UTF-8: the line, counted from 1, and the first byte that is not."""

    def __init__(self, line: int, byte: int) -> None:
        super().__init__(line, byte)
        self.line = line
        self.byte = byte


class Scan(NamedTuple):
    """The facts about a text that its first reading gives.

    Attributes:
        text: The text, where it is short.
        blank: Whether it is nothing but white space.
        size: Length in bytes of UTF-8, without a byte order mark.
        sha256: SHA-256 of those bytes, in hexadecimal digits.
    """

    text: str | None
    blank: bool
    size: int
    sha256: str


def scan(path: Path) -> Scan:
    """Read a file, holding a piece at a time.

    Raises:
        NotTextError: It has a byte 0, or is not UTF-8; the former wherever it stands.
    """
    decoder, digest = codecs.getincrementaldecoder("utf-8-sig")(), hashlib.sha256()
    size, line, blank = 0, 1, True
    short: list[str] = []
    broken: NotTextError | None = None
    for data in _pieces(path):
        if b"\0" in data:
            raise NotTextError(line + data.count(b"\n", 0, data.index(b"\0")), 0)
        if broken is None:
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                # Its object is what the decoder held and got, without a byte order mark.
                there = line + error.object.count(b"\n", 0, error.start)
                broken = NotTextError(there, error.object[error.start])
            else:
                digest.update(encoded := text.encode())
                size += len(encoded)
                blank = blank and (not text or text.isspace())
                short = [*short, text] if size <= LONG else []
        line += data.count(b"\n")
    if broken is not None:
        raise broken
    return Scan("".join(short) if size <= LONG else None, blank, size, digest.hexdigest())


@dataclass(frozen=True)
class TextFile:
    """The text of a file that was scanned, piece by piece, whenever it is called.

    Attributes:
        path: The file.
        sha256: Of the text that it had then.
    """

    path: Path
    sha256: str

    def __call__(self) -> Iterator[str]:
        """Read it.

        Raises:
            ChangedError: It is another text; that is known in the end.
        """
        decoder, digest = codecs.getincrementaldecoder("utf-8-sig")(), hashlib.sha256()
        for data in _pieces(self.path):
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise ChangedError from error
            digest.update(text.encode())
            yield text
        if digest.hexdigest() != self.sha256:
            raise ChangedError


def _pieces(path: Path) -> Iterator[bytes]:
    """The bytes of a file, and in the end none."""
    with open_file(path) as file:
        while data := file.read(PIECE):
            yield data
    yield b""
