"""A request by itself: on the release, and on upstream's main in somebody's own clone."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ci.forks._frames import put_tests
from ci.forks._pages import Request, bare, needed, page, pages
from ci.forks._release import ROOT, Fork, ForkError
from ci.forks._tree import commits, git, listed, run_git


def commits_by_name(fork: Fork, tree: Path) -> dict[str, str]:
    """The commit of each patch of the series in a tree, by the patch's name."""
    return dict(zip(map(bare, listed(fork)), commits(tree), strict=True))


def stacked(
    tree: Path,
    made: dict[str, str],
    requests: list[Request],
    request: Request,
    frames: Sequence[str] = (),
) -> tuple[str, str]:
    """Put a request on the release, with what it needs and nothing else.

    Args:
        tree: Where it is done; a commit is checked out there afterwards that is on no branch.
        made: The commit of each patch, of `commits_by_name`.
        requests: All of the library.
        request: One of them.
        frames: Of the fork; where tests of several requests are side by side, they are put in.

    Returns:
        The commits before it, which has what it needs, and after it.

    Raises:
        ForkError: It does not fit there; the hunks are named.
    """
    git(tree, "checkout", "-q", "--detach", "base")
    before = ""
    for one in [*needed(requests, request), request]:
        before = git(tree, "rev-parse", "HEAD").strip()
        if one.overlays:
            git(tree, "checkout", "-q", "overlay", "--", *one.overlays)
            git(tree, "commit", "-q", "-m", f"overlays of {one.name}")
        for name in one.patches:
            picked = run_git(tree, "cherry-pick", "--allow-empty", made[name])
            if picked.returncode and frames:
                put_tests(tree, tree, made[name], frames)
                if not conflicts(tree):
                    picked = run_git(tree, "-c", "core.editor=true", "cherry-pick", "--continue")
            if picked.returncode:
                said = "; ".join(conflicts(tree)) or "git cherry-pick fails"
                run_git(tree, "cherry-pick", "--abort")
                raise ForkError(
                    f"{request.path.name}: {name} does not fit the release with what the request "
                    f"needs: {said}."
                )
    return before, git(tree, "rev-parse", "HEAD").strip()


def conflicts(tree: Path) -> list[str]:
    """Say what git could not merge, by file and hunk."""
    found = []
    for path in git(tree, "diff", "--name-only", "--diff-filter=U").splitlines():
        text = (tree / path).read_text(errors="replace") if (tree / path).is_file() else ""
        starts = [text.count("\n", 0, m.start()) + 1 for m in re.finditer("^<{7} ", text, re.M)]
        ends = [text.count("\n", 0, m.start()) + 1 for m in re.finditer("^>{7} ", text, re.M)]
        found += [
            f"{path}: hunk {n}, lines {a} to {b}"
            for n, (a, b) in enumerate(zip(starts, ends, strict=True), 1)
        ]
        if not starts:
            found.append(f"{path}: changed here, and not there on the other side")
    return found


def request(
    library: str, name: str, checkout: Path, tree: Path, root: Path = ROOT
) -> tuple[bool, list[str]]:
    """Make a branch with one request in a clone of upstream, and say what is to be done there.

    The branch has the request's name, and begins at what is checked out. Its commits have the
    patches' messages, and the author that git is configured for there. Merges are three-way; where
    one conflicts, the files stay as git leaves them, to be mended. Tests of files that the sdist
    leaves out are put into the classes there that they are for.

    Args:
        library: Name of the fork.
        name: Of the request.
        checkout: The clone. What it has checked out has what the request needs.
        tree: The patched sources of the library.
        root: The repository.

    Returns:
        Whether all merged, and lines to show: what conflicted, or the body and the commands to run.

    Raises:
        ForkError: The clone has changes, or a branch of that name; nothing was done.
    """
    fork = Fork.read(library, root)
    one, made = page(fork, name), commits_by_name(fork, tree)
    if not (checkout / ".git").exists():
        raise ForkError(f"{checkout} is not a clone of {library}: it has no .git.")
    if changes := git(checkout, "status", "--porcelain", "--untracked-files=no").splitlines():
        raise ForkError(f"{checkout} has changes ({changes[0][3:]}); commit or stash them first.")
    if git(checkout, "branch", "--list", one.name).strip():
        raise ForkError(f"{checkout} has a branch {one.name} already; delete or rename it.")
    lines = [f"{one.title}", ""]
    git(checkout, "checkout", "-q", "-b", one.name)
    # Its objects alone: the blobs from which git merges three ways.
    git(checkout, "fetch", "-q", "--no-tags", str(tree.resolve()), "main")
    for path in one.overlays:
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        (checkout / path).write_bytes((tree / path).read_bytes())
        git(checkout, "add", "--", path)
    for patch in one.patches:
        merged = _merge(checkout, made[patch])
        message = git(tree, "log", "-1", "--format=%B", made[patch])
        lines += put_tests(checkout, tree, made[patch], fork.frames)
        if merged.returncode and (found := _unmerged(checkout, merged.stderr, fork)):
            rest = one.patches[one.patches.index(patch) + 1 :]
            return False, [
                f"{patch} conflicts on branch {one.name}:",
                *(f"    {line}" for line in found),
                "Mend them, `git add` the files, and commit with the message:",
                "",
                message,
                *(f"Then cherry-pick {made[name]} ({name})." for name in rest),
            ]
        _commit(checkout, message)
    needs = [other.title for other in needed(pages(fork), one)]
    if needs:
        lines.append(f"Needs what is checked out to have: {'; '.join(needs)}.\n")
    return True, [*lines, one.sections["Body"], "", one.sections["Before it is sent"]]


def _merge(checkout: Path, commit: str) -> subprocess.CompletedProcess[bytes]:
    """Merge a commit three ways, without committing it; a release may have other line ends."""
    with tempfile.NamedTemporaryFile("w", suffix=".gitattributes") as attributes:
        attributes.write("* text=auto\n")
        attributes.flush()
        own = ["-c", f"core.attributesFile={attributes.name}", "-c", "core.safecrlf=false"]
        pick = ["cherry-pick", "--no-commit", "-X", "renormalize", commit]
        return run_git(checkout, *own, *pick)


def _unmerged(checkout: Path, said: bytes, fork: Fork) -> list[str]:
    """Say what conflicts, or what git says; nothing if it was only tests, which are put in now."""
    only_tests = fork.frames and not git(checkout, "diff", "--name-only", "--diff-filter=U")
    return conflicts(checkout) or ([] if only_tests else [said.decode().strip()])


def _commit(checkout: Path, message: str) -> None:
    """Commit what is staged, as whoever owns the clone."""
    command = ["git", "commit", "-q", "--cleanup=verbatim", "-m", message.rstrip() + "\n"]
    run = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    if run.returncode:
        raise ForkError(f"{checkout}: git commit: {run.stderr.strip()}")
