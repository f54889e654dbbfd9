"""The patched sources of a fork as a git repository, and the patches as its commits."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path, PurePosixPath

from ci.forks._release import Fork, ForkError, fetched, unpack
from ci.forks.relative_imports import Package, RewriteError

# What a tree's own repository does not track: traces of running it.
EXCLUDE = "__pycache__/\n.pytest_cache/\n/build/\n*.so\n"
# Where main was when it last equalled patches/.
SYNCED = "refs/forks/synced"

# Nobody's own settings change a commit or a patch, and no other git command is disturbed.
ENVIRONMENT = {
    "GIT_AUTHOR_NAME": "Vertical Chunking",
    "GIT_AUTHOR_EMAIL": "maintainers@vertical-chunking.invalid",
    "GIT_AUTHOR_DATE": "2000-01-01T00:00:00Z",
    "GIT_COMMITTER_NAME": "Vertical Chunking",
    "GIT_COMMITTER_EMAIL": "maintainers@vertical-chunking.invalid",
    "GIT_COMMITTER_DATE": "2000-01-01T00:00:00Z",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_OPTIONAL_LOCKS": "0",
    "LC_ALL": "C",
}
AM = ["--keep", "--keep-cr", "--no-3way", "--no-scissors", "--whitespace=nowarn"]
FORMAT = ["--keep-subject", "--zero-commit", "--full-index", "--no-signature", "--no-numbered"]
FORMAT += ["-U1", "--no-encode-email-headers", "--diff-algorithm=myers"]


def build(fork: Fork, patches: dict[str, bytes], tree: Path) -> None:
    """Make the git repository: release, overlays, one commit for each patch."""
    begin(fork, fetched(fork), tree)
    for source, target in fork.overlays.items():
        if fault := overlay(fork, source, target, tree):
            raise ForkError(f"{fork.library}: {fault}")
    close_overlays(fork, tree)
    for name, patch in patches.items():
        moved, failed = misfits(tree, patch)
        if faults := moved + failed or apply(tree, patch):
            raise ForkError(
                "\n".join(f"{fork.library}: {name}: {fault}" for fault in faults)
                + f"\nNeeded: a patch that fits {fork.name} {fork.version} and the patches before "
                "it line by line. `python -m ci.forks --help` says how to mend it."
            )
    git(tree, "update-ref", SYNCED, "main")


def begin(fork: Fork, sdist: Path, tree: Path) -> None:
    """Make the git repository, with the files of the release, and the frames, as tag `base`."""
    unpack(sdist, tree)
    for path in fork.frames:
        if not (tree / path).exists():  # Else upstream has begun to release its own.
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_bytes((fork.folder / "frames" / path).read_bytes())
    git(tree, "init", "-q", "-b", "main", "--template=")
    # Patches that are written as commits there have one author, whoever's machine it is.
    git(tree, "config", "user.name", ENVIRONMENT["GIT_AUTHOR_NAME"])
    git(tree, "config", "user.email", ENVIRONMENT["GIT_AUTHOR_EMAIL"])
    (tree / ".git" / "info").mkdir()
    (tree / ".git" / "info" / "exclude").write_text(EXCLUDE)
    git(tree, "add", "--all", "--force")
    git(tree, "commit", "-q", "-m", f"{fork.name} {fork.version}")
    git(tree, "tag", "base")


def overlay(fork: Fork, source: str, target: str, tree: Path) -> str:
    """Copy a file of this repository into the tree, or say why not.

    What it imports of this repository, it imports there of the files that are made of it.
    """
    if (tree / target).exists():
        return f"overlay {target} is a file of the release."
    if not (fork.root / source).is_file():
        return f"no {fork.root / source}, of which fork.toml makes an overlay."
    (tree / target).parent.mkdir(parents=True, exist_ok=True)
    text = (fork.root / source).read_text()
    if source.endswith(".py"):
        places = (fork.overlays | fork.stand_ins).items()
        package = Package({_module(path): PurePosixPath(there) for path, there in places}, {})
        try:
            text = package.rewrite(text, _module(source), PurePosixPath(target))
        except RewriteError as error:
            return f"overlay {source}, as {error}."
    (tree / target).write_text(text)
    return ""


def _module(path: str) -> str:
    """The name of the module that a file of this repository is."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def close_overlays(fork: Fork, tree: Path) -> None:
    """Make the overlays, if there are any, the commit on which the patches stand."""
    if fork.overlays:
        git(tree, "add", "--all", "--force")
        git(tree, "commit", "-q", "--allow-empty", "-m", "overlay")
        git(tree, "tag", "overlay")


def misfits(tree: Path, patch: bytes) -> tuple[list[str], list[str]]:
    """The hunks that fit at other lines than they name, and what does not fit at all."""
    dry = run_git(tree, "apply", "--check", "--verbose", "--whitespace=nowarn", stdin=patch)
    return _faults(patch.decode(errors="replace"), dry.stderr.decode(errors="replace"))


def apply(tree: Path, patch: bytes) -> list[str]:
    """Make a patch a commit; what git says if it cannot."""
    run = run_git(tree, "am", "-q", *AM, stdin=patch)
    return [run.stderr.decode(errors="replace").strip()] if run.returncode else []


def already(tree: Path, patch: bytes) -> bool:
    """Return whether the tree has what a patch brings, so that it can be taken back."""
    return not run_git(tree, "apply", "--check", "--reverse", stdin=patch).returncode


def contained(tree: Path, patches: dict[str, bytes]) -> bool:
    """Return whether the tree has all that a series brings, so that it can be taken back."""
    try:
        return all(
            not run_git(tree, "apply", "--index", "--reverse", stdin=patch).returncode
            for patch in reversed(patches.values())
        )
    finally:
        git(tree, "reset", "-q", "--hard")


def listed(fork: Fork) -> dict[str, bytes]:
    """The patches by name, in the order of `series`, which lists each of them once."""
    file = fork.patches / "series"
    names = Counter(file.read_text().splitlines() if file.exists() else [])
    present = {path.name for path in fork.patches.glob("*.patch")}
    faults = [f"{name} is listed {count} times" for name, count in names.items() if count > 1]
    faults += [f"{name} is listed, and no such file" for name in names if name not in present]
    faults += [f"{name} is not listed" for name in sorted(present - names.keys())]
    if faults:
        raise ForkError("\n".join(f"{fork.library}: {file}: {fault}." for fault in faults))
    return {name: (fork.patches / name).read_bytes() for name in names}


def committed(fork: Fork) -> dict[str, bytes]:
    """The files of patches/LIBRARY, whether listed or not."""
    paths = [*fork.patches.glob("*.patch"), *fork.patches.glob("series")]
    return {path.name: path.read_bytes() for path in paths}


def exported(tree: Path) -> dict[str, bytes]:
    """Return the files that export writes: the patches, and `series`; none where no patch is."""
    with tempfile.TemporaryDirectory() as scratch:
        git(tree, "format-patch", *FORMAT, "-o", scratch, f"{start(tree)}..main")
        patches = {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}
    if not patches:
        return {}
    return patches | {"series": "".join(f"{name}\n" for name in patches).encode()}


def start(tree: Path) -> str:
    """The commit on which the first patch stands."""
    return git(tree, "tag", "--list", "overlay").strip() or "base"


def commits(tree: Path) -> list[str]:
    """The commits of the patches, in order."""
    return git(tree, "rev-list", "--reverse", f"{start(tree)}..main").split()


def contents(tree: Path) -> tuple[str, dict[str, bytes]]:
    """Say what makes a tree what it is: the files on which the patches stand, and the patches."""
    return git(tree, "rev-parse", f"{start(tree)}^{{tree}}"), exported(tree)


def files_below(tree: Path) -> set[str]:
    """The files on which the patches stand, as lines of mode, hash and path."""
    return set(git(tree, "ls-tree", "-r", start(tree)).splitlines())


def uncommitted(fork: Fork) -> str:
    """Say what of the tree is in no commit, in words; empty if nothing."""
    metadata = fork.tree / ".git"
    if not metadata.is_dir() or not git(fork.tree, "tag", "--list", "base"):
        raise ForkError(f"{fork.tree} is not what sync makes: no tag `base`. Move it away.")
    unfinished = ["rebase-apply", "rebase-merge", "MERGE_HEAD", "CHERRY_PICK_HEAD"]
    if found := [name for name in unfinished if (metadata / name).exists()]:
        return f"an unfinished git operation ({found[0]})"
    if changes := git(fork.tree, "status", "--porcelain").splitlines():
        return f"changes that are in no commit ({', '.join(line[3:] for line in changes)})"
    return ""


def unexported(fork: Fork) -> str:
    """Say what of the tree would be lost if it were built anew, in words; empty if nothing."""
    if not fork.tree.exists():
        return ""
    if work := uncommitted(fork):
        return work
    made = git(fork.tree, "for-each-ref", "--format=%(objectname)", SYNCED) or git(
        fork.tree, "rev-parse", "base"
    )
    if git(fork.tree, "rev-parse", "main") != made and exported(fork.tree) != committed(fork):
        return "commits on main that are not exported"
    hidden = ["--exclude=refs/tags/*", f"--exclude={SYNCED}"]
    if git(fork.tree, "rev-list", *hidden, "--all", "HEAD", "--not", "main"):
        return "commits that are not on main (on another branch, or stashed)"
    return ""


def git(tree: Path, *arguments: str) -> str:
    """Say what a git command prints; a ForkError if it fails."""
    run = run_git(tree, *arguments)
    if run.returncode:
        raise ForkError(f"{tree}: git {' '.join(arguments)}: {run.stderr.decode().strip()}")
    return run.stdout.decode()


def run_git(tree: Path, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run git there, with nobody's settings, whether it succeeds or not."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(
        ["git", "-c", "gc.auto=0", "-c", "commit.gpgSign=false", *arguments],
        cwd=tree,
        env=outer | ENVIRONMENT,
        input=stdin,
        capture_output=True,
    )


def _faults(patch: str, verbose: str) -> tuple[list[str], list[str]]:
    """Return what fits elsewhere and what not at all, as `git apply --check --verbose` says."""
    hunks: list[tuple[str, str]] = []
    file = ""
    for line in patch.splitlines():
        if match := re.match(r"diff --git a/(.*) b/", line):
            file = match[1]
        elif file and (match := re.match(r"@@ .* @@", line)):
            hunks.append((file, match[0]))

    moved, failed = [], []
    for line in verbose.splitlines():
        if match := re.match(r"Checking patch (.*?)( => .*)?\.\.\.", line):
            file = match[1]
        elif match := re.match(r"Hunk #(\d+) succeeded at \d+ (\(.*\))", line):
            hunk = [hunk for path, hunk in hunks if path == file][int(match[1]) - 1]
            moved.append(f"{file}: hunk {match[1]}, {hunk}, fits elsewhere {match[2]}")
        elif match := re.match(r"error: patch failed: (.*):(\d+)$", line):
            own = enumerate((hunk for path, hunk in hunks if path == match[1]), 1)
            named = [f"hunk {n}, {h}," for n, h in own if re.match(rf"@@ -{match[2]}\b", h)]
            failed.append(f"{match[1]}: {' or '.join(named)} does not apply")
        elif line.startswith("error: ") and not line.endswith(("searching for:", "does not apply")):
            failed.append(line.removeprefix("error: "))
    return moved, failed
