"""Measure the kernels, stock against patched, forward and backward.

Both sources have a process of their own, since they are one package by name; the stage asks them in
turn. A time is the median over rounds, and in a round over calls, by CUDA events, each call on
buffers that are no longer in the cache. Bytes are those of all inputs and outputs, read and written
once; their share is of the bandwidth of a copy, measured beside.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ci.gpu import stand_in, work
from ci.gpu.place import SOURCES, Place
from ci.gpu.table import Record, Row

ROUNDS, CALLS = 7, 10
COLUMNS = ["stock ms", "patched ms", "ratio", "range", "verdict", "MB", "of copy"]
COLUMNS += ["stock peak", "peak", "bits"]
_BUFFERS = 200  # At most, where a call's data are small.
_COPIED = 2**30  # Bytes of the copy that the bandwidth is measured by.


def run(place: Place, record: Record, _options: argparse.Namespace) -> None:
    """Measure each case, forward and backward."""
    workers = {source: Worker(place, source) for source in SOURCES}
    for op in (work.CONV, work.SSD, work.SCAN):
        for way in ("forward", "backward"):
            cases = [case for case in _cases(place) if case.op == op]
            makers = {
                case.name: functools.partial(_compare, place, workers, case, way) for case in cases
            }
            record.table(f"{op}, {way}", COLUMNS, makers)
    for worker in workers.values():
        worker.end()


def _cases(place: Place) -> list[work.Case]:
    return work.TINY if place.rehearsed else work.CASES


class Worker:
    """A process that has one source's kernels, and measures what it is asked for."""

    def __init__(self, place: Place, source: str) -> None:
        self._command = [sys.executable, "-m", "ci.gpu.kernels", place.device, source]
        self._environment = place.environment(source)
        self._process: subprocess.Popen[str] | None = None

    def ask(self, *question: Any) -> Any:
        """Return the answer; where a call fails, a RuntimeError says why."""
        if self._process is None:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sys.stderr,
                text=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"its process ended with status {self.end()}")
        answer = json.loads(line)
        if "error" in answer:
            if answer["fault"]:
                self.end()  # Nothing that comes after it can be trusted.
            raise RuntimeError(answer["error"])
        return answer["found"]

    def end(self) -> int | None:
        """End the process, and return its status; the next question starts another."""
        process, self._process = self._process, None
        if process is None:
            return None
        # Where it is gone, what was not written to it is lost.
        with contextlib.suppress(BrokenPipeError), process:
            pass
        return process.wait()


def _compare(place: Place, workers: dict[str, Worker], case: work.Case, way: str) -> Row:
    """Measure stock and patched in alternation; what stock refuses is measured on patched alone."""
    asked = dataclasses.astuple(case)
    prepared: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for source, worker in workers.items():
        try:
            prepared[source] = worker.ask("prepare", asked, way)
        except RuntimeError as error:
            refused[source] = f"{error}"
    if "patched" in refused:
        raise RuntimeError(f"patched: {refused['patched']}")
    times: dict[str, list[float]] = {source: [] for source in prepared}
    for done in range(1 if place.rehearsed else ROUNDS):
        for source in sorted(prepared, reverse=bool(done % 2)):
            times[source].append(workers[source].ask("time"))
    patched, moved = prepared["patched"], prepared["patched"]["bytes"]
    seconds = statistics.median(times["patched"])
    share = moved / seconds / patched["bandwidth"]
    row: Row = {"patched ms": 1e3 * seconds, "MB": moved / 1e6, "of copy": f"{share:.0%}"}
    row["peak"] = patched["peak"]
    if "stock" not in prepared:
        return {"stock ms": "refuses"} | row | {"refusal": refused["stock"][:200]}
    ratios = [a / b for a, b in zip(times["patched"], times["stock"], strict=True)]
    stock = prepared["stock"]
    return (
        {"stock ms": 1e3 * statistics.median(times["stock"])}
        | row
        | {
            "ratio": statistics.median(ratios),
            "range": f"{min(ratios):.2f}-{max(ratios):.2f}",
            "verdict": "-" if place.rehearsed else verdict(times["stock"], times["patched"]),
            "stock peak": stock["peak"],
            # Of the first call's results; atomic additions and other tuned blocks change them too.
            "bits": "same" if stock["digest"] == patched["digest"] else "differ",
        }
    )


def verdict(stock: list[float], patched: list[float]) -> str:
    """Say whether the median of patched lies within the rounds of stock, which are the noise."""
    median = statistics.median(patched)
    if median > max(stock):
        return "slower"
    return "faster" if median < min(stock) else "same"


class Bench:
    """Hold what a worker has of the case at hand, and measure it."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._calls: Iterator[Callable[[], object]] = iter(())
        self._bandwidth = self._copy()

    def prepare(self, asked: list[Any], way: str) -> dict[str, Any]:
        """Make buffers, run once, and say what that took and gave."""
        self._calls = iter(())  # The buffers of the case before are given back.
        op, shape, modes, *sizes = asked
        case = work.Case(op, tuple(shape), tuple(modes), *sizes)
        torch.manual_seed(0)
        make = functools.partial(
            work.work, case, self.device, torch.float32 if self.device == "cpu" else torch.bfloat16
        )
        inputs, call = make()
        self._reset()
        found, gradients = self._once(inputs, call, way)
        size = _bytes(inputs.values()) + _bytes(found)
        if way == "backward":
            size += _bytes(found) + _bytes(gradients)  # The outputs' gradients are read.
        peak = self._peak()
        digest = hashlib.sha256()
        for tensor in gradients if way == "backward" else found:
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        del found, gradients
        calls = [self._ready(*make(), way) for _ in range(self._copies(size))]
        for one in calls:  # Each once, so that all is allocated and tuned.
            one()
        self._calls = itertools.cycle(calls)
        return {
            "bytes": size,
            "peak": peak,
            "digest": digest.hexdigest(),
            "bandwidth": self._bandwidth,
        }

    def time(self) -> float:
        """Return the median of some calls in seconds."""
        return self._timed(self._calls, 1 if self.device == "cpu" else CALLS)

    def _ready(
        self,
        inputs: dict[str, Tensor],
        call: Callable[[dict[str, Tensor]], tuple[Tensor, ...]],
        way: str,
    ) -> Callable[[], object]:
        if way == "forward":
            return torch.no_grad()(functools.partial(call, inputs))
        _, outputs, leaves = _recorded(inputs, call)
        grads = [torch.randn_like(one) for one in outputs]
        return functools.partial(
            torch.autograd.grad, outputs, leaves, grads, retain_graph=True, allow_unused=True
        )

    def _once(
        self,
        inputs: dict[str, Tensor],
        call: Callable[[dict[str, Tensor]], tuple[Tensor, ...]],
        way: str,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        if way == "forward":
            with torch.no_grad():
                return call(inputs), ()
        found, outputs, leaves = _recorded(inputs, call)
        grads = [torch.ones_like(one) for one in outputs]
        gradients = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
        return found, tuple(one for one in gradients if one is not None)

    def _copies(self, size: int) -> int:
        """Return how many buffers it takes until the first is no longer in the cache."""
        if self.device == "cpu":
            return 1
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        return max(2, min(_BUFFERS, 1 + 2 * cache // size))

    def _copy(self) -> float:
        """Measure the bandwidth of a copy, in bytes read and written a second."""
        size = 2**20 if self.device == "cpu" else _COPIED
        source = torch.empty(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        copy = itertools.repeat(lambda: target.copy_(source))
        return 2 * size / self._timed(copy, 2 * CALLS)

    def _timed(self, calls: Iterator[Callable[[], object]], count: int) -> float:
        times = []
        if self.device == "cpu":
            for call in itertools.islice(calls, count):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            return statistics.median(times)
        # Kernels wait until all calls are in the queue, so that no launch is in a time.
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)
        events = []
        for call in itertools.islice(calls, count):
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            call()
            pair[1].record()
            events.append(pair)
        torch.cuda.synchronize()
        times = [float(start.elapsed_time(end)) / 1e3 for start, end in events]
        return statistics.median(times)

    def _reset(self) -> None:
        if self.device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()

    def _peak(self) -> str:
        if self.device == "cpu":
            return "-"
        return f"{(torch.cuda.max_memory_allocated() - self._before) / 1e6:,.0f} MB"


def _recorded(
    inputs: dict[str, Tensor], call: Callable[[dict[str, Tensor]], tuple[Tensor, ...]]
) -> tuple[tuple[Tensor, ...], list[Tensor], list[Tensor]]:
    """Call with a gradient for each input; return outputs, those that have one, and the inputs."""
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    found = call(leaves)
    return found, [one for one in found if one.requires_grad], list(leaves.values())


def _bytes(tensors: Any) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)


def serve(device: str, source: str) -> None:
    """Answer questions, a line of JSON each, until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Libraries may print.
    if device == "cpu":
        torch.set_num_threads(1)
        stand_in.put(source)
    bench = Bench(device)
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        try:
            answer = {"found": getattr(bench, verb)(*arguments)}
        except Exception as error:
            said = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            # A refusal is of another type than what CUDA raises.
            answer = {"error": said, "fault": isinstance(error, RuntimeError)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(*sys.argv[1:])
