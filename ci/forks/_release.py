"""The pin of a fork, and the release that it names."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from packaging.utils import parse_sdist_filename

ROOT = Path(__file__).parents[2]
# At the root of a folder that `ci.gpu pack` made. Its sources are there as they are, stock and
# patched; neither git nor the release's sdist is.
PACKED = "packed.json"
# For a version: the newest release that is not a pre-release.
NEWEST = "newest"


class ForkError(Exception):
    """A fork that cannot be fetched, built or exported; says what was found, and the remedy."""


@dataclass(frozen=True)
class Fork:
    """The pin of a library, as its fork.toml has it.

    Attributes:
        library: Name of the folders in forks/ and patches/.
        root: The repository.
        name: On PyPI.
        version: Of the release.
        sha256: Of the release's sdist, in hex.
        license: SPDX expression.
        environment: Variables that the sdist's metadata step needs.
        overlays: New files: path in the tree of each path in this repository.
        stand_ins: Files of the tree that stand for further files of this repository, where an
            overlay imports them: path in the tree of each path in this repository.
        upstream_tests: Upstream's own files of tests, for `ci.forks.upstream_tests`.
        run_by: The file of this repository that runs, on a CPU, a file of tests of the patches
            that needs a GPU: path here of each path in the tree.
    """

    library: str
    root: Path
    name: str
    version: str
    sha256: str
    license: str
    environment: dict[str, str] = field(default_factory=dict)
    overlays: dict[str, str] = field(default_factory=dict)
    stand_ins: dict[str, str] = field(default_factory=dict)
    upstream_tests: list[str] = field(default_factory=list)
    run_by: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, library: str, root: Path = ROOT) -> Fork:
        """Read forks/LIBRARY/fork.toml; a ForkError names what is wrong in it."""
        path = root / "forks" / library / "fork.toml"
        if not path.is_file():
            raise ForkError(f"{library}: no such fork; there are {', '.join(libraries(root))}.")
        try:
            fork = cls(library, root, **tomllib.loads(path.read_text()))
        except (TypeError, tomllib.TOMLDecodeError) as error:
            raise ForkError(f"{path}: {error}") from error
        if not re.fullmatch("[0-9a-f]{64}", fork.sha256):
            raise ForkError(f"{path}: sha256 is {fork.sha256!r}; 64 hex digits are needed.")
        if not isinstance(fork.overlays, dict):
            raise ForkError(
                f'{path}: overlays are {fork.overlays}; a table of "from" = "to" is needed.'
            )
        return fork

    @property
    def folder(self) -> Path:
        """Return where the fork is defined and built."""
        return self.root / "forks" / self.library

    @property
    def tree(self) -> Path:
        """The patched sources, a git repository."""
        return self.folder / "tree"

    @property
    def packed(self) -> bool:
        """Return whether the sources are there as they are, and nothing is fetched or built."""
        return (self.root / PACKED).is_file()

    @property
    def patches(self) -> Path:
        """The committed form of the patches."""
        return self.root / "patches" / self.library

    @property
    def requests(self) -> Path:
        """The pages of the pull requests that could be sent."""
        return self.folder / "pull_requests"

    @property
    def frames(self) -> list[str]:
        """Files of tests that upstream has and the sdist leaves out, each a frame for new tests."""
        folder = self.folder / "frames"
        files = (path for path in folder.rglob("*.py") if path.is_file())
        return sorted(path.relative_to(folder).as_posix() for path in files)

    @property
    def sdist(self) -> Path:
        """The release."""
        return self.folder / f"{self.name.replace('-', '_')}-{self.version}.tar.gz"


def libraries(root: Path = ROOT) -> list[str]:
    """All libraries that have a fork."""
    return sorted(path.parent.name for path in root.glob("forks/*/fork.toml"))


class Place(Protocol):
    """A thing that has a folder in which it is defined and built."""

    @property
    def folder(self) -> Path:
        """The folder."""


@contextmanager
def locked(place: Place) -> Iterator[None]:
    """Let no other process, nor thread, build or export there meanwhile."""
    folder = os.open(place.folder, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def scratch(place: Place) -> tempfile.TemporaryDirectory[str]:
    """A folder for what is not finished, from which it can be renamed into its place."""
    return tempfile.TemporaryDirectory(dir=place.folder, prefix=".new-")


def replace(folder: Path, new: Path) -> None:
    """Put `new`, which lies in a scratch folder, in the place of `folder`."""
    if folder.exists():
        folder.rename(new.with_name("old"))
    new.rename(folder)


def stock(library: str, root: Path = ROOT) -> Path:
    """The release's sources, unpatched; made anew where they are missing or were changed."""
    fork = Fork.read(library, root)
    if fork.packed:
        return fork.folder / "stock"
    with locked(fork):
        return unpacked(fork)


def unpacked(fork: Fork) -> Path:
    """Say what `stock` returns, for a caller who has locked the fork."""
    folder = fork.folder / "stock"
    with tarfile.open(fetched(fork)) as release:
        for member in release:
            path = folder / member.name.partition("/")[2]
            file = release.extractfile(member)
            if file and not (path.is_file() and path.read_bytes() == file.read()):
                break
        else:
            return folder
    with scratch(fork) as new:
        unpack(fork.sdist, Path(new, "stock"))
        replace(folder, Path(new, "stock"))
    return folder


def fetched(fork: Fork) -> Path:
    """The release's sdist, whose hash is right; pip checks it before it runs anything of it."""
    if not fork.sdist.exists():
        with scratch(fork) as new:
            download(fork, Path(new), f"--hash=sha256:{fork.sha256}").rename(fork.sdist)
    found_hash = hashlib.sha256(fork.sdist.read_bytes()).hexdigest()
    if found_hash != fork.sha256:
        raise ForkError(
            f"{fork.library}: {fork.sdist} has sha256 {found_hash}, and fork.toml pins "
            f"{fork.sha256}. Delete the file, so that it is fetched again, or correct the pin."
        )
    return fork.sdist


def download(fork: Fork, folder: Path, pinned: str = "") -> Path:
    """Fetch the release's sdist into `folder`, by pip, which knows what the newest one is."""
    line = fork.name if fork.version == NEWEST else f"{fork.name}=={fork.version}"
    line = f"{line} {pinned}".strip()
    (folder / "requirements.txt").write_text(line)
    command = "-m pip download --no-deps --no-binary :all: --no-build-isolation -q"
    command += " --disable-pip-version-check -r requirements.txt -d ."
    run = subprocess.run(
        [sys.executable, *command.split()],
        cwd=folder,
        env=os.environ | fork.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    found = list(folder.glob(fork.sdist.name.replace(NEWEST, "*")))
    if run.returncode or len(found) != 1:
        raise ForkError(f"{fork.library}: pip could not fetch {line}\n{run.stdout}")
    return found[0]


def version_of(fork: Fork, sdist: Path) -> str:
    """The version that was asked for; if that is the newest, the one in the sdist's name."""
    if fork.version != NEWEST:
        return fork.version
    _, version = parse_sdist_filename(sdist.name)
    if version.is_prerelease:
        raise ForkError(
            f"{fork.library}: the newest release that pip finds of {fork.name} is {version}, a "
            "pre-release. Needed: a release, or that version by name; is PIP_PRE set?"
        )
    return str(version)


def unpack(sdist: Path, folder: Path) -> None:
    """Make `folder` with the files of an sdist."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as new:
        with tarfile.open(sdist) as release:
            release.extractall(new, filter="data")
        (top,) = Path(new).iterdir()
        top.rename(folder)
