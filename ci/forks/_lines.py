"""Find what a reviewer would strike from a commit: stray lines, files touched without need."""

from __future__ import annotations

import re
from pathlib import Path

from ci.forks._tree import git, run_git

SUBJECT_LENGTH, MESSAGE_LINES = 72, 12
# What belongs to the page of a request.
_EVIDENCE = re.compile(r"^(Why|API|Verified|Not verified|Unneeded when):", re.MULTILINE)


def message_faults(message: str) -> list[str]:
    """Say what is wrong with a commit message: one line, and a few sentences of why."""
    subject, _, body = message.strip().partition("\n")
    faults = []
    if len(subject) > SUBJECT_LENGTH:
        faults.append(f"the first line has {len(subject)} columns, more than {SUBJECT_LENGTH}")
    lines = len(body.strip().splitlines())
    if not lines:
        faults.append("the message does not say why")
    if lines > MESSAGE_LINES:
        faults.append(f"the message has {lines} lines below the first, more than {MESSAGE_LINES}")
    if match := _EVIDENCE.search(message):
        faults.append(f"the message has `{match[0]}`, which belongs to the page of the request")
    return faults


def diff_faults(tree: Path, before: str, after: str) -> list[str]:
    """Trailing space, stray blank lines, and files in which nothing but space changes."""
    # Some releases have CRLF line ends.
    check = ["-c", "core.whitespace=cr-at-eol", "diff", "--check", before, after]
    checked = run_git(tree, *check).stdout.decode().splitlines()
    faults = [line for line in checked if not line.startswith("+")]  # That is the line itself.
    for path in git(tree, "diff", "--name-only", before, after).splitlines():
        spaceless = ["diff", "-w", "--ignore-blank-lines", before, after, "--", path]
        if not git(tree, *spaceless):
            faults.append(f"{path}: nothing but space changes")
        most = 2 if path.endswith(".py") else 1
        diff = git(tree, "diff", f"-U{most}", "--no-color", before, after, "--", path)
        faults += [f"{path}:{n}: more than {most} blank lines" for n in _stray(diff, most)]
    return faults


def _stray(diff: str, most: int) -> list[int]:
    """The numbers of the lines, after, at which a run of blank lines with a new one is too long."""
    found, number, run, has_new = [], 0, 0, False
    for line in diff.splitlines():
        if match := re.match(r"@@ -\S+ \+(\d+)", line):
            number, run, has_new = int(match[1]), 0, False
            continue
        if not number or line.startswith(("-", "\\")):
            continue
        if line[1:].strip():
            run, has_new = 0, False
        else:
            run, has_new = run + 1, has_new or line.startswith("+")
            if run > most and has_new:
                found.append(number)
                run, has_new = 0, False
        number += 1
    return found
