import os
import signal
from functools import partial

import numpy as np
import pytest

from ci import demo
from ci.bench import measure as module
from ci.bench.measure import measure

MB = 2**20
TOLERANCE = 4 * MB


def allocate(megabytes, _subject=None):
    """Fill this much memory, free it, and return how much it was."""
    return np.ones(megabytes * MB, dtype=np.uint8).nbytes


def without_clear_refs(megabytes):
    """Set up a system that cannot reset the high-water mark."""
    module._reset_peak = lambda: False
    return allocate(megabytes)


def killed(_subject):
    os.kill(os.getpid(), signal.SIGKILL)


def failing(_subject):
    raise LookupError("from the work")


def test_sees_a_known_allocation_and_returns_the_result():
    found = measure(partial(allocate, 1), partial(allocate, 200))
    assert found.result == 200 * MB
    assert found.seconds > 0
    if found.exact:
        assert abs(found.peak_bytes - 200 * MB) < TOLERANCE
    else:
        assert found.peak_bytes > 200 * MB - TOLERANCE


def test_does_not_see_what_was_freed_before():
    found = measure(partial(allocate, 400), partial(allocate, 50))
    if not found.exact:
        pytest.skip("this system cannot reset the high-water mark of resident memory")
    assert abs(found.peak_bytes - 50 * MB) < TOLERANCE


def test_without_clear_refs_the_peak_is_never_too_small():
    found = measure(partial(without_clear_refs, 300), partial(allocate, 200))
    assert not found.exact
    assert found.peak_bytes > 200 * MB - TOLERANCE


def test_memory_that_the_set_up_keeps_is_not_counted():
    found = measure(partial(np.ones, 200 * MB, np.uint8), partial(allocate, 10))
    if not found.exact:
        pytest.skip("this system cannot reset the high-water mark of resident memory")
    assert abs(found.peak_bytes - 10 * MB) < TOLERANCE


def test_an_error_in_the_work_is_raised_here():
    with pytest.raises(LookupError, match="from the work"):
        measure(int, failing)


def test_a_killed_process_is_an_error_that_says_so():
    with pytest.raises(ChildProcessError, match="memory"):
        measure(int, killed)


@pytest.fixture
def measured(monkeypatch):
    """Collect the demo's calls of measure, after a row of 100 tokens that took 1 s and 100 MB."""
    calls = []
    monkeypatch.setattr(demo, "measure", lambda *args: calls.append(args) or "measured")
    before = demo.Row("short", ["text"], [np.zeros(100)], 0)
    before.full = before.chunked = module.Measurement(1.0, 100 * MB, True, np.ones((1, 2)))
    long = demo.Row("long", ["text"], [np.zeros(1000)], 0)
    return before, long, calls


def test_the_demo_runs_no_full_pass_that_does_not_fit(measured, monkeypatch):
    before, long, calls = measured
    monkeypatch.setattr(demo, "free_bytes", lambda: 1000 * MB)
    assert demo._embedding(long, "full", None, before) is None
    assert not calls
    assert "memory" in long.notes[0]
    assert "1,049 MB" in long.notes[0]
    assert demo._embedding(long, "chunked", 512, before) == "measured"


def test_the_demo_runs_a_full_pass_that_fits_but_none_that_takes_too_long(measured, monkeypatch):
    before, long, calls = measured
    monkeypatch.setattr(demo, "free_bytes", lambda: 5000 * MB)
    assert demo._embedding(long, "full", None, before) == "measured"
    monkeypatch.setattr(demo, "LONGEST_SECONDS", 5)
    assert demo._embedding(long, "full", None, before) is None
    assert demo._embedding(long, "chunked", 512, before) is None
    assert all("time" in note for note in long.notes)
    assert len(calls) == 1
