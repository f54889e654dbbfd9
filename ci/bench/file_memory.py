"""Memory of `python -m compat embed` over the size of a file: `python -m ci.bench.file_memory`.

Files of up to 100 MB, each one text, go through the command in processes of their own, in chunks of
512 tokens: streamed, and with the token ids made of the whole text before, as the command did until
it streamed. Beside it, `encode` reads the same file in one pass. The peak of the whole process is
counted above the loaded model. Last comes the time of tokenizing alone, both ways. Writes a table
and, into --output, a plot; with --readme, both go into the README.

The goals: streamed, at most 60 MB, and the sizes within 10 MB of each other.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ci import corpus
from ci.bench.__main__ import machine
from ci.bench.measure import Measurement, free_bytes, measure
from ci.tables import markers

VERTICAL_CHUNK_SIZE = 512
ONE_PASS, WHOLE, STREAMED = "released, one pass", "chunks, tokens made before", "chunks, streamed"
# What a way takes, in bytes for each of the text, and more. Whole: 3.6 a token, 725 for each.
NEEDED = {ONE_PASS: 12_000, WHOLE: 300, STREAMED: 0}
COLORS = {ONE_PASS: "C3", WHOLE: "C1", STREAMED: "C0"}
TOKENIZED = 4_000_000  # Characters of which the tokenizing alone is timed.
PLOT = Path(__file__).parents[1] / "file-memory.png"


@dataclass
class Row:
    """A size of file in characters, and what was measured of it, by way; some were not run."""

    size: int
    found: dict[str, Measurement[int]]


def load() -> Any:
    """The default model, which has read a short text in chunks, and the command's libraries."""
    import compat
    from compat.jobs import embed as _embed  # noqa: F401 (not to be measured)
    from compat.jobs.loading import load_model

    model = load_model(None, "auto", "cpu")
    with compat.vertical_chunking():
        model.encode_document([corpus.text_of_length(8000)], vertical_chunk_size=512)
    return model


def embed(path: Path, whole: bool, model: Any) -> int:
    """Run the command on one file with a model that is loaded; returns the number of tokens."""
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    from compat.hooks import streamed_texts
    from compat.jobs import embed as _embed
    from compat.jobs import text_files

    if whole:
        streamed_texts.LONG = text_files.LONG = sys.maxsize
    loaded = mock.patch("compat.jobs.embedder.load_model", return_value=model)
    with loaded, tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "out.parquet")
        problems = _embed.embed(
            [path],
            output,
            model=None,
            vertical_chunk_size=VERTICAL_CHUNK_SIZE,
            batch_size=8,
            dtype="auto",
            device="cpu",
            text_column="text",
            id_column=None,
        )
        if problems:
            raise RuntimeError(f"{path} was not embedded.")
        return int(pq.read_table(output)["num_tokens"][0].as_py())


def in_one_pass(path: Path, model: Any) -> int:
    """Embed one file as the library does it without this project; returns the number of tokens."""
    text = path.read_text(encoding="utf-8")
    model.encode_document([text])
    return len(model.tokenizer(text, verbose=False)["input_ids"])


def tokenizing() -> tuple[float, float]:
    """Tokens a second: those of the whole text, and streamed."""
    from compat import StreamingTokenizer
    from compat.default_model import load_default_model

    tokenizer: Any = load_default_model(device="cpu").tokenizer
    text = corpus.text_of_length(TOKENIZED)
    streaming = StreamingTokenizer(tokenizer)
    start = time.perf_counter()
    count = len(tokenizer(text, verbose=False)["input_ids"])
    middle = time.perf_counter()
    if sum(map(len, streaming([text]))) != count:
        raise RuntimeError("The streamed tokens are others.")
    end = time.perf_counter()
    return count / (middle - start), count / (end - middle)


def measured(size: int, folder: Path, ways: Collection[str]) -> Row:
    """Measure one size, in the ways for which there is memory."""
    path = folder / f"{size}.txt"
    path.write_text(corpus.text_of_length(size), encoding="utf-8")
    works = {
        ONE_PASS: partial(in_one_pass, path),
        WHOLE: partial(embed, path, True),
        STREAMED: partial(embed, path, False),
    }
    room = [way for way in ways if size * NEEDED[way] < free_bytes() * 0.75]
    return Row(size, {way: measure(load, works[way]) for way in room})


def cells(row: Row) -> list[str]:
    """Return the row of the table."""
    peaks = [
        f"{row.found[way].peak_bytes / 1e6:,.0f} MB" if way in row.found else "not run"
        for way in NEEDED
    ]
    return [f"{row.size / 1e6:,g} MB", f"{row.found[STREAMED].result:,}", *peaks]


def section(rows: list[Row]) -> str:
    """Write the section of the README."""
    found = machine(torch.get_num_threads(), smoke=False)
    about = (
        "Peak memory of the process above that of the loaded model, by `python -m "
        f"ci.bench.file_memory`, on {datetime.now(UTC):%Y-%m-%d}, {found['cores']} cores of "
        f"{found['cpu']}, torch {found['torch']}, transformers {found['transformers']}, float32, "
        f"chunks of {VERTICAL_CHUNK_SIZE}:"
    )
    head = ["one text file", "tokens", *NEEDED]
    return markers.section(about, markers.table(head, map(cells, rows), numbers=True))


def plot(rows: list[Row], path: Path) -> None:
    """Write a PNG: peak memory over the size of the file, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for way, color in COLORS.items():
        points = [
            (row.size / 1e6, row.found[way].peak_bytes / 1e6) for row in rows if way in row.found
        ]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker="o", label=way)
        for x, y in points:
            axes.annotate(f"{y:,.0f}", (x, y), xytext=(4, 7), textcoords="offset points")
    axes.set_title("Memory of the whole process for one file, above that of the loaded model")
    axes.set(xscale="log", yscale="log", xlabel="size of the file, MB", ylabel="peak memory, MB")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,g}")
    axes.margins(0.1)
    axes.legend(frameon=False)
    axes.grid(color="0.9")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> int:
    """Measure, and print the table as it grows; 1 where a goal is not reached."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    sizes = [0.1, 1, 10, 100]
    parser.add_argument("--megabytes", type=float, nargs="+", default=sizes, metavar="MB")
    parser.add_argument("--streamed-only", action="store_true", help="leave the other ways out")
    parser.add_argument("--readme", action="store_true", help="write the README and its plot, too")
    parser.add_argument("--output", type=Path, default=Path("demo-out"), metavar="DIR")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    ways = [STREAMED] if options.streamed_only else [*NEEDED]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in options.megabytes:
            rows.append(measured(round(megabytes * 1e6), Path(folder), ways))
            print(*cells(rows[-1]), sep="  ", flush=True)
    whole, streamed = tokenizing()
    print(f"tokenizing alone: {whole:,.0f} tokens/s as a whole, {streamed:,.0f} streamed")
    plot(rows, options.output / "file-memory.png")
    print(f"\n{section(rows)}\n")
    if options.readme:
        plot(rows, PLOT)
        markers.put("file-memory", section(rows), markers.README)
    peaks = [row.found[STREAMED].peak_bytes / 1e6 for row in rows]
    reached = max(peaks) <= 60 and max(peaks) - min(peaks) <= 10
    print(
        f"largest {max(peaks):.0f} MB, at most 60; apart {max(peaks) - min(peaks):.0f}, at most 10"
    )
    return 0 if reached else 1


if __name__ == "__main__":
    raise SystemExit(main())
