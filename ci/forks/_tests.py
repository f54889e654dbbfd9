"""Tests run on a tree of sources, in a process of their own, and what became of each.

This module is also the plugin of pytest that puts such a tree in the place of a fork's, for files
of this repository that run a series' tests in their own way.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
from unittest import mock

from ci.forks._release import ROOT, Fork, ForkError
from ci.forks._tree import git, start
from ci.forks.behaviour import PACKAGES

PASSED, SKIPPED, FAILED = "passed", "skipped", "failed"
# The tests, and what they and their settings are read from.
_BESIDE = ["tests", "conftest.py", "pyproject.toml", "setup.cfg", "setup.py", "utils"]
# For the plugin: a library, and the tree that stands for its fork's.
_LIBRARY, _TREE = "FORKS_LIBRARY", "FORKS_TREE"
_IMPORT = re.compile(r"(?:No module named|cannot import name '\w+' from) '(\w+)")


class NoReportError(ForkError):
    """pytest ended before it wrote what became of all tests.

    Attributes:
        status: What it ended with; negative, if by a signal.
        output: All that it printed.
    """

    def __init__(self, status: int, output: str) -> None:
        last = [line for line in output.splitlines() if line.strip()][-1:] or ["no word"]
        super().__init__(f"pytest ended with status {status}: {last[0].removeprefix('E').strip()}")
        self.status, self.output = status, output


@dataclass(frozen=True)
class Case:
    """The outcome of a test: passed, skipped or failed, and the line that says most of why."""

    outcome: str
    why: str = ""


@dataclass(frozen=True)
class Ran:
    """The outcomes of files of tests.

    Attributes:
        files: In the tree; several where one file of this repository runs them.
        by: That file of this repository, if any.
        verdict: "passed" if at least one test did and none failed. "not run" if none passed nor
            failed, or what failed wants a module that is not of the library.
        text: How many passed and failed, or why they were not run.
        failures: The tests that failed, each with where and why.
    """

    files: list[str]
    verdict: Literal["passed", "failed", "not run"]
    text: str
    failures: list[str] = field(default_factory=list)
    by: str = ""

    @property
    def name(self) -> str:
        """The files, and what runs them."""
        return ", ".join(self.files) + (f", by {self.by}" if self.by else "")


def pytest_configure() -> None:
    """Put a tree in the place of a fork's, where pytest has this module as its plugin."""
    from ci import forks
    from ci.forks import _commands

    patched, library, tree = forks.patched, os.environ[_LIBRARY], Path(os.environ[_TREE])

    def instead(name: str, root: Path = ROOT) -> Path:
        return tree if name == library else patched(name, root)

    for module in (forks, _commands):
        mock.patch.object(module, "patched", instead).start()


def own_tests(tree: Path) -> list[str]:
    """The files of tests that the patches of a tree add or change."""
    there = ["diff", "--name-only", "--diff-filter=d", f"{start(tree)}..main", "--", "tests"]
    return [path for path in git(tree, *there).splitlines() if Path(path).match("test_*.py")]


def laid_out(library: str, tests: list[Path], sources: Path, folder: Path) -> Path:
    """A folder with the tests, the first last, without the package that lies beside them."""
    folder.mkdir()
    for root in reversed(tests):
        for name in _BESIDE:
            if (root / name).is_dir():
                shutil.copytree(root / name, folder / name, dirs_exist_ok=True)
            elif (root / name).is_file():
                shutil.copy(root / name, folder / name)
    if (package := PACKAGES.get(library, ".")) != ".":
        (folder / package).symlink_to(sources / package)
    return folder


def outcomes(
    library: str,
    files: list[str],
    tests: list[Path],
    sources: Path,
    options: list[str],
    environment: Mapping[str, str] | None = None,
) -> dict[str, Case]:
    """Say what became of each test of some files, run on the package in `sources`."""
    if not files:
        return {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = laid_out(library, tests, sources, Path(scratch, "sources"))
        # Without prepending to the path: the tests' own folders would hide the package.
        own = ["--import-mode=importlib", "-o", "consider_namespace_packages=true"]
        variables = _environment(library, sources) | dict(environment or {})
        return run_pytest(folder, variables, [*own, *options, *files])


def _environment(library: str, sources: Path) -> dict[str, str]:
    path = [sources / PACKAGES.get(library, "."), ROOT, os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def run_pytest(folder: Path, environment: dict[str, str], options: list[str]) -> dict[str, Case]:
    """Run pytest in a folder, show on stderr what it prints, and read its report."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "found.xml")
        command = "-m pytest -q --tb=line --rootdir=. -p no:cacheprovider -o log_cli=false"
        command += f" --continue-on-collection-errors --junitxml={report}"
        if find_spec("xdist"):
            command += " -n auto --dist worksteal"
        with subprocess.Popen(
            [sys.executable, *command.split(), *options],
            cwd=folder,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            lines = []
            for line in process.stdout or ():
                lines.append(line)
                print(line, end="", file=sys.stderr, flush=True)
        # 0: all passed, 1: not all did, 5: there are none. Else a report is not the whole.
        if process.returncode not in (0, 1, 5) or not report.exists():
            raise NoReportError(process.returncode, "".join(lines))
        return read(report)


def read(report: Path) -> dict[str, Case]:
    """The outcomes in a report; of subtests and of a test's setup and teardown, the worst."""
    order = [PASSED, SKIPPED, FAILED]
    found: dict[str, Case] = {}
    for element in ET.parse(report).iter("testcase"):
        name, case = f"{element.get('classname')}::{element.get('name')}", Case(PASSED)
        for child in element:
            if child.tag in ("skipped", "failure", "error"):
                outcome = SKIPPED if child.tag == "skipped" else FAILED
                case = max(case, Case(outcome, _why(child)), key=lambda c: order.index(c.outcome))
        found[name] = max(found.get(name, case), case, key=lambda c: order.index(c.outcome))
    return found


def _why(element: ET.Element) -> str:
    """Return where and why a test was skipped or failed, in a line."""
    message, text = element.get("message") or "", (element.text or "").strip()
    if not message.startswith("collection "):
        # Of the traceback, which only `--tb=short` has here, the last place outside of a library.
        places = re.findall(r"^(\S+:\d+): in ", text, re.MULTILINE)
        own = [place for place in places if "site-packages" not in place][-1:]
        return ": ".join([*own, message.partition("\n")[0]])
    if match := re.search(r"^E +(\S.*)$", text, re.MULTILINE):
        return match[1]
    if match := re.search(r"'Skipped: (.*)'\)$", text):
        return match[1]
    return text.rpartition("\n")[2]


def summary(found: dict[str, Case]) -> str:
    """Return how many passed, were skipped and failed."""
    counts = Counter(case.outcome for case in found.values())
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in (PASSED, SKIPPED, FAILED))


def run_own(fork: Fork, tree: Path) -> list[Ran]:
    """Run the tests that the patches of a tree bring, and say what became of each file.

    Those that fork.toml names in `run_by` need a GPU, and run on a CPU by files of this repository.
    A file without a test is left out.
    """
    files = own_tests(tree)
    runners: dict[str, list[str]] = {}
    for file in files:
        runners.setdefault(fork.run_by.get(file, ""), []).append(file)
    ran = _direct(fork, runners.pop("", []), tree)
    return ran + [_by(fork, runner, files, tree) for runner, files in runners.items()]


def run_named(
    fork: Fork,
    tree: Path,
    files: list[str],
    names: list[str],
    environment: Mapping[str, str] | None = None,
) -> dict[str, Case]:
    """Say what became of each case of some tests, in files of a tree; run as `run_own` does.

    A file that cannot be run at all is a case too, which failed. `environment` has variables of the
    processes that run them, above those that are set anyway.
    """
    runners: dict[str, list[str]] = {}
    for file in files:
        runners.setdefault(fork.run_by.get(file, ""), []).append(file)
    chosen = " or ".join(name.removeprefix("test_") for name in names)
    found: dict[str, Case] = {}
    for runner, own in runners.items():
        try:
            if runner:
                chosen_there = f"not test_stock and ({chosen})"
                found |= _run_by(fork, runner, tree, chosen_there, environment)
            else:
                options = ["--tb=short", "-k", chosen]
                found |= outcomes(fork.library, own, [tree], tree, options, environment)
        except NoReportError as error:
            found |= {f"{file}::": Case(FAILED, str(error)) for file in own}
    return found


def _direct(fork: Fork, files: list[str], tree: Path) -> list[Ran]:
    if not files:
        return []
    if why := _import_error(fork, tree):
        git(tree, "checkout", "-q", start(tree))
        released = _import_error(fork, tree)  # No fault of the patches.
        git(tree, "checkout", "-q", "main")
        return [Ran([file], "not run" if released else "failed", released or why) for file in files]
    try:
        found = outcomes(fork.library, files, [tree], tree, ["--tb=short"])
    except NoReportError as error:
        # A crash, or a conftest.py of the series that cannot be imported, is the series' own.
        changed = git(tree, "diff", "--name-only", f"{start(tree)}..main").splitlines()
        confs = [path for path in changed if Path(path).name == "conftest.py"]
        own = error.status < 0 or any(path in error.output for path in confs)
        return [Ran([file], "failed" if own else "not run", str(error)) for file in files]
    ran = []
    for file in files:
        dotted = file.removesuffix(".py").replace("/", ".")
        own_cases = {
            name: case
            for name, case in found.items()
            if f"{name.removeprefix('::')}.".startswith((f"{dotted}.", f"{dotted}::"))
        }
        if own_cases:
            ran.append(_judged(fork, [file], own_cases))
    return ran


def _import_error(fork: Fork, tree: Path) -> str:
    """The last line of why the package in a tree cannot be imported; empty if it can."""
    run = subprocess.run(
        [sys.executable, "-P", "-c", f"import {fork.library.replace('-', '_')}"],
        env=os.environ | _environment(fork.library, tree),
        capture_output=True,
        text=True,
    )
    return run.stderr.strip().rpartition("\n")[2] if run.returncode else ""


def _by(fork: Fork, runner: str, files: list[str], tree: Path) -> Ran:
    """Say what a file of this repository says of the tests that it takes from the tree."""
    try:
        found = _run_by(fork, runner, tree, "not test_stock")
    except NoReportError as error:
        return Ran(files, "failed" if error.status < 0 else "not run", str(error), by=runner)
    # What it cannot prepare is not the fault of the patches.
    if unread := [case.why for name, case in found.items() if name.startswith("::")]:
        return Ran(files, "not run", unread[0], by=runner)
    return replace(_judged(fork, files, found), by=runner)


def _run_by(
    fork: Fork,
    runner: str,
    tree: Path,
    chosen: str,
    above: Mapping[str, str] | None = None,
) -> dict[str, Case]:
    """Run a file of this repository with the tree in the fork's place."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": path, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", _LIBRARY: fork.library, _TREE: str(tree)}
    environment |= dict(above or {})
    options = ["--tb=short", "-p", __name__, "-k", chosen, runner]
    return run_pytest(fork.root, environment, options)


def _judged(fork: Fork, files: list[str], found: dict[str, Case]) -> Ran:
    own = {fork.library.replace("-", "_"), "tests"}  # What another package lacks says nothing.
    failed = {name: case.why for name, case in found.items() if case.outcome == FAILED}
    foreign = [
        why for why in failed.values() if (match := _IMPORT.search(why)) and match[1] not in own
    ]
    lines = [f"{name.partition('::')[2]}: {why}" for name, why in sorted(failed.items())]
    if len(failed) > len(foreign):
        return Ran(files, "failed", summary(found), lines)
    if foreign:
        return Ran(files, "not run", foreign[0], lines)
    if not any(case.outcome == PASSED for case in found.values()):
        why = next(iter(found.values()), Case(SKIPPED, "no test was found")).why
        return Ran(files, "not run", f"{summary(found)} ({why})")
    return Ran(files, "passed", summary(found))
