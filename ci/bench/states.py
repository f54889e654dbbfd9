"""Measure what a carried state spares: `python -m ci.bench.states [--readme]`.

A text that grows, a prompt that many queries share, and the passages of a book; each beside the way
without a state, in turns in one process, or each in a process of its own where the memory is
measured. Prints a table, which `--readme` also puts into RESULTS.md.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

import compat
from ci import corpus
from ci.bench.__main__ import machine
from ci.bench.contenders import Sizes, make_model
from ci.bench.measure import measure
from ci.tables import markers
from compat.default_model import load_default_model
from compat.stream import shared_prefix

CHUNK = 512
LARGER = "Mamba2 of 24 layers of 768"
SAME = 1e-5
"""The most by which embeddings of both ways may differ, in cosine distance."""


@dataclass(frozen=True)
class Scale:
    """Sizes of what is measured."""

    text: int = 1_000_000  # Characters of the text that grows, and of the book.
    appended: int = 1_000
    queries: int = 1_000  # For the bundled model; a larger one reads a tenth of them.
    prompt: int = 60  # Tokens.
    layers: int = 24  # Of the larger model.
    rounds: int = 3
    threads: int = 2


SMOKE = Scale(text=4_000, appended=100, queries=60, layers=1, rounds=1, threads=1)


@dataclass(frozen=True)
class Row:
    """A line of the table: with a state, without, and how many times less the former takes."""

    title: str
    goal: str
    own: str
    other: str
    times: str


def load(scale: Scale) -> Any:
    """Return the bundled model, which has read in chunks once."""
    torch.set_num_threads(scale.threads)
    compat.enable_vertical_chunking()
    model = load_default_model(device="cpu")
    model.encode(corpus.text_of_length(8000), vertical_chunk_size=CHUNK)
    return model


def larger(model: Any, scale: Scale) -> Any:
    """Put a Mamba2 with random weights into an embedder."""
    vocabulary = model.transformers_model.config.vocab_size
    model[0].model = make_model("mamba2", Sizes(layers=scale.layers), "float32", vocabulary)
    return model


def alternate(
    own: Callable[[], Any], other: Callable[[], Any], rounds: int
) -> list[tuple[float, float]]:
    """Run both in turns; return the seconds of each round.

    Raises:
        RuntimeError: They give other embeddings.
    """
    taken = []
    for _ in range(rounds):
        times, results = [], []
        for work in (own, other):
            start = time.perf_counter()
            results.append(work())
            times.append(time.perf_counter() - start)
        require_same(*results)
        taken.append((times[0], times[1]))
    return taken


def require_same(found: NDArray[Any], wanted: NDArray[Any]) -> None:
    """Raise where embeddings differ."""
    a, b = (np.atleast_2d(x).astype(np.float64) for x in (found, wanted))
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    distance = float((1 - (a * b).sum(-1) / norms).max())
    if not distance <= SAME:
        raise RuntimeError(f"the two ways give other embeddings, by {distance:.1g}")


def timed(title: str, goal: str, taken: Sequence[tuple[float, float]]) -> Row:
    """Make a row of the seconds of each round."""
    ratios = [other / own for own, other in taken]
    own, other = (statistics.median(times) for times in zip(*taken, strict=True))
    ends = f" ({min(ratios):,.1f} to {max(ratios):,.1f})" if len(ratios) > 1 else ""
    times = f"{statistics.median(ratios):,.1f}{ends}"
    return Row(title, goal, f"{own:.3g} s", f"{other:.3g} s", times)


def appended(reader: compat.Reader, text: str) -> NDArray[Any]:
    """Append to a reader's text, and embed it."""
    reader.append(text)
    return reader.embedding()


def appending(scale: Scale) -> list[Row]:
    """Append to a long text, and embed it: with a `Reader`, and all of it again."""
    model = load(scale)
    whole = corpus.text_of_length(scale.text + scale.rounds * scale.appended)
    reader = compat.Reader(model, CHUNK)
    reader.append(whole[: scale.text])
    reader.embedding()
    taken = []
    for start in range(scale.text, len(whole), scale.appended):
        text = whole[: start + scale.appended]
        taken += alternate(
            partial(appended, reader, text[start:]),
            partial(model.encode, text, vertical_chunk_size=CHUNK),
            rounds=1,
        )
    title = f"append {scale.appended:,} characters to {scale.text:,}, and embed"
    return [timed(title, "", taken)]


def of_tokens(model: Any, count: int, seed: int) -> str:
    """Return a text of the corpus with about so many tokens."""
    words = corpus.text_of_length(100_000).split()
    text = ""
    for word in itertools.islice(words, seed * 7, None):
        if len(model.tokenizer(text)["input_ids"]) >= count:
            break
        text += f"{word} "
    return text


def without_sharing(encode: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """Encode with the prompt read again for each query."""
    with mock.patch.object(shared_prefix, "SPARED", sys.maxsize):
        return encode()


def prompts(scale: Scale) -> list[Row]:
    """Encode short queries behind one prompt: read once a batch, and with each query."""
    rows = []
    model = load(scale)
    prompt = of_tokens(model, scale.prompt, 0)
    queries = [of_tokens(model, 5 + number % 20, number) for number in range(scale.queries)]
    for name, asked in (("the bundled model", queries), (LARGER, queries[: scale.queries // 10])):
        if name == LARGER:
            model = larger(model, scale)
        encode = partial(model.encode_query, asked, prompt=prompt, vertical_chunk_size=CHUNK)
        apart = partial(without_sharing, encode)
        apart()  # What a model does only the first time is not measured.
        tokens = statistics.mean(len(ids) for ids in model.tokenizer(asked)["input_ids"])
        title = (
            f"{len(asked):,} queries of {tokens:.0f} tokens behind a prompt of "
            f"{scale.prompt}, {name}"
        )
        rows.append(timed(title, "at least 2", alternate(encode, apart, scale.rounds)))
    return rows


def spans_of(model: Any, text: str) -> list[tuple[int, int]]:
    """Return the passages of a book."""
    return compat.spans_by_tokens(model.tokenizer, text, every=256, overlap=32)


def in_passing(text: str, model: Any) -> NDArray[Any]:
    """Embed the passages in one reading."""
    return compat.encode_spans(model, text, spans_of(model, text), vertical_chunk_size=CHUNK)


def of_all_tokens(text: str, model: Any) -> NDArray[Any]:
    """Embed the passages out of the vectors of all tokens, as late chunking mostly is done."""
    spans = spans_of(model, text)
    encoding = model.tokenizer(text, return_offsets_mapping=True, verbose=False)
    # A special token is at no place of the text.
    starts = np.array([a if a < b else -1 for a, b in encoding["offset_mapping"]])
    hidden = model.encode(
        text, output_value="token_embeddings", vertical_chunk_size=CHUNK, convert_to_numpy=False
    )
    rows = [hidden[(starts >= start) & (starts < end)].mean(0) for start, end in spans]
    return torch.nn.functional.normalize(torch.stack(rows)).numpy()


def passages(scale: Scale) -> list[Row]:
    """Embed the passages of a book, in passing and out of all token vectors."""
    text = corpus.text_of_length(scale.text)
    taken, peaks = [], []
    for _ in range(scale.rounds):
        own, other = (
            measure(partial(load, scale), partial(way, text)) for way in (in_passing, of_all_tokens)
        )
        require_same(own.result, other.result)
        taken.append((own.seconds, other.seconds))
        peaks.append((own.peak_bytes / 1e6, other.peak_bytes / 1e6))
    title = f"{len(own.result):,} passages of a book of {len(text):,} characters"
    less, more = (statistics.median(side) for side in zip(*peaks, strict=True))
    memory = Row("the same: peak memory", "", f"{less:,.0f} MB", f"{more:,.0f} MB", "")
    return [timed(title, "", taken), replace(memory, times=f"{more / less:,.1f}")]


def section(rows: Sequence[Row], scale: Scale) -> str:
    """Write the section of RESULTS.md."""
    found = machine(scale.threads, scale == SMOKE)
    about = (
        f"`python -m ci.bench.states`, on {datetime.now(UTC):%Y-%m-%d}, with {scale.threads} "
        f"threads on {found['cores']} cores of {found['cpu']}, Python {found['python']}, torch "
        f"{found['torch']}, transformers {found['transformers']}; the bundled model where no other "
        f"is named, float32, chunks of {CHUNK}. Medians of rounds in turns, and of their ratios, "
        "with the smallest and the largest where there are several; memory is that above the "
        "loaded model."
    )
    head = ["", "goal", "with a state", "without", "times"]
    lines = [[row.title, row.goal, row.own, row.other, row.times] for row in rows]
    return markers.section(about, markers.table(head, lines), smoke=scale == SMOKE)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--readme", action="store_true", help="write ci/bench/RESULTS.md, too")
    parser.add_argument("--smoke", action="store_true", help="short texts, a tiny model, one round")
    parser.add_argument("--rounds", type=int, default=Scale.rounds)
    options = parser.parse_args(arguments)
    scale = SMOKE if options.smoke else Scale(rounds=options.rounds)
    rows = []
    for comparison in (prompts, appending, passages):
        found = comparison(scale)
        rows += found
        print(*found, sep="\n", flush=True)
    text = section(rows, scale)
    print(f"\n{text}")
    if options.readme:
        markers.put("states", text, markers.BENCH)


if __name__ == "__main__":
    main()
