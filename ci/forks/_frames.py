"""Tests of a request in upstream's own files, where the release has only frames for them."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

from ci.forks._tree import git, run_git

# The text of each test, by its class and its name.
Tests = dict[tuple[str, str], str]


def put_tests(checkout: Path, tree: Path, commit: str, frames: Sequence[str]) -> list[str]:
    """Put the tests that a commit adds to frames into the files that they stand for.

    A test that is there already is replaced; a new one becomes the last of its class.

    Args:
        checkout: A clone of upstream, or the tree itself, in which the commit was just merged.
        tree: The patched sources, of which the commit is one.
        commit: The patch.
        frames: Paths of all frames.

    Returns:
        What is left to be done by hand, a line each.
    """
    left = []
    for path in git(tree, "diff", "--name-only", f"{commit}~", commit).splitlines():
        if path not in frames:
            continue
        if run_git(checkout, "checkout", "HEAD", "--", path).returncode:
            run_git(checkout, "rm", "-q", "--force", "--ignore-unmatch", "--", path)
            left.append(f"{path}: no such file here; its tests are in {tree / path}")
            continue
        text = (checkout / path).read_text()
        frame = git(tree, "show", f"{commit}:{path}")
        old, new = tests_of(git(tree, "show", f"{commit}~:{path}")), tests_of(frame)
        for (owner, name), test in new.items():
            if old.get((owner, name)) == test:
                continue
            if owner not in _classes(text):
                left.append(f"{path}: no class {owner} for {name}")
                continue
            text = _with(text, owner, name, test)
            missing = (_imported(frame) & _names(test)) - _imported(text)
            left += [f"{path}: {name} wants an import of {one}" for one in sorted(missing)]
        (checkout / path).write_text(text)
        git(checkout, "add", "--", path)
    return left


def tests_of(text: str) -> Tests:
    """Return the methods of the classes of a file, with their decorators."""
    lines = text.splitlines(keepends=True)
    return {
        (owner, node.name): "".join(lines[_start(node) : node.end_lineno])
        for owner, body in _classes(text).items()
        for node in body.body
        if isinstance(node, ast.FunctionDef)
    }


def _with(text: str, owner: str, name: str, test: str) -> str:
    lines, body = text.splitlines(keepends=True), _classes(text)[owner]
    start = end = body.end_lineno or len(lines)
    for node in body.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            start, end = _start(node), node.end_lineno or end
    before = "" if start < end else "\n"
    return "".join(lines[:start]) + before + test + "".join(lines[end:])


def _start(node: ast.FunctionDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1


def _classes(text: str) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}


def _imported(text: str) -> set[str]:
    imports = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import | ast.ImportFrom))
    return {alias.asname or alias.name.partition(".")[0] for n in imports for alias in n.names}


def _names(test: str) -> set[str]:
    nodes = ast.walk(ast.parse(f"class _:\n{test}"))
    return {node.id for node in nodes if isinstance(node, ast.Name)}
