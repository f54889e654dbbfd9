"""Measure what a folder of parts costs: `python -m ci.bench.corpus rows` or, with ray, `book`."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path

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


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        {"rows": rows, "book": book}[sys.argv[1]](Path(name))
