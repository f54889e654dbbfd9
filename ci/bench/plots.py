"""Draw the plots of `ci.bench`: time and memory over the length, and the parts of the time."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ci.bench.contenders import FLOOR, FULL, NORMS, READERS, RELEASED, TRANSFORMER, Timing

LABELS = {
    "native": "this project, native",
    "torch": "this project, plain torch",
    "native" + FULL: "this project, one full pass",
    "torch" + FULL: "this project, one full pass",
    RELEASED: "released transformers",
    TRANSFORMER: "GPT-NeoX of the same size",
}


def draw(runs: dict[str, list[Timing]], folder: Path) -> None:
    """Write time.png, memory.png and floor.png, as far as the runs suffice for them."""
    import matplotlib

    matplotlib.use("Agg")
    if run := runs.get("lengths"):
        _over_length(run, "seconds", lambda t: statistics.median(t.seconds), folder / "time.png")
        label = "peak memory above the model, MB"
        _over_length(run, label, lambda t: (t.peak_bytes or 0) / 1e6, folder / "memory.png")
    stacks = {
        f"{reader}, {name.removeprefix('mamba2-')}": parts
        for name, run in runs.items()
        for reader in READERS
        if (parts := over_floor(run, reader)) is not None
    }
    if stacks:
        _stacked(stacks, folder / "floor.png")


def over_floor(run: list[Timing], reader: str) -> dict[str, float] | None:
    """Return a reader's time per token over that of the floor, by part; None if these did not run.

    Two parts are measured alone, and the third is the rest.
    """
    per_token = {t.contender: statistics.median(t.seconds) / t.tokens for t in run}
    if not {FLOOR, NORMS, reader} <= per_token.keys():
        return None
    total, norms = per_token[reader] / per_token[FLOOR], per_token[NORMS] / per_token[FLOOR]
    return {
        "in_proj and out_proj: the floor": 1.0,
        "norms before the mixers": norms,
        "convolution, scan, gated norm, and the rest": total - 1 - norms,
    }


def _over_length(run: list[Timing], label: str, y: Callable[[Timing], float], path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for contender in dict.fromkeys(timing.contender for timing in run):
        points = [(t.tokens, y(t)) for t in run if t.contender == contender]
        [line] = axes.plot(*zip(*points, strict=True), marker="o", label=LABELS[contender])
        style: dict[str, Any] = {"textcoords": "offset points", "color": line.get_color()}
        # Only the last number is shown, as lines lie close together where texts are short.
        axes.annotate(f"{points[-1][1]:,.3g}", points[-1], (6, 4), **style)
    ticks = sorted({timing.tokens for timing in run})
    axes.set(xscale="log", yscale="log", xlabel="length of the text, tokens", ylabel=label)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.grid(color="0.9")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _stacked(stacks: dict[str, dict[str, float]], path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 1.5 + 0.5 * len(stacks)), layout="constrained")
    names, left = list(stacks), [0.0] * len(stacks)
    for part in next(iter(stacks.values())):
        widths = [stacks[name][part] for name in names]
        bars = axes.barh(names, widths, left=left, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.bar_label(bars, [f"{total:.2f}" for total in left], padding=4)
    axes.set(xlabel="time over the floor")
    axes.margins(x=0.1)
    axes.invert_yaxis()
    figure.legend(loc="outside upper left")
    figure.savefig(path, dpi=150)
    plt.close(figure)
