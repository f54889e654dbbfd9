"""Measure time and peak memory of a piece of work, in a fresh process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import psutil

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Measurement(Generic[T]):
    """The result of `measure`.

    Attributes:
        seconds: Wall-clock time of the work alone.
        peak_bytes: The largest resident size during the work, less that just before it.
        exact: False where the system cannot reset the high-water mark; `peak_bytes` may then be
            too large, by what the set-up had used and given back, but never too small.
        result: What the work returned.
    """

    seconds: float
    peak_bytes: int
    exact: bool
    result: T


def measure(setup: Callable[[], S], work: Callable[[S], T]) -> Measurement[T]:
    """Run `work(setup())` in a fresh process, and measure the work but not the set-up.

    Both functions and the result must be picklable. The set-up should do once what the work does
    only the first time, such as loading libraries.

    Raises:
        ChildProcessError: The process was killed, most likely because memory ran out.
    """
    # The process is forked from a server that has imported the libraries and done nothing else. So
    # it is as fresh as a spawned process, without the seconds of importing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sentence_transformers", "compat"])
    try:
        with ProcessPoolExecutor(1, mp_context=context) as executor:
            return executor.submit(_measure_here, setup, work).result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "The measured process was killed before it was done; most likely memory ran out. "
            f"Free memory now: {free_bytes() / 1e6:,.0f} MB. Measure a smaller piece of work."
        ) from error


def free_bytes() -> int:
    """Return the memory in bytes that a process can still take without swapping."""
    return int(psutil.virtual_memory().available)


def _measure_here(setup: Callable[[], S], work: Callable[[S], T]) -> Measurement[T]:
    subject = setup()
    _give_back_freed_memory()
    exact = _reset_peak()
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    result = work(subject)
    seconds = time.perf_counter() - start
    return Measurement(seconds, max(peak(exact) - before, 0), exact, result)


def _give_back_freed_memory() -> None:
    """Return freed memory to the system.

    Otherwise the work could reuse what the set-up freed, and its peak would not show that.
    """
    gc.collect()
    with contextlib.suppress(AttributeError):  # Only glibc has this function.
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> bool:
    """Set the high-water mark (VmHWM) to the present size; return False where that cannot be done.

    Only Linux has this file, and some containers do not let it be written.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak(exact: bool) -> int:
    """Return the largest resident size of this process in bytes.

    Args:
        exact: Whether it is the high-water mark, which Linux has and lets be reset; else the
            largest size since the process began.
    """
    if exact:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    # This is the largest size since the process began, in kilobytes except on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
