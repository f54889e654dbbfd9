"""Run the tests of each pull request on stock and on patched kernels, then the laws.

A test that a request brings must fail on stock, unless its page calls it a control, and pass on
patched. Each request has processes of its own: a fault spoils all that comes after it.
"""

from __future__ import annotations

import argparse
import functools
import re
import shutil
import subprocess
import sys

from ci import forks
from ci.gpu.build import lay_out
from ci.gpu.place import LIBRARIES, SOURCES, Place
from ci.gpu.table import Record, Row, UnavailableError

REQUESTS = "Pull requests: their tests on stock, which must fail, and on patched kernels"
# A rehearsal takes one that runs in the interpreter, and those of one file on the emulation.
REHEARSED = (
    "channel-first-short-last-chunk",
    "dfinal-states-out-of-bounds",
    "dinitial-states-fp32",
)
# The laws in each dtype, by file, and what a rehearsal takes of them.
LAWS = {
    "tests/gpu/test_ops.py": "(chunking and quick) or (fused and float32)",
    "tests/gpu/test_models.py": "float32",
}
# compute-sanitizer's tools, on tests of requests, and whether stock must show an error there.
# Patched must show none. (racecheck sees shared memory alone.)
SANITIZED = {
    ("memcheck", "dfinal-states-out-of-bounds"): True,
    ("memcheck", "channel-first-misaligned"): True,
    ("racecheck", "states-in-place"): False,
    ("racecheck", "channel-first-short-last-chunk"): False,
}


def run(place: Place, record: Record, _options: argparse.Namespace) -> None:
    """Run all of it."""
    for source in SOURCES:
        for library in LIBRARIES:
            lay_out(place, source, library)
    requests = {one.name: one for one in place.requests}
    chosen = {n: r for n, r in requests.items() if not place.rehearsed or n in REHEARSED}
    makers = {
        f"{one.library}: {n}": functools.partial(_held, place, one) for n, one in chosen.items()
    }
    columns = ["tests", "fail on stock", "pass patched"]
    record.table(REQUESTS, columns, makers, at_once=2 if place.rehearsed else 4)
    laws = {file: functools.partial(_laws, place, file) for file in LAWS}
    record.table("The laws, on patched kernels", ["outcome"], laws)
    sanitizer = {
        f"{tool}, {source}: {name}": functools.partial(
            _sanitized, place, tool, requests[name], source
        )
        for tool, name in SANITIZED
        for source in SOURCES
    }
    record.table("compute-sanitizer", ["errors"], sanitizer, at_once=4)


def _held(place: Place, tests: forks.RequestTests) -> Row:
    """Hold a request to what its tests must do."""
    fork = place.fork(tests.library)
    ran = {
        source: forks.run_named(
            fork,
            place.built(source, tests.library),
            list(tests.brought),
            tests.names,
            place.environment(source),
        )
        for source in SOURCES
    }
    stock, patched = ran["stock"], ran["patched"]
    row: Row = {
        "tests": len(tests.names),
        "fail on stock": _share(stock, forks.FAILED),
        "pass patched": _share(patched, forks.PASSED),
        "stock says": next((c.why[:200] for c in stock.values() if c.outcome == forks.FAILED), ""),
    }
    faults = tests.faults_before(stock) + tests.faults_after(patched)
    return row | ({"fault": "; ".join(faults)[:500]} if faults else {})


def _share(ran: dict[str, forks.Case], outcome: str) -> str:
    return f"{sum(case.outcome == outcome for case in ran.values())} of {len(ran)}"


def _laws(place: Place, file: str) -> Row:
    # Warnings of other releases than the pinned ones are not asked for.
    options = [
        "-W",
        "default",
        "--tb=short",
        *(["-k", LAWS[file]] if place.rehearsed else []),
        file,
    ]
    ran = forks.run_pytest(place.root, place.environment("patched"), options)
    failed = [f"{name}: {case.why}" for name, case in ran.items() if case.outcome == forks.FAILED]
    if not any(case.outcome == forks.PASSED for case in ran.values()):
        failed.append("no test passed")
    return {"outcome": forks.summary(ran)} | ({"fault": "; ".join(failed)[:500]} if failed else {})


def _sanitized(place: Place, tool: str, tests: forks.RequestTests, source: str) -> Row:
    """Run a request's tests under compute-sanitizer, and count the errors that it sees."""
    if shutil.which("compute-sanitizer") is None:
        raise UnavailableError("there is no compute-sanitizer on the PATH")
    if place.rehearsed:
        raise UnavailableError("it looks at kernels on a GPU alone")
    folder = place.built(source, tests.library)
    command = ["compute-sanitizer", "--tool", tool, "--target-processes", "all", sys.executable]
    command += ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", " or ".join(tests.names)]
    own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*command, *tests.brought],
        cwd=folder,
        env=place.environment(source) | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    print(done.stdout, file=sys.stderr)
    said = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", done.stdout)
    if said is None:
        raise RuntimeError(f"it printed no summary: {done.stdout.strip()[-200:]}")
    row: Row = {"errors": int(said[1])}
    if source == "patched" and row["errors"]:
        row["fault"] = "wanted: no errors"
    if source == "stock" and SANITIZED[tool, tests.name] and not row["errors"]:
        row["fault"] = "wanted: some errors"
    return row
