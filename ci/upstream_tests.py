"""Upstream's own tests: `python -m ci.upstream_tests LIBRARY [--checkout FOLDER]`.

Runs the tests that a library's sdist holds on the release, on the fork, and on the release with
compat's hooks, each in a process of its own; and the tests that the series adds on the fork. Prints
what differs. Exit status 1 where a test that passed on the release does not pass on one of the
others, or a test of the series does not pass.

What is counted are names in pytest's report, where a subtest has the name of its test: the two are
one, with the worse outcome. pytest's own last line counts the outcomes of both.

The files are those that `upstream_tests` of fork.toml names. Many sdists lack most of them; a
checkout of the library's repository, at the tag of the release or near it, has them all.

This module is also the plugin of pytest that puts the hooks on.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from ci import forks
from ci.behaviour import PACKAGES
from ci.forks._release import Fork

ROOT = forks.ROOT
RELEASE, FORK, HOOKED = "release", "fork", "release with compat"
PASSED, SKIPPED, FAILED = "passed", "skipped", "failed"
# The tests, and what they and their settings are read from.
_BESIDE = ["tests", "conftest.py", "pyproject.toml", "setup.cfg", "setup.py", "utils"]


def pytest_configure() -> None:
    """Put compat's hooks on, where pytest has this module as its plugin."""
    import compat

    compat.enable_vertical_chunking()


def laid_out(library: str, tests: list[Path], sources: Path, folder: Path) -> Path:
    """A folder with the tests, the first last, without the package that lies beside them."""
    folder.mkdir()
    for root in reversed(tests):
        for name in _BESIDE:
            if (root / name).is_dir():
                shutil.copytree(root / name, folder / name, dirs_exist_ok=True)
            elif (root / name).is_file():
                shutil.copy(root / name, folder / name)
    if (package := PACKAGES[library]) != ".":
        (folder / package).symlink_to(sources / package)
    return folder


def outcomes(
    library: str, files: list[str], tests: list[Path], sources: Path, options: list[str]
) -> dict[str, str]:
    """What became of each test of some files, run on the package in `sources`."""
    if not files:
        return {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = laid_out(library, tests, sources, Path(scratch, "sources"))
        path = [sources / PACKAGES[library], ROOT, os.environ.get("PYTHONPATH", "")]
        environment = {
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        # Without prepending to the path: the tests' own folders would hide the package.
        command = "-m pytest -q --tb=line --import-mode=importlib -p no:cacheprovider"
        command += " -o consider_namespace_packages=true -o log_cli=false --junitxml=../found.xml"
        if find_spec("xdist"):
            command += " -n auto --dist worksteal"
        subprocess.run(
            [sys.executable, *command.split(), *options, *files],
            cwd=folder,
            env=os.environ | environment,
            check=False,  # The report says what failed.
            stdout=sys.stderr,
        )
        return read(Path(scratch, "found.xml"))


def read(report: Path) -> dict[str, str]:
    """The outcomes in a report; of subtests and of a test's setup and teardown, the worst."""
    order = [PASSED, SKIPPED, FAILED]
    found: dict[str, str] = {}
    for case in ET.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        tags = {child.tag for child in case}
        outcome = SKIPPED if "skipped" in tags else PASSED
        outcome = FAILED if tags & {"failure", "error"} else outcome
        found[name] = max(found.get(name, PASSED), outcome, key=order.index)
    return found


def summary(found: dict[str, str]) -> str:
    """How many passed, were skipped and failed."""
    counts = Counter(found.values())
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in (PASSED, SKIPPED, FAILED))


def compared(library: str, checkout: Path | None, files: list[str], options: list[str]) -> int:
    """Run and print all of it, and return the exit status."""
    stock, tree = forks.stock(library), forks.patched(library)
    wanted = files or Fork.read(library).upstream_tests
    # A checkout near the release may not fit it; what the sdist has of its own goes first.
    tests = [stock, checkout] if checkout else [stock]
    there = [name for name in wanted if any((root / name).exists() for root in tests)]
    added = [
        name
        for path in sorted((tree / "tests").rglob("test_*.py"))
        if not (stock / (name := str(path.relative_to(tree)))).exists()
    ]
    print(f"{library}: {len(there)} of {len(wanted)} of upstream's files of tests are there")
    for name in sorted(set(wanted) - set(there)):
        print(f"    not in the sdist{' nor the checkout' if checkout else ''}: {name}")
    runs = {RELEASE: (stock, []), FORK: (tree, []), HOOKED: (stock, ["-p", __spec__.name])}
    found = {}
    for which, (sources, plugin) in runs.items():
        found[which] = outcomes(library, there, tests, sources, [*options, *plugin])
        print(f"{which}: {summary(found[which])}", flush=True)
    wrong = 0
    for which in (FORK, HOOKED):
        for name, before in sorted(found[RELEASE].items()):
            now = found[which].get(name, "missing")
            if now != before:
                print(f"    {which}: {name}: {before}, now {now}")
                wrong += before == PASSED
    if not files:
        own = outcomes(library, added, [tree], tree, options)
        print(f"the series' own tests, on the fork: {summary(own)}")
        for name, outcome in sorted(own.items()):
            if outcome == FAILED:
                print(f"    {name}: {outcome}")
                wrong += 1
    print(f"{library}: {wrong} regressions" if wrong else f"{library}: no regression")
    return int(bool(wrong))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ci.upstream_tests",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("library", choices=sorted(PACKAGES))
    parser.add_argument("files", nargs="*", help="instead of those of fork.toml")
    parser.add_argument("--checkout", type=Path, help="take upstream's tests from this folder")
    parser.add_argument("--pytest", default="", metavar="OPTIONS", help="more options for pytest")
    options = parser.parse_args(arguments)
    checkout = options.checkout and options.checkout.resolve()
    return compared(options.library, checkout, options.files, shlex.split(options.pytest))


if __name__ == "__main__":
    sys.exit(main())
