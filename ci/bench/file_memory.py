"""Memory of `python -m compat embed` over the size of a file: `python -m ci.bench.file_memory`.

A file of 1, 10 and 100 MB, each one text, goes through the command in a process of its own, in
chunks of 512 tokens: streamed, and with its token ids made of the whole text before, as the command
did until it streamed. The peak is counted above the loaded model. Last comes the time of tokenizing
alone, both ways. Writes a table and, into --output, a plot.

The goals: streamed, at most 60 MB, and the sizes within 10 MB of each other.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from ci import corpus
from ci.bench.measure import Measurement, free_bytes, measure

VERTICAL_CHUNK_SIZE = 512
# What the whole text takes, in bytes for each of it (3.6 a token, 725 for each of these), and more.
WHOLE = 300
TOKENIZED = 4_000_000  # Characters of which the tokenizing alone is timed.


@dataclass
class Row:
    """A size of file in characters, and what was measured of it; None where it was not."""

    size: int
    streamed: Measurement[int]
    whole: Measurement[int] | None


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
    loaded = mock.patch.object(_embed, "load_model", return_value=model)
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


def measured(size: int, folder: Path, whole: bool) -> Row:
    """Measure one size, whole where it is asked for and there is memory for it."""
    path = folder / f"{size}.txt"
    path.write_text(corpus.text_of_length(size), encoding="utf-8")
    streamed = measure(load, partial(embed, path, False))
    room = whole and size * WHOLE < free_bytes() * 0.75
    return Row(size, streamed, measure(load, partial(embed, path, True)) if room else None)


def line(row: Row) -> str:
    """The row of the table."""
    tokens = row.streamed.result
    text = f"{row.size / 1e6:8,.0f}{tokens:14,}"
    for found in (row.whole, row.streamed):
        if found is None:
            text += f"{'not run':>20}"
        else:
            speed = tokens / found.seconds
            text += f"{found.peak_bytes / 1e6:10,.0f}{speed:10,.0f}"
    return text


def plot(rows: list[Row], path: Path) -> None:
    """Write a PNG: peak memory over the size of the file, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    lines = {
        "tokenized as a whole": ("C3", [(row.size, row.whole) for row in rows if row.whole]),
        "streamed": ("C0", [(row.size, row.streamed) for row in rows]),
    }
    for label, (color, found) in lines.items():
        points = [(size / 1e6, one.peak_bytes / 1e6) for size, one in found]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker="o", label=label)
        for x, y in points:
            axes.annotate(f"{y:,.0f}", (x, y), xytext=(4, 7), textcoords="offset points")
    axes.set_title("Memory of the whole process for one file, above that of the loaded model")
    axes.set(xscale="log", yscale="log", xlabel="size of the file, MB", ylabel="peak memory, MB")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,.0f}")
    axes.margins(0.1)
    axes.legend(frameon=False)
    axes.grid(color="0.9")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> int:
    """Measure, and print the table as it grows; 1 where a goal is not reached."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1, 10, 100], metavar="MB")
    parser.add_argument("--streamed-only", action="store_true", help="leave the whole text out")
    parser.add_argument("--output", type=Path, default=Path("demo-out"), metavar="DIR")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    print(f"{'':22}{'as a whole':>20}{'streamed':>20}")
    print(f"{'MB':>8}{'tokens':>14}" + f"{'peak MB':>10}{'tokens/s':>10}" * 2, flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in options.megabytes:
            row = measured(megabytes * 1_000_000, Path(folder), not options.streamed_only)
            rows.append(row)
            print(line(row), flush=True)
    whole, streamed = tokenizing()
    print(f"tokenizing alone: {whole:,.0f} tokens/s as a whole, {streamed:,.0f} streamed")
    plot(rows, options.output / "file-memory.png")
    peaks = [row.streamed.peak_bytes / 1e6 for row in rows]
    reached = max(peaks) <= 60 and max(peaks) - min(peaks) <= 10
    print(
        f"largest {max(peaks):.0f} MB, at most 60; apart {max(peaks) - min(peaks):.0f}, at most 10"
    )
    return 0 if reached else 1


if __name__ == "__main__":
    raise SystemExit(main())
