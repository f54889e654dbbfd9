"""A text that is read in pieces, as often as needed: it stands for a str that may be too long."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path

# Characters that are read from a file at a time.
PIECE = 1 << 16


class TextStream:
    """A text in pieces, to be put in the place of a str among the texts that `encode` gets.

    It is read once for each embedding, and never held as a whole. To a pool of processes it goes as
    what it was made of: a file as its path.

    Example:
        >>> model.encode([TextStream.open("book.txt"), "a short text"], vertical_chunk_size=512)

    Args:
        source: The pieces, each a str of any length: something that can be iterated over again and
            again, such as a list, or a function without arguments that returns an iterator.
        size: About how many characters there are, for progress bars; None if that is not known.

    Raises:
        TypeError: source is a str or bytes, can be iterated over once only, or not at all.
    """

    def __init__(
        self, source: Iterable[str] | Callable[[], Iterable[str]], size: int | None = None
    ) -> None:
        if isinstance(source, str | bytes) or not (callable(source) or hasattr(source, "__iter__")):
            raise TypeError(
                "source must be an iterable of str, or a function that returns one; found "
                f"{type(source).__name__}. A str needs no TextStream; for a file there is "
                "TextStream.open(path)."
            )
        if not callable(source) and iter(source) is source:
            raise TypeError(
                f"source must be something that gives its pieces again and again; found "
                f"{type(source).__name__}, which gives them once. Pass the function that makes it."
            )
        self._source = source
        self.size = size

    @classmethod
    def open(cls, path: str | PathLike[str], encoding: str = "utf-8-sig") -> TextStream:
        r"""Make the text of a file, which is opened whenever the text is read.

        Args:
            path: The file.
            encoding: Its encoding. The default is UTF-8, with or without a byte order mark.

        Ends of lines stay as they are: no "\r\n" becomes "\n".

        Raises:
            OSError: There is no such file.
        """
        file = _File(fspath(path), encoding)
        return cls(file, Path(path).stat().st_size)

    def __iter__(self) -> Iterator[str]:
        """Read the text from its beginning, piece by piece."""
        pieces = self._source() if callable(self._source) else self._source
        for piece in pieces:
            if not isinstance(piece, str):
                raise TypeError(f"a piece of a TextStream must be a str; found {piece!r:.60}")
            yield piece

    def read(self) -> str:
        """The text as one str, in memory."""
        return "".join(self)

    def __repr__(self) -> str:
        return f"TextStream({self._source!r:.80}, size={self.size})"


@dataclass(frozen=True)
class _File:
    """A file's text, piece by piece."""

    path: str
    encoding: str

    def __call__(self) -> Iterator[str]:
        with Path(self.path).open(encoding=self.encoding, newline="") as file:
            while piece := file.read(PIECE):
                yield piece
