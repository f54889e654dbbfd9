"""Time in chunks over one full pass, by shape and size: `python -m ci.bench.chunk_sizes`.

Layers of Mamba2 of the shapes of 130M, 1.3B and 7B parameters, with random weights, read one text
in chunks of 256 to 4,096 tokens, and at once. Beside each stands the floor of that size: the matrix
products of its linear layers alone, on so many rows at a time, which are slower on few rows. All of
a shape take turns; the ratios are medians of rounds. `--readme` writes RESULTS.md, too. The goal:
from 512 tokens on, at most 1.05 times the full pass, or as much as the floor of that size is over
the floor of the full pass.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import transformers
from transformers import PreTrainedModel

from ci.bench.__main__ import measured
from ci.bench.contenders import Sizes, make_model, ours, projections
from ci.bench.profile_layer import rounds
from ci.tables import markers

SHAPES = {"130M": Sizes(4, 768), "1.3B": Sizes(2, 2048), "7B": Sizes(1, 4096, groups=8)}
SIZES = (256, 512, 1024, 2048, 4096)
GOAL = 1.05

Found = dict[str, list[float]]


def times(model: PreTrainedModel, tokens: int, sizes: Sequence[int], count: int) -> Found:
    """Return the seconds of each round: of each size and of its floor, and of the full pass."""
    work: dict[str, Callable[[], object]] = {}
    for size in (*sizes, tokens):
        work[f"{size}"] = partial(ours, "native", 1, model, tokens, size)
        work[f"floor {size}"] = partial(projections, model, tokens, size)
    with torch.no_grad():
        return rounds(work, count)


def row(shape: str, dtype: str, found: Found, tokens: int, sizes: Sequence[int]) -> list[str]:
    """Return a line of the table; a size that misses its goal is bold."""
    floor, full = (statistics.median(found[name]) for name in (f"floor {tokens}", f"{tokens}"))
    cells = [shape, dtype, f"{full / floor:.2f}"]
    for size in sizes:
        own, least = (
            statistics.median(a / b for a, b in zip(found[name], found[whole], strict=True))
            for name, whole in ((f"{size}", f"{tokens}"), (f"floor {size}", f"floor {tokens}"))
        )
        missed = size >= 512 and own > max(GOAL, least)
        cells.append(f"{'**' if missed else ''}{own:.2f}{'**' if missed else ''} ({least:.2f})")
    return cells


def section(rows: Sequence[Sequence[str]], tokens: int, sizes: Sequence[int], smoke: bool) -> str:
    """Write the section of RESULTS.md."""
    about = (
        f"{measured('chunk_sizes', smoke)}: {tokens:,} tokens of Mamba2; 4, "
        "2 and 1 layers of 768, 2,048 and 4,096. *Full*: a full pass over its matrix products. Of "
        "each size: time in chunks over the full pass, and in brackets that of the matrix products "
        "alone; what is above 1.05 and above those from 512 tokens on is bold."
    )
    head = ["shape", "dtype", "full", *(f"{size:,}" for size in sizes)]
    return markers.section(about, markers.table(head, rows), smoke=smoke)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table as it grows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--readme", action="store_true", help="write ci/bench/RESULTS.md, too")
    parser.add_argument("--smoke", action="store_true", help="narrow models, short texts, a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES])
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    scale = 16 if options.smoke else 1
    tokens, sizes = 2 * SIZES[-1] // scale, [size // scale for size in SIZES]
    rows = []
    for shape in options.shapes:
        for dtype in ("float32", "bfloat16"):
            own = SHAPES[shape]
            if options.smoke:
                own = replace(own, hidden_size=256, state_size=16)
            model = make_model("mamba2", own, dtype)
            found = times(model, tokens, sizes, 1 if options.smoke else options.rounds)
            rows.append(row(shape, dtype, found, tokens, sizes))
            print(*rows[-1], sep="  ", flush=True)
    text = section(rows, tokens, sizes, options.smoke)
    print(f"\n{text}")
    if options.readme:
        markers.put("chunk-sizes", text, markers.BENCH)


if __name__ == "__main__":
    main()
