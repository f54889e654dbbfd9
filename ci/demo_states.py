"""Search inside a book, and re-embed a log at every line: `python -m ci.demo_states`.

The book is Python's language reference, read once from its beginning to its end: each passage is
embedded in the context of all the text before it. The log grows line by line, and its embedding
costs what has come since; at the end it is the one that `encode` gives for the whole log.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

import compat
from ci import corpus
from ci.demo import QUESTIONS, VERTICAL_CHUNK_SIZE
from compat.default_model import load_default_model

LINES = 400
SHOWN = 80  # Characters of a passage.


def search_inside(model: Any, book: str, questions: list[str]) -> Iterator[tuple[float, int, str]]:
    """Yield for each question the nearest passage: its cosine, its place, and how it begins."""
    spans = compat.spans_by_tokens(model.tokenizer, book, every=96, overlap=16)
    passages = compat.encode_spans(model, book, spans, vertical_chunk_size=VERTICAL_CHUNK_SIZE)
    for scores in model.encode(questions, vertical_chunk_size=VERTICAL_CHUNK_SIZE) @ passages.T:
        start, end = spans[int(scores.argmax())]
        yield float(scores.max()), start, " ".join(book[start:end].split())[:SHOWN]


def log_lines() -> Iterator[str]:
    """Yield the lines of a made-up log without end."""
    for number in itertools.count():
        place = f"worker {number % 7}: batch {number}"
        late = f", {number % 13} of its rows were late" if number % 13 > 9 else ""
        yield f"12:{number // 60 % 60:02}:{number % 60:02} INFO {place} is written{late}\n"


def watch(model: Any, lines: int) -> Iterator[tuple[int, int, float]]:
    """Yield after each tenth of a log its lines, its tokens, and the seconds of the last embedding.

    Raises:
        AssertionError: In the end it is not the embedding of the whole log.
    """
    reader = compat.Reader(model, VERTICAL_CHUNK_SIZE)
    log = ""
    for number, line in enumerate(itertools.islice(log_lines(), lines), start=1):
        start = time.perf_counter()
        reader.append(line)
        embedding = reader.embedding()
        seconds = time.perf_counter() - start
        log += line
        if not number % max(lines // 10, 1):
            yield number, reader.num_tokens, seconds
    start = time.perf_counter()
    whole = model.encode(log, vertical_chunk_size=VERTICAL_CHUNK_SIZE)
    print(f"The whole log, encoded again: {1000 * (time.perf_counter() - start):,.0f} ms")
    np.testing.assert_allclose(embedding, whole, rtol=0, atol=1e-5)


def main() -> None:
    """Print the answers of the book, and what each embedding of the log costs."""
    compat.enable_vertical_chunking()
    model = load_default_model(device="cpu")
    book = corpus.long_text()
    start = time.perf_counter()
    found = list(search_inside(model, book, QUESTIONS))
    print(f"A book of {len(book):,} characters, searched in {time.perf_counter() - start:.1f} s:")
    for question, (score, place, words) in zip(QUESTIONS, found, strict=True):
        print(f"\n{question}\n  {score:.2f}  at character {place:,}: {words}")
    print(f"\nA log, embedded at each of {LINES} lines:\n{'lines':>8}{'tokens':>10}{'ms':>8}")
    for number, tokens, seconds in watch(model, LINES):
        print(f"{number:8,}{tokens:10,}{1000 * seconds:8.1f}")


if __name__ == "__main__":
    main()
