"""Embed real text in one pass and in chunks, and compare: `python -m ci.demo [--output DIR]`.

The text is Python's own documentation: its topics as documents, all topics as one text, parts of
that text, and a text four times as long. Each embedding is made in a process of its own, which
measures its memory; a table is printed, and a plot written.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

import compat
from ci import corpus
from ci.measure import Measurement, free_bytes, measure
from compat import _progress
from compat._default_model import FOLDER, WEIGHTS_LABEL, load_default_model

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerBase

VERTICAL_CHUNK_SIZE = 512
BATCH_SIZE = 4
MODEL = "default model: Mamba2, 4 layers of 256, float32, on the CPU"
LONGEST_SECONDS = 90  # One embedding that would take longer is not made: the demo is to be short.
SHARE_OF_FREE = 0.9  # The estimate is rough, and the machine has other work to do.

Embedding = Measurement[np.ndarray]


@dataclass
class Row:
    """One line of the table: some texts, and how it went to embed them.

    Attributes:
        name: What the texts are.
        texts: The texts.
        tokens: The tokens of each, int64.
        tokenizer_bytes: Peak memory of making the tokens.
        full: In one pass, or None where that was not run.
        chunked: In chunks, or None where that was not run.
        estimate: Bytes that the full pass was thought to need, 0 for the first one.
        notes: Why something was not run.
    """

    name: str
    texts: list[str]
    tokens: list[np.ndarray]
    tokenizer_bytes: int
    full: Embedding | None = None
    chunked: Embedding | None = None
    estimate: float = 0
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Tokens of all texts."""
        return sum(map(len, self.tokens))

    @property
    def widest(self) -> int:
        """Tokens of the largest batch that a full pass holds at once, padding included."""
        return min(BATCH_SIZE, len(self.texts)) * max(map(len, self.tokens))


# What runs in the measured processes.


def load_tokenizer() -> PreTrainedTokenizerBase:
    """The default model's tokenizer, which has run once."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(FOLDER)
    tokenizer(corpus.text_of_length(1000))
    return tokenizer


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """The tokens of each text, int64."""
    return [np.array(ids) for ids in tokenizer(texts)["input_ids"]]


def load_model(texts: list[str], tokens: list[np.ndarray]) -> SentenceTransformer:
    """A model that has run once, and that finds the texts' tokens ready."""
    import torch
    import transformers
    from torch.nn.utils.rnn import pad_sequence

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    compat.enable_vertical_chunking()
    model = load_default_model(device="cpu")
    for size in (None, VERTICAL_CHUNK_SIZE):
        model.encode(corpus.text_of_length(4000), vertical_chunk_size=size)

    ready = dict(zip(texts, tokens, strict=True))

    def preprocess(inputs: list[str], **_: Any) -> dict[str, torch.Tensor]:
        ids = [torch.from_numpy(ready[text]) for text in inputs]
        mask = [torch.ones_like(row) for row in ids]
        return {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence(mask, batch_first=True),
        }

    model[0].preprocess = preprocess  # type: ignore[assignment]  # Typed as any submodule.
    return model


def embed(
    texts: list[str], name: str, vertical_chunk_size: int | None, model: SentenceTransformer
) -> np.ndarray:
    """`encode` as a user calls it; (len(texts), 256) float32."""
    characters = sum(map(len, texts))
    bar = tqdm(total=characters, desc=name, unit="char", unit_scale=True, leave=False, disable=None)
    with bar, _progress.into(bar):
        return model.encode(texts, batch_size=BATCH_SIZE, vertical_chunk_size=vertical_chunk_size)


# What runs in the demo itself.


def _texts() -> Iterator[tuple[str, list[str]]]:
    """The rows, the small ones first: the larger ones are estimated by them."""
    long = corpus.long_text()
    for part in (64, 16, 4):
        yield f"1/{part} of the topics", [long[: len(long) // part]]
    topics = list(corpus.topics().values())
    yield f"{len(topics)} topics, {BATCH_SIZE} at a time", topics
    yield "all topics as one text", [long]
    yield "the same and docstrings", [corpus.text_of_length(4 * len(long))]


def _run(row: Row, kind: str, size: int | None, seconds: float, needed: float) -> Embedding | None:
    """Embed, unless it would take too much time or memory; then, add a note to the row."""
    free = free_bytes()
    if needed > SHARE_OF_FREE * free or seconds > LONGEST_SECONDS:
        row.notes.append(
            f"{row.name}, {kind}: not run. By the run before, it would need about "
            f"{needed / 1e6:,.0f} MB and {seconds:.0f} s; {free / 1e6:,.0f} MB are free, and the "
            f"demo allows {LONGEST_SECONDS} s."
        )
        return None
    try:
        return measure(
            partial(load_model, row.texts, row.tokens),
            partial(embed, row.texts, f"{row.name}, {kind}", size),
        )
    except ChildProcessError as error:
        row.notes.append(f"{row.name}, {kind}: {error}")
        return None


def _rows() -> Iterator[Row]:
    """Measure row by row."""
    last_full: Row | None = None
    last_chunked: Row | None = None
    for name, texts in _texts():
        tokenized = measure(load_tokenizer, partial(tokenize, texts))
        row = Row(name, texts, tokenized.result, tokenized.peak_bytes)
        seconds = 0.0
        if last_full and last_full.full:
            row.estimate = last_full.full.peak_bytes * row.widest / last_full.widest
            seconds = last_full.full.seconds * row.total / last_full.total
        row.full = _run(row, "full", None, seconds, row.estimate)
        seconds = 0.0
        if last_chunked and last_chunked.chunked:
            seconds = last_chunked.chunked.seconds * row.total / last_chunked.total
        row.chunked = _run(row, "chunked", VERTICAL_CHUNK_SIZE, seconds, 0)
        last_full = row if row.full else last_full
        last_chunked = row if row.chunked else last_chunked
        yield row


def differences(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Largest absolute difference, and largest cosine distance of two rows (n, dim)."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return float(np.abs(a - b).max()), max(float((1 - cosine).max()), 0.0)


ABOUT = (
    "text: Python's documentation, of any length; each line is one call of encode\n"
    "peak MB: memory above the loaded model, for making the tokens and for reading them\n"
    "difference: between the embeddings of the two, as numbers and as cosine distance"
)
HEADER = (
    f"{'':24}{'':>9}{'tokenizer':>11}{'full pass':>18}"
    f"{f'in chunks of {VERTICAL_CHUNK_SIZE}':>20}{'difference':>20}\n"
    f"{'text':24}{'tokens':>9}{'peak MB':>11}{'seconds':>9}{'peak MB':>9}"
    f"{'seconds':>11}{'peak MB':>9}{'largest':>10}{'cosine':>10}"
)


def line(row: Row) -> str:
    """The row as a line under `HEADER`."""

    def cells(found: Embedding | None, width: int) -> str:
        if found is None:
            return f"{'not run':>{width + 9}}"
        return f"{found.seconds:{width}.1f}{found.peak_bytes / 1e6:9,.0f}"

    text = f"{row.name:24}{row.total:9,}{row.tokenizer_bytes / 1e6:11,.0f}"
    text += cells(row.full, 9) + cells(row.chunked, 11)
    if row.full and row.chunked:
        largest, cosine = differences(row.full.result, row.chunked.result)
        text += f"{largest:10.1e}{cosine:10.1e}"
    return text


def plot(rows: list[Row], path: Path) -> None:
    """Write a PNG: peak memory over the number of tokens of one text, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    single = [row for row in rows if len(row.texts) == 1]
    full = [(row.total, row.full.peak_bytes / 1e6) for row in single if row.full]
    chunked = [(row.total, row.chunked.peak_bytes / 1e6) for row in single if row.chunked]
    tokenizer = [(row.total, row.tokenizer_bytes / 1e6) for row in single]
    not_run = [(row.total, row.estimate / 1e6) for row in single if not row.full]
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")

    def draw(
        label: str,
        points: list[tuple[int, float]],
        color: str,
        numbers: str = "",
        above: bool = True,
        **style: Any,
    ) -> None:
        """A line with a label at its end, and a number at each point if a format is given."""
        if not points:
            return
        axes.plot(*zip(*points, strict=True), color=color, **style)
        text: dict[str, Any] = {"color": color, "textcoords": "offset points"}
        axes.annotate(label, points[-1], xytext=(11, 5), va="top", **text)
        for x, y in points if numbers else []:
            offset = (0, 8 if above else -15)
            axes.annotate(numbers.format(y), (x, y), xytext=offset, ha="center", size=9, **text)

    if not_run:
        draw("", full[-1:] + not_run, "C3", linestyle="--")
        draw(
            "one full pass:\nestimated, not run",
            not_run,
            "C3",
            "~{:,.0f}",
            marker="o",
            mfc="w",
            ls="",
        )
    draw("" if not_run else "one full pass", full, "C3", "{:,.0f}", marker="o")
    draw(f"chunks of {VERTICAL_CHUNK_SIZE}", chunked, "C0", "{:,.0f}", above=False, marker="o")
    draw("the tokenizer alone,\nthe same for both", tokenizer, "0.5", linestyle=":", marker=".")

    title = "Memory for embedding one text, above that of the loaded model"
    axes.set_title(title, loc="left", weight="bold", pad=24)
    axes.text(0, 1.03, MODEL, transform=axes.transAxes, color="0.4")
    axes.set(xscale="log", yscale="log", xlabel="length of the text, tokens")
    axes.set_ylabel("peak memory, MB")
    axes.set_xticks([row.total for row in single], [f"{row.total:,}" for row in single])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Measure, print the table as it grows, and write the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo-out"), metavar="DIR")
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    # Threads that wait for each other by spinning are many times slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    print(MODEL, WEIGHTS_LABEL, ABOUT, "", HEADER, sep="\n", flush=True)
    rows = []
    for row in _rows():
        print(line(row), flush=True)
        rows.append(row)
    for note in (note for row in rows for note in row.notes):
        print(f"\n{note}")
    path = output / "memory.png"
    plot(rows, path)
    print(f"\nPeak memory over length: {path}")


if __name__ == "__main__":
    main()
