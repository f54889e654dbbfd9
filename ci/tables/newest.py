"""Say what is to be done for the newest releases: `nox -s test-newest` runs it.

Prints a table of what works in the environment that runs this program, which the session fills with
the newest release of everything. Details of what is not right follow below it. Each thing

- *works*, as on the releases that the project is pinned to;
- is *slower*: right, but not on its fast path;
- is *refused*: compat, or the tool, says that it cannot and why, and no number is given; or is
- *broken*: numbers that differ, a FutureWarning about a call of ours, an error that is not one of
  compat, a test that fails, a series of patches that is not right on the release.

Exit status 1 if anything is broken.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from ci import forks
from ci.forks._tests import FAILED, PASSED, Case, read
from ci.tables import matrix

ROOT = matrix.ROOT
WORKS, SLOWER, REFUSED, BROKEN = "works", "slower", matrix.REFUSED, "broken"
# The laws, the registry, the hooks, the fast paths, and what must not change.
TESTS = [
    "laws/test_model",
    "laws/test_encode",
    "families/test_supported",
    "hooks/test_switch",
    "hooks/test_unchanged",
    "families/test_family_fixes",
    "families/test_mamba2",
    "ops/test_delta",
    "ops/test_mamba1",
    "ops/test_rwkv4",
    "hooks/test_refusals",
    "hooks/test_stored_default",
]
# Types missing from the registry have a row of their own, as compat refuses them.
COMPLETENESS = "test_every_recurrent_model_of_transformers_is_supported_or_listed_with_a_reason"
# The verdict on a rebase, and ours: a series that nobody tested does not count as working.
REBASED = {"right": WORKS, "broken": BROKEN, "does not fit": BROKEN, "not run": REFUSED}


@dataclass(frozen=True)
class Row:
    """The verdict on one thing.

    Attributes:
        thing: A model type, a group of tests, a library.
        verdict: `WORKS`, `SLOWER`, `REFUSED` or `BROKEN`.
        why: The reason in a line; empty where there is nothing to say.
        details: Text that is printed below the table.
    """

    thing: str
    verdict: str
    why: str = ""
    details: str = ""

    def __str__(self) -> str:
        """Return a line of the table, in Markdown."""
        cells = (self.thing, self.verdict, " ".join(self.why.split()).replace("|", "\\|"))
        return f"| {' | '.join(cells)} |"


def inside() -> dict[str, Any]:
    """Check compat in this environment, beyond the checks of `ci.tables.matrix`."""
    found = matrix.inside()
    import compat

    probes: dict[str, Callable[[], Any]] = {
        "fast paths": fast_paths,
        "hooks": hooks,
        "new types": new_types,
        "status": lambda: str(compat.status()),
    }
    return found | {name: matrix.attempted(probe) for name, probe in probes.items()}


def hooks() -> str:
    """Check that the hooks go in, and come out without a trace."""
    import compat

    compat.disable_vertical_chunking()  # The tests look at the released methods when imported.
    attributes: Any = importlib.import_module("tests.hooks.test_switch").attributes
    before = attributes()
    report = compat.enable_vertical_chunking()
    absent = [library.library for library in report.libraries if library.state == "absent"]
    compat.disable_vertical_chunking()
    after = attributes()
    changed = [key for key in before | after if before.get(key) != after.get(key)]
    if absent:
        return f"{matrix.WRONG}, enabled without an error, and absent from {', '.join(absent)}"
    if changed:
        names = ", ".join(f"{owner.__name__}.{name}" for owner, name in changed)
        return f"{matrix.WRONG}, left behind: {names}"
    return matrix.RIGHT


def new_types() -> str:
    """List the recurrent model types of the installed transformers that the registry lacks."""
    from compat.families.lookup import FAMILIES
    from compat.families.supported import UNSUPPORTED

    found, _ = importlib.import_module("tests.families.test_supported").recurrent_types()
    new = sorted(found - set(FAMILIES) - set(UNSUPPORTED))
    known = f"{matrix.REFUSED}: not in the registry, and so refused as unknown: {', '.join(new)}"
    return known if new else matrix.RIGHT


def fast_paths() -> dict[str, str]:
    """Say for each type with a fast path on a CPU that it is right, or why it is not taken."""
    import compat
    from compat.families import mamba1, mamba2

    paths = compat.status().paths
    # A path that the report leaves out is unknown, although the model is there.
    left_out = "compat's report does not name it: it is native, or its mixer is called otherwise"
    found = dict.fromkeys(sorted([*mamba2.MIXERS, *mamba1.MIXERS, "rwkv"]), left_out) | paths
    return {name: f"{SLOWER}: {why}" if why else matrix.RIGHT for name, why in found.items()}


def judged(thing: str, said: str) -> Row:
    """Return the row for a verdict of the matrix or a probe; an unknown verdict is broken."""
    verdict, _, why = said.partition(": ")
    if said == matrix.RIGHT:
        return Row(thing, WORKS)
    if said == matrix.ABSENT:
        return Row(thing, REFUSED, said)
    return Row(thing, verdict, why) if verdict in (SLOWER, REFUSED) else Row(thing, BROKEN, said)


def of_compat(found: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows for the results of `inside`."""
    for name, said in found["models"].items():
        yield judged(name, said)
    for thing in ("new types", "hooks", "encode"):
        yield judged(thing, found[thing])
    paths = found["fast paths"]
    for name, said in paths.items() if isinstance(paths, dict) else [("each type", paths)]:
        yield judged(f"fast path of {name}", said)
    broken = found["status"].startswith(matrix.WRONG)
    yield Row("status", BROKEN if broken else WORKS, "is below", found["status"])


def compat_rows() -> Iterator[Row]:
    """Run `inside` in a process of its own, which the new releases may make crash."""
    run = subprocess.run(
        [sys.executable, "-m", "ci.tables.newest", "inside"],
        env=_environment(),
        capture_output=True,
        text=True,
    )
    if run.returncode:
        last = run.stderr.strip().splitlines()[-1:] or [f"exit status {run.returncode}"]
        yield Row("compat", BROKEN, last[0], run.stderr)
        return
    yield from of_compat(json.loads(run.stdout.splitlines()[-1]))


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def test_rows() -> list[Row]:
    """Run the tests, with FutureWarning as an error even where a test would let it pass."""
    files = [f"tests/{name}.py" for name in TESTS]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "found.xml")
        command = "-m pytest -q --tb=line -n auto --dist worksteal -p no:cacheprovider"
        command += f" --continue-on-collection-errors -W error::FutureWarning --junitxml={report}"
        command += f" --deselect tests/families/test_supported.py::{COMPLETENESS}"
        run = subprocess.run(
            [sys.executable, *command.split(), *files],
            cwd=ROOT,
            env=_environment() | {"HYPOTHESIS_PROFILE": "unshrunk"},
            stdout=sys.stderr,
        )
        return of_tests(read(report) if report.exists() else {}, run.returncode)


def of_tests(cases: dict[str, Case], status: int) -> list[Row]:
    """Return a row for each file of tests, from its tests' outcomes and pytest's exit status."""
    rows = []
    for name in TESTS:
        thing, module = f"tests/{name}.py", f"tests/{name}".replace("/", ".")
        # A file that cannot be imported appears as a test without a module.
        own = {
            test: case
            for test, case in cases.items()
            if test.startswith(f"{module}::") or test == f"::{module}"
        }
        failed = {test: case.why for test, case in own.items() if case.outcome == FAILED}
        passed = sum(case.outcome == PASSED for case in own.values())
        if failed:
            details = "\n".join(f"{test}: {why}" for test, why in sorted(failed.items()))
            rows.append(Row(thing, BROKEN, f"{len(failed)} of {len(own)} failed", details))
        elif passed:
            rows.append(Row(thing, WORKS, f"{passed} passed"))
        else:
            why = f"none of its tests passed; pytest's exit status was {status}"
            rows.append(Row(thing, BROKEN, why))
    if status and all(row.verdict == WORKS for row in rows):
        rows.append(Row("pytest", BROKEN, f"exit status {status}, though no test failed"))
    return rows


def rebase_row(library: str) -> Row:
    """Return the row for the series of a library on its newest release."""
    thing = f"rebase {library}"
    try:
        found = forks.rebase(library, "newest", ROOT)
    except Exception as error:  # The other libraries must still be reported.
        return Row(thing, BROKEN, f"{type(error).__name__}: {error}".partition("\n")[0], str(error))
    return of_rebase(thing, found.version, found.verdict, found.text)


def of_rebase(thing: str, release: str, verdict: str, text: str) -> Row:
    """Return the row for a rebase, with its text as details where there is something to do."""
    ours = REBASED[verdict]
    return Row(thing, ours, f"{release}: {verdict}", "" if ours == WORKS else text)


def installed(name: str) -> str | None:
    """Return the version of a distribution without torch's build suffix; None if it is absent."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None


def range_row() -> Row:
    """Check whether pip would install these releases for a user."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return of_range({line: installed(Requirement(line).name) for line in project["dependencies"]})


def of_range(found: dict[str, str | None]) -> Row:
    """Return the row for pyproject.toml's requirements and the installed versions."""
    outside = [
        f"{there or 'nothing'} for {line}"
        for line, there in found.items()
        if there is None or not Requirement(line).specifier.contains(there)
    ]
    return Row("pyproject.toml", REFUSED if outside else WORKS, ", ".join(outside))


def moved() -> list[str]:
    """List the installed versions that differ from the pins of ci/constraints.txt."""
    text = (ROOT / "ci" / "constraints.txt").read_text()
    found = []
    for line in text.splitlines():
        name, pinned, pin = line.partition("==")
        if pinned and (there := installed(name)) not in (None, pin):
            found.append(f"{name} {there} (pinned: {pin})")
    return found


def rows() -> Iterator[Row]:
    """Yield all rows, as they are found."""
    yield range_row()
    yield from compat_rows()
    yield from test_rows()
    for library in forks.libraries(ROOT):
        yield rebase_row(library)


def told(found: Iterable[Row]) -> int:
    """Print the table row by row, then the details, and return the exit status."""
    print("| | verdict | |", "|---|---|---|", sep="\n", flush=True)
    kept = []
    for row in found:
        kept.append(row)
        print(row, flush=True)
    for row in kept:
        if row.details:
            print(f"\n{row.thing}: {row.verdict}\n{row.details}")
    broken = [row.thing for row in kept if row.verdict == BROKEN]
    if broken:
        print(f"\nBroken: {', '.join(broken)}")
    return int(bool(broken))


def main() -> int:
    """Say what is newer than the pins, print the table, and return the exit status."""
    print("Other than pinned:", ", ".join(moved()) or "nothing", end="\n\n", flush=True)
    return told(rows())


if __name__ == "__main__":
    if sys.argv[1:] == ["inside"]:
        print(json.dumps(inside()))
    else:
        raise SystemExit(main())
