"""Measure what busy neighbours cost a model on a CPU: `python -m ci.bench.under_load`.

Each way of waiting has a process of its own; they take turns, while a number of other processes are
busy. The share of a program with T threads beside B busy processes on C cores is T / (T + B) of
them, which would take the time `alone / share`. The figures are good only if nothing else runs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

# The environment of each way; none of these names is set otherwise.
WAYS = {
    "spinning, as without compat": {"GOMP_SPINCOUNT": "300000"},
    "as compat sees to": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
# It ends when the process that started it ends, however that happens.
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(10_000))"


class Taken(NamedTuple):
    """The seconds of one turn: of wall time, and of CPU time."""

    wall: float
    cpu: float


def serve(hidden_size: int, tokens: int) -> None:
    """Read a text with a Mamba2 of four layers for each line of input, and print the time taken."""
    import torch
    from transformers import Mamba2Config, Mamba2Model

    import compat

    heads = hidden_size * 2 // 64
    config = Mamba2Config(
        hidden_size=hidden_size,
        num_hidden_layers=4,
        num_heads=heads,
        head_dim=64,
        n_groups=1,
        vocab_size=1000,
    )
    model = Mamba2Model(config).eval()
    ids = torch.randint(1000, (1, tokens))

    def read() -> None:
        for _ in compat.iter_chunks(model, input_ids=ids, vertical_chunk_size=512):
            pass

    read()
    print("ready", flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        read()
        print(time.perf_counter() - wall, time.process_time() - cpu, flush=True)


def compare(
    hidden_size: int, tokens: int, rounds: int, busy: Sequence[int]
) -> Iterator[tuple[int, dict[str, list[Taken]]]]:
    """Yield each number of busy processes, and the turns of each way beside them."""
    with ExitStack() as stack:

        def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
            unset = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"}
            kept = {name: value for name, value in os.environ.items() if name not in unset}
            process = subprocess.Popen(
                [sys.executable, *arguments],
                env=kept | environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        def turn(process: subprocess.Popen[str]) -> Taken:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            return Taken(*map(float, process.stdout.readline().split()))

        this = ["-m", "ci.bench.under_load", "--serve", str(hidden_size), str(tokens)]
        readers = {way: start(*this, **environment) for way, environment in WAYS.items()}
        for process in readers.values():
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise ChildProcessError("A reader has ended; what it said is above.")
        started = 0
        for count in sorted(busy):
            while started < count:
                start("-c", BUSY)
                started += 1
            time.sleep(0.5)
            found: dict[str, list[Taken]] = {way: [] for way in readers}
            for _ in range(rounds):
                for way, process in readers.items():
                    found[way].append(turn(process))
            yield count, found


def main() -> None:
    """Print, for each load, medians of the turns, and of their ratios to the first way's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--serve", type=int, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(*given.serve)
        return
    print(f"{os.cpu_count()} CPUs; load before: {os.getloadavg()[0]:.1f}")
    for count, ways in compare(given.hidden_size, given.tokens, given.rounds, given.busy):
        print(f"beside {count} busy processes:")
        first = next(iter(ways.values()))
        for way, turns in ways.items():
            wall = statistics.median(taken.wall for taken in turns)
            cpu = statistics.median(taken.cpu for taken in turns)
            pairs = zip(turns, first, strict=True)
            ratio = statistics.median(own.wall / other.wall for own, other in pairs)
            print(f"  {way:28} {wall:7.2f} s ({ratio:.2f}), {cpu:.2f} s of the CPU", flush=True)


if __name__ == "__main__":
    main()
