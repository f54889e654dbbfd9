"""Hold the requests of a library, and its parked patches, to their rules."""

from __future__ import annotations

import sys
from pathlib import Path

from ci.forks._alone import commits_by_name, stacked
from ci.forks._held import held
from ci.forks._lines import diff_faults, message_faults
from ci.forks._pages import Request, assignment, index, page, pages, parked
from ci.forks._release import Fork, ForkError
from ci.forks._tree import apply, git, listed, misfits


def check_requests(fork: Fork, tree: Path, *, quick: bool = False, only: str = "") -> list[str]:
    """All that is wrong with the requests of a library; nothing where it has no pages yet.

    Args:
        fork: The library.
        tree: Release, overlays and series, in a folder of its own; it is changed.
        quick: Run no test and no reproduction.
        only: The name of the one request to look at.
    """
    try:
        requests, made = pages(fork), commits_by_name(fork, tree)
    except ForkError as error:
        return [str(error)]
    faults = [] if only else _as_a_whole(fork, requests, tree)
    for request in [page(fork, only)] if only else requests:
        print(f"{fork.library}: {request.name}", file=sys.stderr, flush=True)
        found = request.faults()
        if not made.keys() >= set(request.patches):
            found.append("it names patches that are not in the series")
        for name in request.patches if not found else []:
            commit = made[name]
            found += message_faults(git(tree, "log", "-1", "--format=%B", commit))
            found += diff_faults(tree, f"{commit}~", commit)
        if not found:
            try:
                before, after = stacked(tree, made, requests, request, fork.frames)
                if not quick and request.state != "draft":
                    found += held(fork, tree, request, before, after)
            except ForkError as error:
                found.append(str(error).removeprefix(f"{request.path.name}: "))
        faults += [f"{request.path.name}: {fault}" for fault in found]
    return faults


def _as_a_whole(fork: Fork, requests: list[Request], tree: Path) -> list[str]:
    """Each patch is in one request, what is parked fits, and the list is as it is made."""
    faults = assignment(requests, list(listed(fork)))
    try:
        with_parked(fork, tree)
        if index(fork) != (fork.folder / "PULL_REQUEST.md").read_text():
            faults.append("PULL_REQUEST.md is not what `python -m ci.forks pages` writes")
    except ForkError as error:
        faults.append(str(error))
    return faults


def with_parked(fork: Fork, tree: Path) -> None:
    """Put what is parked on top of the series, on no branch; a ForkError says what does not fit."""
    git(tree, "checkout", "-q", "--detach", "main")
    for name in parked(fork):
        patch = (fork.patches / "parked" / name).read_bytes()
        _, failed = misfits(tree, patch)
        if faults := failed or apply(tree, patch):
            raise ForkError(
                "\n".join(f"parked/{name}: {fault}" for fault in faults)
                + "\nNeeded: a patch that fits the series and what is parked before it."
            )
