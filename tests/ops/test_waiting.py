"""torch's threads wait without spinning, and there are no more of them than were asked for.

No time is measured but that of the CPU, which other processes do not change: the time that a
process takes while it has nothing to do.
"""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from typer.testing import CliRunner

import compat
from ci.bench import under_load
from compat.__main__ import app
from compat.ops import compiled, waiting

ROOT = Path(compat.__file__).parent.parent

BEGIN = """if True:
    import os, statistics, sys, time
    import torch

    x = torch.randn(200, 200)

    def spent():
        "Seconds of the CPU after a loop of several threads, while nothing is done: the median."
        found = []
        for _ in range(15):
            x @ x
            before = time.process_time()
            time.sleep(0.02)
            found.append(time.process_time() - before)
        return statistics.median(found)

    def threads():
        return set(os.listdir("/proc/self/task"))
"""

READ = """
    import compat
    from compat.families import tiny_models

    def read(family):
        model = tiny_models.build(tiny_models.config(family))
        ids = torch.randint(64, (1, 50))
        for _ in compat.iter_chunks(model, input_ids=ids, vertical_chunk_size=16):
            pass
"""


def run(code, cpus=2, **environment):
    """Run code in a process of its own, on so many CPUs, and return what it prints."""
    if not Path("/proc/self/task").exists():
        pytest.skip("this system does not list a process's threads")
    if len(os.sched_getaffinity(0)) < cpus:
        pytest.skip(f"there are not {cpus} CPUs")
    unset = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    given = {name: value for name, value in os.environ.items() if name not in unset}
    own = f"import os; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{cpus}])\n"
    command = [sys.executable, "-c", own + BEGIN + code]
    done = subprocess.run(
        command, cwd=ROOT, env=given | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture
def libgomp():
    if waiting._libgomp() is None:
        pytest.skip("torch does not run on libgomp here")


# mamba2 runs on ops of ours, minimax on the released code alone.
@pytest.mark.parametrize("family", ["mamba2", "minimax"])
def test_after_a_chunk_threads_wait_asleep(libgomp, family):
    code = f"""
    torch.set_num_threads(2)
    before = spent()
    read({family!r})
    time.sleep(0.2)
    print(before, spent())
    """
    before, after = map(float, run(READ + code))
    # libgomp spins 300,000 times, or 100 times.
    assert after < before / 5


@pytest.mark.parametrize(
    "environment",
    [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "1000"}],
)
def test_how_they_wait_is_the_users_choice_where_there_is_one(environment):
    code = """
    torch.set_num_threads(2)
    x @ x
    before = threads()
    read("minimax")
    time.sleep(0.2)
    print(threads() == before)
    """
    assert run(READ + code, **environment) == ["True"]


def test_one_thread_waits_for_nobody():
    code = """
    before = threads()
    read("minimax")
    time.sleep(0.2)
    print(len(before), threads() == before)
    """
    assert run(READ + code, OMP_NUM_THREADS="1") == ["1", "True"]


@pytest.mark.parametrize(
    ("threads", "cpus", "asleep", "missing"),
    [
        (1, 1, 0, 0),
        (1, 64, 0, 0),
        (2, 2, 0, 1),
        (2, 2, 1, 0),
        (64, 64, 0, 1),
        (32, 64, 0, 33),  # There is one thread a core, of two that the hardware has.
        (32, 64, 1, 32),  # They were 64 before.
        (64, 64, 33, 0),
        (8, 64, 0, 0),  # It would take too many.
        (8, 2, 0, 1),  # The process has lost CPUs since libgomp counted them.
    ],
)
def test_with_those_that_sleep_there_are_more_threads_than_cpus(threads, cpus, asleep, missing):
    assert waiting._missing(threads, cpus, asleep) == missing


def test_where_no_thread_can_be_started_they_wait_as_they_did(libgomp, monkeypatch):
    def refuse(*args):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(waiting, "_asleep", 0)
    monkeypatch.setattr(waiting._thread, "start_new_thread", refuse)
    waiting.wait_asleep()
    assert waiting._asleep == 0


# The native kernels: as many threads as torch has when they are called.


KERNELS = """
    from compat.ops import mamba2, using

    def scan(tokens=300):
        given = dict(zxbcdt=torch.randn(1, tokens, 98), conv1d_weight=torch.randn(64, 4),
                     conv1d_bias=None, dt_bias=torch.randn(2), A=-torch.rand(2), D=torch.ones(2))
        with using("native"), torch.no_grad():
            mamba2.mamba_split_conv1d_scan_combined(**given, headdim=16)
"""


@pytest.fixture
def library():
    if compiled.library() is None:
        pytest.skip(compiled.reason())


def test_the_kernels_have_the_threads_that_torch_has_at_each_call(library):
    code = """
    x @ x
    wanted = [1, 2, 0, -3]
    for count in (3, 5, 1, 2):
        torch.set_num_threads(count)  # It has another pool besides, whose threads come here.
        before, more = len(threads()), wanted.pop(0)
        scan()
        for _ in range(100):  # libgomp does not wait for those that it ends.
            if len(threads()) - before == more:
                break
            time.sleep(0.05)
        print(len(threads()) - before)
    """
    # Threads go from 2 to 3, and to 5; on one thread the others sleep; then from 5 to 2.
    assert run(KERNELS + code) == ["1", "2", "0", "-3"]


@pytest.mark.parametrize(("cpus", "environment"), [(2, {"OMP_NUM_THREADS": "1"}), (1, {})])
def test_the_kernels_have_one_thread_where_one_is_granted(library, cpus, environment):
    code = """
    scan()
    print(torch.get_num_threads(), len(threads()))
    """
    assert run(KERNELS + code, cpus, **environment) == ["1", "1"]


def test_a_loop_that_is_shorter_than_the_threads_are_many_ends_none_of_them(library):
    """Otherwise torch's next loop would have to start them again, as libgomp keeps one team."""
    code = """
    torch.set_num_threads(6)
    x @ x
    torch.randn(3_000_000).exp()
    before = threads()
    scan(20)  # One segment, two heads, three grains of the norm.
    time.sleep(0.2)
    torch.randn(3_000_000).exp()
    print(len(before) >= 6, threads() == before)
    """
    assert run(KERNELS + code) == ["True", "True"]


@pytest.mark.parametrize(
    ("granted", "variable", "threads"), [(2, None, 2), (8, None, 3), (2, "3", 3)]
)
def test_the_command_has_no_more_threads_than_a_container_grants(
    monkeypatch, tmp_path, granted, variable, threads
):
    found = []

    def load(*args, **kwargs):
        found.append(torch.get_num_threads())
        raise OSError("that is all that was to be seen")

    monkeypatch.setattr("compat.jobs.embedder.load_model", load)
    monkeypatch.setattr("joblib.cpu_count", lambda: granted)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    (tmp_path / "a.txt").write_text("text")
    command = ["embed", str(tmp_path / "a.txt"), "-o", str(tmp_path / "out.parquet")]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        CliRunner().invoke(app, command)
    finally:
        torch.set_num_threads(before)
    assert found == [threads]


def test_under_load_takes_turns_and_leaves_no_process(monkeypatch):
    monkeypatch.setattr(under_load, "WAYS", {"one thread": {"OMP_NUM_THREADS": "1"}})
    found = dict(under_load.compare(hidden_size=64, tokens=8, rounds=2, busy=[1]))
    assert [len(turns) for turns in found[1].values()] == [2]
    assert all(taken.wall > 0 and taken.cpu > 0 for taken in found[1]["one thread"])
    assert not [p for p in psutil.Process().children() if "under_load" in " ".join(p.cmdline())]
