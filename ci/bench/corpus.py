"""Measure what a corpus costs: `python -m ci.bench.corpus rows`; with ray, `book`, `throughput`."""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ci.bench.measure import peak
from compat.jobs import parts
from compat.jobs.documents import Document
from compat.jobs.journal import Row

_ROWS, _OF_A_FILE = 1_000_000, 4096


def _document(i: int) -> Document:
    name = f"document-{i:09}"
    return Document(name, "x", 1, hashlib.sha256(name.encode()).hexdigest(), name)


def _peak_mb() -> int:
    return peak(exact=True) // 2**20


def rows(folder: Path) -> None:
    """Index a million rows of a stand-in model, and look each of them up."""
    vector, settings = np.ones(2, np.float32), {"model": "stand-in"}
    for start in range(0, _ROWS, _OF_A_FILE):
        documents = [_document(i) for i in range(start, min(_ROWS, start + _OF_A_FILE))]
        made = [Row(doc.id, 1, vector, doc.sha256) for doc in documents]
        parts.write_part(folder, 1, documents, made, settings)
    before, start_s, cpu = _peak_mb(), time.perf_counter(), time.process_time()
    count = parts.build_index(folder, settings)
    print(
        f"{count} rows in {len(parts.parts(folder))} files indexed in "
        f"{time.perf_counter() - start_s:.1f} s ({time.process_time() - cpu:.1f} s of CPU), "
        f"{_peak_mb() - before} MB above {before} MB"
    )
    finished, cpu = parts.Finished(folder), time.process_time()
    found = sum(finished.has(_document(i)) for i in range(_ROWS))
    print(
        f"{found} found, {(time.process_time() - cpu) / _ROWS * 1e6:.1f} microseconds of CPU each"
    )


def book(folder: Path) -> None:
    """Embed 2,000 notes and, behind them, a long text: in this order, and the long one first."""
    from pydoc_data.topics import topics

    import ray

    from compat.jobs.ray import embed

    whole = "".join(topics.values())
    texts = [whole[i * 100 : i * 100 + 120] for i in range(2000)] + [whole[:300_000]]
    source = folder / "texts.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    for turn in range(2):
        for name, size in [("in this order", 1 << 40), ("long first", 1 << 20)]:
            output = folder / f"{name} {turn}"
            embed(source, output, workers=2, block_rows=100, block_bytes=size)
            times = sorted(path.stat().st_mtime for path in parts.parts(output))
            print(
                f"{name}: {times[-1] - times[0]:.1f} s from the first file to the last, "
                f"{times[-1] - times[-2]:.1f} s between the last two"
            )


def throughput(folder: Path) -> None:
    """Embed notes by the command and on Ray, some and more, of which the start-up is told apart."""
    import ray
    import torch

    from ci import corpus
    from compat.jobs import embed as command
    from compat.jobs import ray as cluster

    length, few, many = 1000, 1000, 3000
    text = corpus.text_of_length(length * many)
    notes = [text[start : start + length] for start in range(0, len(text), length)]
    sources = {count: folder / f"{count}.jsonl" for count in (few, many)}
    for count, source in sources.items():
        source.write_text("\n".join(json.dumps({"text": note}) for note in notes[:count]))
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    options: dict[str, Any] = {
        "model": None, "vertical_chunk_size": 512, "batch_size": 8, "dtype": "auto",
        "device": "cpu", "text_column": "text", "id_column": None,
    }  # fmt: skip

    def by_command(threads: int, source: Path, output: Path) -> None:
        torch.set_num_threads(threads)
        command.embed([source], output, **options)

    def on_ray(workers: int, source: Path, output: Path) -> None:
        cluster.embed(source, output, workers=workers, block_rows=250, **options)

    ways = {
        "the command, 1 thread": partial(by_command, 1),
        "Ray, 1 actor of 1 thread": partial(on_ray, 1),
        "the command, 2 threads": partial(by_command, 2),
        "Ray, 2 actors of 1 thread": partial(on_ray, 2),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(3):
        for name, run in ways.items():
            taken = []
            for count, source in sources.items():
                start = time.perf_counter()
                run(source, folder / f"{name} {count} {turn}")
                taken.append(time.perf_counter() - start)
            seconds[name].append((taken[0], taken[1]))
    base: dict[int, float] = {}
    for place, (name, rounds) in enumerate(seconds.items()):
        row = statistics.median((long - short) / (many - few) for short, long in rounds)
        begin = statistics.median(short for short, _ in rounds) - few * row
        own = base.setdefault(place // 2, row)
        print(
            f"{name}: {1 / row:.0f} notes/s after {begin:.1f} s; {own / row:.2f} times the "
            f"command, {1e3 * (row - own):+.2f} ms a row"
        )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        {"rows": rows, "book": book, "throughput": throughput}[sys.argv[1]](Path(name))
