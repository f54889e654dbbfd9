"""Run upstream's own tests, as the sdists have them, on stock and on patched kernels."""

from __future__ import annotations

import argparse
import ast
import functools
from pathlib import Path

from ci import forks
from ci.gpu.build import lay_out
from ci.gpu.place import LIBRARIES, SOURCES, Place
from ci.gpu.table import Record, Row

# What a rehearsal takes: by library, a test of upstream that runs on the emulation in seconds.
REHEARSED = {"causal-conv1d": "test_causal_conv1d_update_with_batch_gather", "mamba-ssm": ""}

LAST = ("test_causal_conv1d",)  # Of some ten thousand cases.


def run(place: Place, record: Record, _options: argparse.Namespace) -> None:
    """Run the tests function by function; LAST comes last."""
    for source in SOURCES:
        for library in LIBRARIES:
            lay_out(place, source, library)
    for library in LIBRARIES:
        makers = {
            f"{file}: {name}": functools.partial(_both, place, library, file, name)
            for file, name in sorted(tests(forks.stock(library)), key=lambda t: t[1] in LAST)
            if not place.rehearsed or name == REHEARSED[library]
        }
        if makers:
            record.table(f"Upstream's tests of {library}", [*SOURCES, "worse"], makers)
    left_out = ", ".join(f"{k}: {', '.join(v)}" for k, v in place.packed["left_out"].items())
    print(f"\nNot in the sdists, and so not run: {left_out}")


def tests(tree: Path) -> list[tuple[str, str]]:
    """The functions of tests in a tree, with their files."""
    return [
        (f"{path.relative_to(tree)}", node.name)
        for path in sorted((tree / "tests").rglob("test_*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


def _both(place: Place, library: str, file: str, name: str) -> Row:
    """Run one function's cases on both; worse is what fails on patched and not on stock."""
    ran = {
        source: forks.run_named(
            place.fork(library),
            place.built(source, library),
            # By themselves they are chosen exactly; a file of this repository takes names.
            [file if place.rehearsed else f"{file}::{name}"],
            [name],
            place.environment(source) | {"MAMBA_DETERMINISTIC": "1"},
        )
        for source in SOURCES
    }
    failed = {
        source: {case for case, found in ran[source].items() if found.outcome == forks.FAILED}
        for source in SOURCES
    }
    worse = sorted(failed["patched"] - failed["stock"])
    row: Row = {source: forks.summary(ran[source]) for source in SOURCES}
    row["worse"] = len(worse)
    return row | ({"fault": f"{', '.join(worse)[:500]} fail on patched alone"} if worse else {})
