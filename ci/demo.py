"""Search real text, embed it in one pass and in chunks, and compare: `python -m ci.demo`.

The text is Python's own documentation. First, questions are answered with the topics that are
nearest to them. Then these are embedded: the topics as documents, all of them as one text, parts of
that text, and longer texts, up to some hundred thousand tokens. Each of these embeddings is made in
a process of its own, which measures its memory; a table is printed, and a plot written.
"""

from __future__ import annotations

import argparse
import json
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
from ci.bench.measure import Measurement, free_bytes, measure
from compat.default_model import FOLDER, WEIGHTS_LABEL, load_default_model
from compat.hooks import progress

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerBase

VERTICAL_CHUNK_SIZE = 512
BATCH_SIZE = 4
LONGEST_SECONDS = 60  # The demo is to be short: an embedding that would take longer is left out.
SHARE_OF_FREE = 0.75  # The estimates are linear, but a small part of a full pass is quadratic.

_CONFIG = json.loads((FOLDER / "config.json").read_text())
MODEL = (
    f"default model: {_CONFIG['model_type']}, {_CONFIG['num_hidden_layers']} layers of "
    f"{_CONFIG['hidden_size']}, {_CONFIG['dtype']}, on the CPU"
)

# A newcomer's questions, in other words than the documentation's where there are some.
QUESTIONS = [
    "how do I define a generator",
    "operator precedence",
    "what happens when an error occurs",
    "close a file automatically at the end of a block",
    "make a copy of a part of a list",
    "functions without a name",
    "how are numbers shown with two decimal places",
]
ANSWERS = 3

Embedding = Measurement[np.ndarray]


@dataclass
class Row:
    """A line of the table: some texts, and the results of embedding them.

    Attributes:
        name: A name for the texts.
        texts: The texts.
        tokens: The tokens of each, int64.
        tokenizer_bytes: Peak memory of making the tokens.
        full: The result in one pass, or None where that was not run.
        chunked: The result in chunks, or None where that was not run.
        estimate: Bytes that the full pass would have needed; None where it was run.
        notes: The reasons why something was not run.
    """

    name: str
    texts: list[str]
    tokens: list[np.ndarray]
    tokenizer_bytes: int
    full: Embedding | None = None
    chunked: Embedding | None = None
    estimate: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """The number of tokens of all texts."""
        return sum(map(len, self.tokens))

    @property
    def widest(self) -> int:
        """The number of tokens, with padding, in the largest batch of a full pass."""
        return min(BATCH_SIZE, len(self.texts)) * max(map(len, self.tokens))


# The functions that run in the measured processes.


def load_tokenizer() -> PreTrainedTokenizerBase:
    """Return the default model's tokenizer, after it has run once."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(FOLDER)
    tokenizer(corpus.text_of_length(1000))
    return tokenizer


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """Return the tokens of each text, int64."""
    return [np.array(ids) for ids in tokenizer(texts)["input_ids"]]


def load_model() -> SentenceTransformer:
    """Return the default model, after it has run once."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    compat.enable_vertical_chunking()
    model = load_default_model(device="cpu")
    for size in (None, VERTICAL_CHUNK_SIZE):
        model.encode(corpus.text_of_length(4000), vertical_chunk_size=size)
    return model


def load_model_for(texts: list[str], tokens: list[np.ndarray]) -> SentenceTransformer:
    """Return the default model after a first run, with the texts' tokens ready for it.

    In chunks the tokens of long texts are made as they are read, and none are ready.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    model = load_model()
    ready = dict(zip(texts, tokens, strict=True))
    released = model[0].preprocess

    def preprocess(inputs: list[str], **kwargs: Any) -> dict[str, torch.Tensor]:
        if not set(inputs) <= ready.keys():
            return released(inputs, **kwargs)  # type: ignore[no-any-return, operator]
        ids = [torch.from_numpy(ready[text]) for text in inputs]
        mask = [torch.ones_like(row) for row in ids]
        return {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence(mask, batch_first=True),
        }

    model[0].preprocess = preprocess  # type: ignore[assignment]  # It is typed as any submodule.
    return model


def embed(
    texts: list[str], name: str, vertical_chunk_size: int | None, model: SentenceTransformer
) -> np.ndarray:
    """Call `encode` with a progress bar; return (len(texts), hidden_size) float32."""
    characters = sum(map(len, texts))
    bar = tqdm(total=characters, desc=name, unit="char", unit_scale=True, leave=False, disable=None)
    with bar, progress.into(bar):
        return model.encode(texts, batch_size=BATCH_SIZE, vertical_chunk_size=vertical_chunk_size)


def search(questions: list[str], model: SentenceTransformer) -> list[list[tuple[float, str]]]:
    """Return for each question the nearest topics' cosines and titles, best first."""
    texts = [text.strip() for text in corpus.topics().values()]
    topics = model.encode(texts, batch_size=BATCH_SIZE, vertical_chunk_size=VERTICAL_CHUNK_SIZE)
    scores = model.encode(questions) @ topics.T
    best = scores.argsort(1)[:, ::-1]
    titles = [text.partition("\n")[0] for text in texts]
    # Some topics have two names.
    ranked = [
        list(dict.fromkeys((float(row[at]), titles[at]) for at in order))
        for row, order in zip(scores, best, strict=True)
    ]
    return [answers[:ANSWERS] for answers in ranked]


# The functions that run in the demo itself.


def _texts() -> Iterator[tuple[str, list[str]]]:
    """Yield the rows, small ones first, because the larger ones are estimated from them."""
    long = corpus.long_text()
    for part in (64, 8):
        yield f"1/{part} of the topics", [long[: len(long) // part]]
    topics = list(corpus.topics().values())
    yield f"{len(topics)} topics, {BATCH_SIZE} at a time", topics
    yield "all topics as one text", [long]
    yield "topics and docstrings", [corpus.text_of_length(2 * len(long))]
    yield "twice as much of both", [corpus.text_of_length(4 * len(long))]


def _embedding(row: Row, kind: str, size: int | None, before: Row | None) -> Embedding | None:
    """Embed the texts, or note in the row that this would take too much memory or time.

    Args:
        row: The texts.
        kind: "full" or "chunked", the row's attribute that the result is for.
        size: The vertical chunk size, None for a full pass.
        before: The longest texts that were embedded this way.
    """
    name, last = f"{row.name}, {kind}", getattr(before, kind, None)
    if before and last:
        needed = last.peak_bytes * (row.widest / before.widest if size is None else 1)
        seconds = last.seconds * row.total / before.total
        free = free_bytes()
        short_of = "memory" if needed > SHARE_OF_FREE * free else "time"
        if short_of == "memory" or seconds > LONGEST_SECONDS:
            row.estimate = needed if size is None else row.estimate
            row.notes.append(
                f"{name}: not run for want of {short_of}.\nBy the run before, it would take about "
                f"{needed / 1e6:,.0f} MB and {seconds:.0f} s; there are {free / 1e6:,.0f} MB free, "
                f"and {LONGEST_SECONDS} s."
            )
            return None
    setup = partial(load_model_for, row.texts, row.tokens)
    try:
        return measure(setup, partial(embed, row.texts, name, size))
    except ChildProcessError as error:
        row.notes.append(f"{name}: {error}")
        return None


def _rows() -> Iterator[Row]:
    """Measure row by row."""
    full: Row | None = None
    chunked: Row | None = None
    for name, texts in _texts():
        tokenized = measure(load_tokenizer, partial(tokenize, texts))
        row = Row(name, texts, tokenized.result, tokenized.peak_bytes)
        row.full = _embedding(row, "full", None, full)
        row.chunked = _embedding(row, "chunked", VERTICAL_CHUNK_SIZE, chunked)
        full = row if row.full else full
        chunked = row if row.chunked else chunked
        yield row


def differences(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Return the largest absolute difference and cosine distance of two sets of rows (n, dim)."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return float(np.abs(a - b).max()), max(float((1 - cosine).max()), 0.0)


ABOUT = (
    "peak MB: memory of one call of encode, above the loaded model; of a full pass, without the\n"
    "tokenizer's, which stands before it: in chunks, the tokens of long texts are made on the way\n"
    "difference: between the embeddings of both, the largest of any number, and cosine distance"
)
HEADER = (
    f"{'':23}{'':8}{'tokenizer':>11}{'full pass':>18}"
    f"{f'in chunks of {VERTICAL_CHUNK_SIZE}':>20}{'difference':>19}\n"
    f"{'text':23}{'tokens':>8}{'peak MB':>11}{'seconds':>9}{'peak MB':>9}"
    f"{'seconds':>11}{'peak MB':>9}{'largest':>10}{'cosine':>9}"
)


def line(row: Row) -> str:
    """Return the row as a line under `HEADER`."""

    def cells(found: Embedding | None, width: int) -> str:
        if found is None:
            return f"{'not run':>{width + 9}}"
        return f"{found.seconds:{width}.1f}{found.peak_bytes / 1e6:9,.0f}"

    text = f"{row.name:23}{row.total:8,}{row.tokenizer_bytes / 1e6:11,.0f}"
    text += cells(row.full, 9) + cells(row.chunked, 11)
    if row.full and row.chunked:
        largest, cosine = differences(row.full.result, row.chunked.result)
        text += f"{largest:10.0e}{cosine:9.0e}"
    return text


def plot(rows: list[Row], path: Path) -> None:
    """Write a PNG: peak memory over the number of tokens of one text, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    single = [row for row in rows if len(row.texts) == 1]
    full = [(row.total, row.full.peak_bytes / 1e6) for row in single if row.full]
    chunked = [(row.total, row.chunked.peak_bytes / 1e6) for row in single if row.chunked]
    tokenizer = [(row.total, row.tokenizer_bytes / 1e6) for row in single]
    not_run = [(row.total, row.estimate / 1e6) for row in single if row.estimate]
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")

    def draw(
        label: str,
        points: list[tuple[int, float]],
        color: str,
        numbers: str = "",
        above: bool = True,
        **style: Any,
    ) -> None:
        """Draw a line with a label at its end, and a number at each point if a format is given."""
        if not points:
            return
        axes.plot(*zip(*points, strict=True), color=color, **style)
        text: dict[str, Any] = {"color": color, "textcoords": "offset points"}
        axes.annotate(label, points[-1], xytext=(11, 5), va="top", **text)
        for x, y in points if numbers else []:
            # Above a rising line, there is room to the left of the point.
            offset, side = ((4, 7), "right") if above else ((0, -15), "center")
            axes.annotate(numbers.format(y), (x, y), xytext=offset, ha=side, size=9, **text)

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
    draw("the tokenizer alone,\nbefore a full pass", tokenizer, "0.5", linestyle=":", marker=".")

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

    print(MODEL, WEIGHTS_LABEL, "", sep="\n", flush=True)
    print(f"Questions to the {len(corpus.topics())} topics of help(), and the nearest of them:")
    found = measure(load_model, partial(search, QUESTIONS))
    for question, answers in zip(QUESTIONS, found.result, strict=True):
        lines = (f"    {score:.2f}  {title}" for score, title in answers)
        print(f"\n  {question}", *lines, sep="\n")
    print("", ABOUT, "", HEADER, sep="\n", flush=True)
    rows = []
    for row in _rows():
        print(line(row), flush=True)
        rows.append(row)
    for note in (note for row in rows for note in row.notes):
        print(f"\n{note}")
    if any(found and not found.exact for row in rows for found in (row.full, row.chunked)):
        print("\nPeaks may be too large: this system cannot reset the high-water mark of memory.")
    path = output / "memory.png"
    plot(rows, path)
    print(f"\nPeak memory over length: {path}")


if __name__ == "__main__":
    main()
