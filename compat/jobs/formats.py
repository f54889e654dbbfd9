"""Tell the format of a file by its name: open it, or say why the format is not read."""

from __future__ import annotations

import bz2
import gzip
import io
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, cast

TEXTS = (".txt", ".md", ".rst", ".text")
JSON_LINES = (".jsonl", ".ndjson", ".jl")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
PACKED = (".gz", ".bz2", ".zst")

_PANDOC = "its text: pandoc -t plain makes a .txt file of it"
_TABLE = "a table that is read here: write it as .parquet or .csv"
_UNPACK = "what is in it: unpack it, and name that"

# Formats that hold texts but are not prose, and the way to make each readable.
_NEEDED_FOR = {
    ".json": "one JSON object a line: name it .jsonl if it is that already, else jq -c '.[]' "
    "makes lines of a list",
    ".ipynb": "its text: jupyter nbconvert --to markdown makes a .md file of it",
    ".pdf": "its text: pdftotext makes a .txt file of it",
    **dict.fromkeys((".docx", ".odt", ".rtf", ".epub", ".html", ".htm", ".xhtml"), _PANDOC),
    **dict.fromkeys((".doc", ".ppt", ".pptx", ".odp", ".xml"), "its text, as a .txt file"),
    **dict.fromkeys((".xls", ".xlsx", ".ods", ".arrow", ".feather", ".orc", ".avro"), _TABLE),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar", ".xz", ".lz4"), _UNPACK),
}


def suffixes(name: str | Path) -> tuple[str, str]:
    """Return the endings of a name in small letters: the format's suffix, and the compression's."""
    plain = Path(name).name.lower()
    packed = next((suffix for suffix in PACKED if plain.endswith(suffix)), "")
    return Path(plain.removesuffix(packed)).suffix, packed


def refusal(path: Path) -> str | None:
    """Say why a file of that name is not read, and what to do; None where it is read."""
    suffix, packed = suffixes(path)
    if suffix == ".parquet" and packed:
        return f"found .parquet inside {packed}, needed the .parquet itself: unpack it"
    needed = _NEEDED_FOR.get(suffix)
    return None if needed is None else f"found the format {suffix}, needed {needed}"


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading; compressed content is unpacked as it is read."""
    _, packed = suffixes(path)
    if packed == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if packed == ".bz2":
        return cast(BinaryIO, bz2.open(path))
    if packed == ".zst":
        import pyarrow as pa  # type: ignore[import-untyped]

        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
    return path.open("rb")


def is_torn(path: Path, error: Exception) -> bool:
    """Return whether an error while reading means that the compressed content is broken."""
    # An OSError that comes from the system has a number.
    broken = isinstance(error, EOFError | zlib.error) or (
        isinstance(error, OSError) and error.errno is None
    )
    return broken and suffixes(path)[1] != ""


def tally(names: Iterable[str | Path]) -> str:
    """Count the endings of names, and list them with the most frequent first."""
    counts = Counter("".join(suffixes(name)) or "no suffix" for name in names)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{suffix} {count}" for suffix, count in ordered[:6]]
    if rest := sum(count for _, count in ordered[6:]):
        words.append(f"others {rest}")
    told = ", ".join(words)
    data = {*JSON_LINES, *DELIMITERS, ".parquet"}
    if any(suffixes(name)[0] in data for name in names):
        told += "; to read tables and JSON lines, name them"
    return told
