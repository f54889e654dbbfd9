"""Build, export and check forks, and tell where the roadmap stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from ci.forks import roadmap
from ci.forks._alone import commits_by_name, stacked
from ci.forks._held import RequestTests, new_tests
from ci.forks._pages import index, pages, parked
from ci.forks._release import (
    ROOT,
    Fork,
    ForkError,
    locked,
    replace,
    scratch,
    stock,
    unpacked,
)
from ci.forks._requests import check_requests, with_parked
from ci.forks._tree import (
    SYNCED,
    build,
    commits,
    committed,
    contents,
    exported,
    files_below,
    git,
    listed,
    start,
    uncommitted,
    unexported,
)

PARTS = ["Why", "API", "Verified", "Not verified", "Upstream", "Unneeded when"]


def patched(library: str, root: Path = ROOT) -> Path:
    """The patched sources; made anew where they are not what patches/ says.

    A tree with work that is not exported is returned as it is.
    """
    fork = Fork.read(library, root)
    if fork.packed:
        return fork.tree
    with locked(fork):
        if not unexported(fork):
            _sync(fork)
    return fork.tree


def sources(library: str, which: Literal["stock", "patched"], root: Path = ROOT) -> Path:
    """The sources as they are released, or as they are patched."""
    return stock(library, root) if which == "stock" else patched(library, root)


def sync(library: str, root: Path = ROOT, *, force: bool = False) -> bool:
    """Build forks/LIBRARY/tree from the release, the overlays and patches/LIBRARY.

    Args:
        library: Name of the fork.
        root: The repository.
        force: Throw away what the tree has beyond patches/.

    Returns:
        Whether there was anything to do.

    Raises:
        ForkError: A wrong hash, a patch that does not apply exactly, a series that does not fit
            its folder, or a tree with work that is not exported. The tree is left as it was.
    """
    fork = Fork.read(library, root)
    with locked(fork):
        return _sync(fork, force=force)


def _sync(fork: Fork, *, force: bool = False) -> bool:
    """Say what `sync` does, for a caller who has locked the fork."""
    _keep(fork, force)
    unpacked(fork)
    with scratch(fork) as folder:
        new = Path(folder, "tree")
        build(fork, listed(fork), new)
        if not force and fork.tree.exists() and contents(new) == contents(fork.tree):
            return False
        _keep(fork, force)  # That took seconds, in which somebody may have begun to work there.
        replace(fork.tree, new)
    return True


def _keep(fork: Fork, force: bool) -> None:
    """Raise if the tree has work that is not exported, unless that is to be lost."""
    if not force and (work := unexported(fork)):
        raise ForkError(
            f"{fork.library}: {fork.tree} has {work}. Needed: all of it in {fork.patches}. Commit "
            f"it on main and run `python -m ci.forks export {fork.library}`, or lose it with "
            "sync --force."
        )


def export(library: str, root: Path = ROOT) -> bool:
    """Write the commits of forks/LIBRARY/tree to patches/LIBRARY, and return whether they changed.

    Raises:
        ForkError: The tree is missing, has changes that are not committed, or commits from which
            `git am` would not make the same ones again; patches/ is left as it was.
    """
    fork = Fork.read(library, root)
    with locked(fork):
        return _export(fork)


def _export(fork: Fork) -> bool:
    library = fork.library
    if not fork.tree.exists():
        raise ForkError(f"{library}: no {fork.tree}; `python -m ci.forks sync {library}` makes it.")
    if work := uncommitted(fork):
        raise ForkError(f"{library}: {fork.tree} has {work}; commit or finish that first.")
    patches = exported(fork.tree)
    if git(fork.tree, "rev-list", "--merges", f"{start(fork.tree)}..main"):
        raise ForkError(f"{library}: main of {fork.tree} has a merge; make it linear: git rebase.")
    with scratch(fork) as folder:
        again = Path(folder, "tree")
        build(fork, {name: patches[name] for name in patches if name != "series"}, again)
        found = exported(again)
    for name, patch in patches.items():
        if found.get(name) != patch:
            raise ForkError(
                f"{library}: {name} would not come back from `git am` as it is. Needed: a message "
                "whose first line stands alone, with no line that git takes for the start of a "
                f"patch, and {fork.tree} on the release that is pinned."
            )
    changed = patches != committed(fork)
    for name in committed(fork).keys() - patches.keys():
        (fork.patches / name).unlink()
    for name, patch in patches.items():
        fork.patches.mkdir(parents=True, exist_ok=True)
        (fork.patches / name).write_bytes(patch)
    git(fork.tree, "update-ref", SYNCED, "main")
    return changed


def check(library: str, root: Path = ROOT, *, quick: bool = False, only: str = "") -> list[str]:
    """All that is wrong with a fork as it is committed; empty if it is right.

    Args:
        library: Name of the fork.
        root: The repository.
        quick: Run no tests and no reproductions.
        only: The one request to look at, by name.
    """
    fork = Fork.read(library, root)
    with locked(fork):
        problems = _check(fork)
    if problems or not fork.requests.is_dir():
        return problems
    # Without the lock: tests take minutes, and ask for the fork themselves.
    with scratch(fork) as folder:
        tree = Path(folder, "tree")
        build(fork, listed(fork), tree)
        found = check_requests(fork, tree, quick=quick, only=only)
    return [f"{library}: {fault.removesuffix('.')}." for fault in found]


def _check(fork: Fork) -> list[str]:
    library, problems = fork.library, []
    if not (fork.folder / "PULL_REQUEST.md").is_file():
        problems.append(f"{library}: no {fork.folder / 'PULL_REQUEST.md'}.")
    with scratch(fork) as folder:
        tree = Path(folder, "tree")
        try:
            patches = listed(fork)
            build(fork, patches, tree)
        except ForkError as error:
            return [*problems, str(error)]
        overlays = set(fork.overlays.values())
        for name, commit in zip(patches, commits(tree), strict=False):
            message = git(tree, "log", "-1", "--format=%B", commit)
            faults = [] if fork.requests.is_dir() else _message_faults(message)
            files = git(tree, "diff", "--name-only", f"{commit}~", commit).splitlines()
            faults += [
                f"{path} is an overlay; change the file that it is made from"
                for path in sorted(overlays.intersection(files))
            ]
            problems += [f"{library}: {name}: {fault}." for fault in faults]
        wanted, found = exported(tree), committed(fork)
        if fork.tree.exists() and (stale := files_below(tree) ^ files_below(fork.tree)):
            paths = sorted({line.partition("\t")[2] for line in stale})
            problems.append(
                f"{library}: {fork.tree} stands on other files than fork.toml says now "
                f"({', '.join(paths[:5])}); run sync."
            )
    problems += [
        f"{library}: {name} is not what export writes; run sync, then export."
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if work := unexported(fork):
        problems.append(f"{library}: {fork.tree} has {work}; commit it and run export.")
    return problems


def _message_faults(message: str) -> list[str]:
    """Return which parts of a commit message are missing or empty."""
    parts = re.split(rf"^({'|'.join(PARTS)}):", message, flags=re.MULTILINE)
    said = dict(zip(parts[1::2], parts[2::2], strict=True))
    faults = [f"the message has no `{part}:`" for part in PARTS if part not in said]
    return faults + [
        f"`{part}:` is empty in the message" for part in said if not said[part].strip()
    ]


def write_index(library: str, root: Path = ROOT) -> bool:
    """Write the list of requests into PULL_REQUEST.md, and return whether it changed."""
    fork = Fork.read(library, root)
    if not fork.requests.is_dir():
        return False
    path, text = fork.folder / "PULL_REQUEST.md", index(fork)
    changed = path.read_text() != text
    path.write_text(text)
    return changed


def request_tests(library: str, root: Path = ROOT) -> list[RequestTests]:
    """The tests that each request of a library brings, in the order of the pages.

    Raises:
        ForkError: A request does not fit the release with what it needs.
    """
    fork = Fork.read(library, root)
    found = []
    with locked(fork), scratch(fork) as folder:
        tree = Path(folder, "tree")
        build(fork, listed(fork), tree)
        requests, made = pages(fork), commits_by_name(fork, tree)
        for one in requests:
            before, after = stacked(tree, made, requests, one)
            brought = new_tests(tree, before, after)
            found.append(RequestTests(library, one.name, one.state, one.controls, brought))
    return found


def status(names: list[str], root: Path = ROOT) -> str:
    """A table: each item of the roadmap, and where the upstream library stands.

    It is native, patched by the series, parked beside it, or missing.
    """
    rows = [("roadmap item", "upstream", "state")]
    for library in names:
        upstream = f"{library} {Fork.read(library, root).version}"
        native, mended = stock(library, root), patched(library, root)
        with _parked(library, mended, root) as beside:
            trees = {"native": native, "patched": mended} | beside
            for item in roadmap.ITEMS:
                if item.library == library:
                    states = (state for state, tree in trees.items() if item.probe(tree))
                    rows.append((item.title, upstream, next(states, "missing")))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


@contextmanager
def _parked(library: str, mended: Path, root: Path) -> Iterator[dict[str, Path]]:
    """The patched sources with what is parked on top, if anything is."""
    fork = Fork.read(library, root)
    if not parked(fork):
        yield {}
        return
    with scratch(fork) as folder:
        tree = Path(folder, "tree")
        git(mended, "clone", "-q", "--shared", ".", str(tree))
        with_parked(fork, tree)
        yield {"parked": tree}
