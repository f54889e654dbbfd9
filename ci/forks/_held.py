"""Hold a request to its page: its tests and its reproduction, before and after."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

from ci.forks._pages import Request
from ci.forks._paste import paste
from ci.forks._release import Fork
from ci.forks._tests import FAILED, PASSED, Case, run_named
from ci.forks._tree import git


@dataclass(frozen=True)
class RequestTests:
    """The tests of a request, by the files in which they stand.

    Attributes:
        library: Whose request it is.
        name: Of the request.
        state: As its page has it.
        controls: Those that pass on the release too, by the page.
        brought: Names of the tests that it adds or changes, by their file in the tree.
    """

    library: str
    name: str
    state: str
    controls: list[str]
    brought: dict[str, list[str]]

    @property
    def names(self) -> list[str]:
        """All of them."""
        return sorted({name for names in self.brought.values() for name in names})

    def faults_before(self, ran: dict[str, Case]) -> list[str]:
        """Say which do not fail without the request, and which controls do."""
        faults = []
        for name in self.names:
            cases = _of(ran, name)
            outcomes = {case.outcome for case in cases}
            # A module that cannot be imported fails with all its tests.
            fails = FAILED in (outcomes or {case.outcome for case in ran.values()})
            if name in self.controls:
                if fails:
                    faults.append(f"the control {name} fails without the request")
            elif not fails:
                faults.append(f"{name} does not fail without the request ({_counted(cases)})")
        return faults

    def faults_after(self, ran: dict[str, Case]) -> list[str]:
        """Say which do not pass with the request, and in which cases."""
        faults = []
        for name in self.names:
            cases = _of(ran, name)
            if PASSED not in {case.outcome for case in cases}:
                faults.append(f"{name} does not pass with the request ({_counted(cases)})")
        return faults + [
            f"{name.rpartition('::')[2]} fails with the request: {case.why}"
            for name, case in ran.items()
            if case.outcome == FAILED
        ]


def new_tests(tree: Path, before: str, after: str) -> dict[str, list[str]]:
    """The tests that are added or changed between two commits of a tree, by file."""
    changed = git(tree, "diff", "--name-only", "--diff-filter=d", before, after).splitlines()
    files = [path for path in changed if Path(path).match("test_*.py")]
    return {path: sorted(_new_tests(tree, path, before, after)) for path in files}


def held(fork: Fork, tree: Path, request: Request, before: str, after: str) -> list[str]:
    """Say what is not as the page says, of a request between two commits of a tree.

    Every test that it brings or changes fails on `before` in at least one case, but for those that
    the page calls controls, and passes on `after`. The reproduction prints, on both, what is there.
    """
    brought = new_tests(tree, before, after)
    tests = RequestTests(fork.library, request.name, request.state, request.controls, brought)
    files, names = list(brought), tests.names
    if not names:
        return ["it brings no test"]
    faults = [
        f"{name} is called a control, and is no test that it brings"
        for name in request.controls
        if name not in names
    ]
    git(tree, "checkout", "-q", "--force", "-B", "main", before)
    git(tree, "checkout", after, "--", *files)
    git(tree, "commit", "-q", "-m", "the tests alone")
    faults += _printed(fork, tree, request, 0)
    faults += tests.faults_before(run_named(fork, tree, files, names))
    git(tree, "checkout", "-q", "--force", "-B", "main", after)
    faults += _printed(fork, tree, request, 1)
    return faults + tests.faults_after(run_named(fork, tree, files, names))


def _new_tests(tree: Path, path: str, before: str, after: str) -> set[str]:
    """The tests in a file that a request adds or changes."""
    old, new = _tests(tree, path, before), _tests(tree, path, after)
    return {name for name, text in new.items() if old.get(name) != text}


def _tests(tree: Path, path: str, commit: str) -> dict[str, str]:
    if not git(tree, "ls-tree", commit, "--", path):
        return {}
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(git(tree, "show", f"{commit}:{path}"))):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            found[node.name] = found.get(node.name, "") + ast.unparse(node)
    return found


def _of(ran: dict[str, Case], name: str) -> list[Case]:
    """The cases of a test, which a file of this repository may call `test_patched_...`."""
    pattern = re.compile(rf"::test_(patched_)?{name.removeprefix('test_')}(\[|$)")
    return [case for full, case in ran.items() if pattern.search(full)]


def _counted(cases: list[Case]) -> str:
    outcomes = [case.outcome for case in cases]
    return ", ".join(f"{outcomes.count(o)} {o}" for o in sorted(set(outcomes))) or "not run"


def _printed(fork: Fork, tree: Path, request: Request, which: int) -> list[str]:
    """Say how the reproduction differs from the page, on the release (0) or after (1)."""
    found = paste(fork.library, request.code, tree, sanitize=request.sanitizer)
    if found.strip() == request.printed[which].strip():
        return []
    where = ["on the release with what it needs", "after"][which]
    said = request.printed[which].strip()
    return [f"the reproduction prints {found.strip()!r} {where}; the page has {said!r}"]
