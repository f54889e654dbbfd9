"""Let torch's threads wait asleep, so that they take no time from other processes.

libgomp, the OpenMP runtime of torch's CPU wheels, lets a waiting thread spin for some milliseconds
before it sleeps. On an idle machine that saves the time of waking. Beside other processes it takes
the cores from the very threads that are waited for. OMP_WAIT_POLICY is read when torch is imported,
too late for a library to set it. But where libgomp has started more threads than there are CPUs, it
spins a three-thousandth of that (its manual, GOMP_SPINCOUNT). So a few more of its threads are
started here, which do nothing but sleep. `python -m ci.bench.under_load` measures the gain.
"""

from __future__ import annotations

import _thread
import ctypes
import os
import signal
import threading
from typing import Any

import torch

from compat.ops import compiled

_lock = threading.Lock()
_asleep = 0  # The number of libgomp's threads that were started here.


def wait_asleep() -> None:
    """Let torch's threads wait asleep, unless the environment sets how they wait.

    It is called before each pass on a CPU, as the number of threads may have changed.
    """
    global _asleep
    with _lock:
        runtime = _libgomp()
        if runtime is None or any(map(os.environ.get, ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"))):
            return
        more = _missing(torch.get_num_threads(), runtime.omp_get_num_procs(), _asleep)
        if not more:
            return
        try:
            _thread.start_new_thread(_sleep, (runtime, more))
        except RuntimeError:  # No thread can be started, so they wait as before.
            return
        _asleep += more


def _missing(threads: int, cpus: int, asleep: int) -> int:
    """Return how many sleeping threads libgomp needs to have more threads than CPUs."""
    if threads == 1:
        return 0  # Nobody waits.
    # libgomp counts the CPUs when it is loaded, and may have counted more than there are now.
    more = max(cpus - threads, 0) + 1 - asleep
    # torch uses one of the two hardware threads of a core. A user who gives it less than that
    # leaves cores to other processes. It would take many sleepers then, and systems limit the
    # number of threads.
    return max(more, 0) if asleep + more <= threads + 1 else 0


def _libgomp() -> ctypes.CDLL | None:
    runtime = compiled.runtime()
    # libomp has libgomp's functions too, but waits in its own ways.
    return None if runtime is None or hasattr(runtime, "kmp_set_blocktime") else runtime


def _sleep(runtime: Any, threads: int) -> None:
    """Hold a team of so many threads and this one, all asleep, as long as the process lives."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # They are for other threads.
    pause = ctypes.cast(ctypes.CDLL(None).pause, ctypes.c_void_p)
    while True:
        runtime.GOMP_parallel(pause, None, ctypes.c_uint(threads + 1), ctypes.c_uint(0))
