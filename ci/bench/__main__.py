"""Measure time and memory beside alternatives: `python -m ci.bench [--only NAME ...] [--readme]`.

Each comparison runs in a process of its own, where the contenders take turns. Where the memory peak
is measured, each text has a process of its own. Writes bench.json, plots, and README.md, which
`--readme` also puts into RESULTS.md. The exit status is 1 if the memory depends on the length of
the text; no time makes it fail.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from ci.bench import plots
from ci.bench.contenders import (
    BATCH,
    FLOOR,
    FULL,
    HYBRID,
    NORMS,
    READERS,
    RELEASED,
    RWKV7,
    SMOKE,
    TRANSFORMER,
    Contender,
    Sizes,
    Timing,
    compete,
)
from ci.tables import markers
from compat.ops import compiled

ALLOWED_SPREAD = 30e6  # In bytes. The tokens themselves, with their mask, are 9 bytes each.

Runs = dict[str, list[Timing]]


@dataclass(frozen=True)
class Row:
    """A line of the table: a ratio of times per token. {} in a contender stands for a reader."""

    title: str
    goal: str
    comparison: str  # The comparison in which its contenders ran.
    other: str  # The contender that a reader is compared with.
    faster: bool = False  # True where the other's time is divided by the reader's.
    reader: str = "{}"  # The contender that is compared.


_SINGLE, _HALF = "mamba2-float32", "mamba2-bfloat16"
_DELTA_SINGLE, _DELTA_HALF = "delta-float32", "delta-bfloat16"
_RWKV7_SINGLE, _RWKV7_HALF = "rwkv7-float32", "rwkv7-bfloat16"
ROWS = (
    Row("time over the floor, float32", "at most 1.5", _SINGLE, FLOOR),
    Row("time over the floor, bfloat16", "at most 3", _HALF, FLOOR),
    Row("times faster than GPT-NeoX, float32", "at least 1.6", _SINGLE, TRANSFORMER, True),
    Row("times faster than GPT-NeoX, bfloat16", "more than 1", _HALF, TRANSFORMER, True),
    Row("the same, 32,768 tokens, float32", "at least 4", "lengths", TRANSFORMER, True),
    Row("time in chunks over one full pass, float32", "at most 1.02", _SINGLE, "{}" + FULL),
    Row(
        "batch of 8, 64 to 8,192 tokens, over 1", "at most 1.1", "batch", "{}", False, "{}" + BATCH
    ),
    Row("Mamba-1 130M, times faster than released", "at least 10", "mamba", RELEASED, True),
    Row("RWKV-4 169M, times faster than released", "at least 10", "rwkv", RELEASED, True),
    Row("delta rule, time over the floor, float32", "at most 1.4", _DELTA_SINGLE, FLOOR),
    Row("delta rule, time over the floor, bfloat16", "at most 1.8", _DELTA_HALF, FLOOR),
    Row("RWKV-7, time over the floor, float32", "at most 1.4", _RWKV7_SINGLE, FLOOR),
    Row("RWKV-7, time over the floor, bfloat16", "at most 1.8", _RWKV7_HALF, FLOOR),
    Row("Mamba-1, time over the floor, bfloat16", "at most 1.5", "mamba-bfloat16", FLOOR),
    Row("xLSTM, time over the floor, bfloat16", "at most 1.5", "xlstm-bfloat16", FLOOR),
    Row("xLSTM, times faster than released", "at least 1", "xlstm", RELEASED, True),
)
PEAK = "peak memory in chunks, float32"
SPREAD = "the same: the largest less the smallest"

ABOUT = """
`python3 -m nox -s bench`, on {date}, with {threads} threads on {cores} cores of {cpu}
({instructions}), {memory}, Python {python}, torch {torch}, transformers {transformers}. Mamba2 of
24 layers of 768, 24 heads of 64, state 128, random weights; batch 1, 8,192 tokens in chunks of 512,
where nothing else is said; Mamba-1, RWKV-4 and xLSTM: 4,096 tokens in float32, 2,048 in bfloat16.
*delta rule*: four layers of Qwen3.5 0.8B (1,024 wide, 16 heads of 128, three with the gated delta
rule and one with attention), 2,048 tokens. *RWKV-7*: four layers of its 0.4B (1,024 wide), by fla,
2,048 tokens; released, it runs on a CPU in Triton's interpreter only. *Floor*: the matrix products
of the linear layers alone (of Mamba2: in_proj and out_proj). *GPT-NeoX*: 12 layers of 768.
*native*: this project on its compiled kernels ({native}); *torch*: in plain torch; *released*:
transformers alone. Ratios are medians of rounds in alternation, with the smallest and the largest;
memory is that above the loaded model, for {lengths} tokens (native) and the first two of these
(torch, released).
"""
LEFT_OUT = (
    "mamba-scan-lite 0.2.0 is not among them: it replaces `Zamba2MambaMixer.torch_forward` and "
    "nothing else, which transformers 5.24 neither has nor calls, so importing it changes nothing."
)


def comparisons(sizes: Sizes) -> dict[str, list[list[Contender]]]:
    """Return the contenders of each process of each comparison."""
    ours = ["native", "torch"] if compiled.library() else ["torch"]
    best = ours[0]

    def mamba2(dtype: str, released: int) -> list[list[Contender]]:
        names = [FLOOR, NORMS, *ours, best + FULL, TRANSFORMER]
        fast = [Contender(name, sizes.text, sizes.rounds, dtype=dtype) for name in names]
        return [[*fast, Contender(RELEASED, released, 1, dtype=dtype)]]

    def family(model: str) -> list[list[Contender]]:
        names = [FLOOR, *ours, RELEASED]
        return [[Contender(name, sizes.short, sizes.rounds, model) for name in names]]

    def short(model: str, dtype: str, *others: str) -> list[list[Contender]]:
        names, tokens = [FLOOR, *ours, *others], sizes.text // 4
        return [[Contender(name, tokens, 2 * sizes.rounds, model, dtype) for name in names]]

    def slow(model: str, dtype: str) -> list[list[Contender]]:
        [own] = short(model, dtype)
        return [[*own, Contender(RELEASED, sizes.text // 8, 1, model, dtype)]]

    rwkv7 = {name: short(RWKV7, name.split("-")[1]) for name in (_RWKV7_SINGLE, _RWKV7_HALF)}
    # The number of lengths that each of them reads, from the shortest on.
    reach = dict.fromkeys(ours, 2) | {best: len(sizes.lengths)}
    reach |= {best + FULL: 2, TRANSFORMER: 3, RELEASED: 2}
    alone = [
        [Contender(name, tokens, 1)]
        for index, tokens in enumerate(sizes.lengths)
        for name, count in reach.items()
        if index < count
    ]
    return {
        _SINGLE: mamba2("float32", sizes.text),
        _HALF: mamba2("bfloat16", sizes.text // 4),
        "lengths": alone,
        "batch": [[Contender(name, sizes.text, sizes.rounds) for name in (best, best + BATCH)]],
        _DELTA_SINGLE: short(HYBRID, "float32", RELEASED),
        _DELTA_HALF: short(HYBRID, "bfloat16", RELEASED),
        **(rwkv7 if importlib.util.find_spec("fla") else {}),
        **{model: family(model) for model in ("mamba", "rwkv", "xlstm")},
        **{f"{model}-bfloat16": slow(model, "bfloat16") for model in ("mamba", "xlstm")},
    }


# From timings to the table.


def ratios(run: list[Timing], row: Row, reader: str) -> tuple[list[float], str] | None:
    """Return the row's ratio in each round in which both ran, and a note; None unless both ran.

    Of several lengths, the largest that the other has read is taken. A reader that read fewer
    tokens than the other is compared by its time per token, and the note says how many it read.
    """
    mine = [timing for timing in run if timing.contender == row.reader.format(reader)]
    others = [timing for timing in run if timing.contender == row.other.format(reader)]
    if not mine or not others or reader == row.other:
        return None
    other = max(others, key=lambda timing: timing.tokens)
    own = next((timing for timing in mine if timing.tokens == other.tokens), mine[-1])
    pairs = zip(own.seconds, other.seconds, strict=False)
    found = [a / own.tokens / (b / other.tokens) for a, b in pairs]
    note = f", on {own.tokens:,} tokens" if own.tokens < other.tokens else ""
    return [1 / ratio for ratio in found] if row.faster else found, note


def peaks(runs: Runs, reader: str) -> list[int]:
    """Return the peak memory of a reader in chunks, in bytes, for each length."""
    run = [timing for timing in runs.get("lengths", []) if timing.contender == reader]
    return [timing.peak_bytes for timing in run if timing.peak_bytes is not None]


def table(runs: Runs) -> list[dict[str, str]]:
    """Return the rows that have run: title, goal, and a text for each reader that ran."""
    rows = [{"": row.title, "goal": row.goal} for row in ROWS]
    largest = {"": PEAK, "goal": "at most 120 MB"}
    spread = {"": SPREAD, "goal": f"at most {ALLOWED_SPREAD / 1e6:.0f} MB"}
    for reader in READERS:
        for row, cells in zip(ROWS, rows, strict=True):
            if found := ratios(runs.get(row.comparison, []), row, reader):
                values, note = found
                ends = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
                cells[reader] = f"{statistics.median(values):.2f}{ends}{note}"
        if own := peaks(runs, reader):
            largest[reader] = f"{max(own) / 1e6:.0f} MB"
            spread[reader] = f"{(max(own) - min(own)) / 1e6:.0f} MB"
    return [row for row in [*rows, largest, spread] if len(row) > 2]


def lines(name: str, run: list[Timing]) -> list[str]:
    """List the times of each contender, for the screen and below the table."""
    texts = [f"{name}:"]
    for timing in run:
        text = f"  {timing.contender:22}{timing.tokens:9,} tokens"
        text += f"{statistics.median(timing.seconds):9.2f} s"
        text += f"{timing.peak_bytes / 1e6:9,.0f} MB" if timing.peak_bytes is not None else ""
        texts.append(text)
    return texts


def section(report: dict[str, Any], runs: Runs, sizes: Sizes) -> str:
    """Write the section of RESULTS.md."""
    days = sorted(date[:10] for date in report["dates"].values())
    about = ABOUT.format(
        date=" to ".join(dict.fromkeys([days[0], days[-1]])),
        lengths=", ".join(f"{tokens:,}" for tokens in sizes.lengths),
        **report["machine"],
    )
    head = ["", "goal", *READERS]
    markdown = markers.table(head, ([row.get(key, "") for key in head] for row in table(runs)))
    seconds = "\n".join(f"    {line}" for name, run in runs.items() for line in lines(name, run))
    note = textwrap.fill(LEFT_OUT, 100)
    return markers.section(about, markdown, seconds, note, smoke=sizes != Sizes())


def measured(part: str, smoke: bool) -> str:
    """Say which part of the benchmark was run, when, and on what: a sentence's beginning."""
    found = machine(torch.get_num_threads(), smoke)
    return (
        f"`python -m ci.bench.{part}`, on {datetime.now(UTC):%Y-%m-%d}, with {found['threads']} "
        f"threads on {found['cores']} cores of {found['cpu']} ({found['instructions']}), torch "
        f"{found['torch']}, transformers {found['transformers']}"
    )


def machine(threads: int, smoke: bool) -> dict[str, Any]:
    """Describe the machine and the versions that the numbers depend on."""
    info = Path("/proc/cpuinfo")
    found = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in found if line.startswith("model name")), "")
    return {
        "cpu": cpu or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GB",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "native": compiled.reason(),
        "smoke": smoke,
    }


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = list(comparisons(SMOKE))
    only = f"run some of {', '.join(names)}, or none, and merge with bench.json"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=names, metavar="NAME", help=only)
    parser.add_argument("--output", type=Path, default=Path("bench-out"), metavar="DIR")
    parser.add_argument("--readme", action="store_true", help="write ci/bench/RESULTS.md, too")
    parser.add_argument("--smoke", action="store_true", help="tiny models and texts, one round")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, and return the exit status."""
    options = _options(arguments)
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    path = output / "bench.json"
    sizes = SMOKE if options.smoke else Sizes()
    report: dict[str, Any] = {"machine": machine(options.threads, options.smoke), "dates": {}}
    runs: Runs = {}
    if options.only is not None and path.exists():
        before = json.loads(path.read_text())
        if before["machine"] == report["machine"]:
            report["dates"] = before["dates"]
            runs = {name: [Timing(**t) for t in run] for name, run in before["runs"].items()}
        else:
            print(f"{path} was measured on another machine or with other versions: begun anew.")
    for name, processes in comparisons(sizes).items():
        if options.only is None or name in options.only:
            runs[name] = [t for group in processes for t in compete(group, sizes, options.threads)]
            print(*lines(name, runs[name]), sep="\n", flush=True)
            report["dates"][name] = datetime.now(UTC).isoformat(timespec="seconds")
            report["runs"] = {name: [asdict(t) for t in run] for name, run in runs.items()}
            report["rows"] = table(runs)
            path.write_text(json.dumps(report, indent=1) + "\n")
    if not runs:
        print("Nothing has been measured.")
        return 0
    text = section(report, runs, sizes)
    (output / "README.md").write_text(f"{text}\n")
    plots.draw(runs, output)
    print(f"\n{text}\n\nWritten to {output}.")
    if options.readme:
        markers.put("bench", text, markers.BENCH)
    own = peaks(runs, "native") or peaks(runs, "torch")
    if own and max(own) - min(own) > ALLOWED_SPREAD:
        print(f"The peaks of memory are more than {ALLOWED_SPREAD / 1e6:.0f} MB apart.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
