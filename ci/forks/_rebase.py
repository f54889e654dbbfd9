"""A series on another release: what fits, and whether its own tests pass there."""

from __future__ import annotations

import dataclasses
import platform
import re
import tempfile
from email.parser import BytesHeaderParser
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from ci.forks._release import NEWEST, ROOT, Fork, download, version_of
from ci.forks._tests import Ran, run_own
from ci.forks._tree import (
    already,
    apply,
    begin,
    close_overlays,
    commits,
    contained,
    git,
    listed,
    misfits,
    overlay,
)

Verdict = Literal["right", "broken", "does not fit", "not run"]


@dataclasses.dataclass(frozen=True)
class Rebased:
    """A series on another release.

    Attributes:
        version: Of the release.
        verdict: "right": all applies, with or without an offset, and the series' own tests pass.
            "does not fit": something does not apply, whatever the tests of the rest say. "broken":
            all applies, and a test fails. "not run": all applies, and nobody knows more.
        text: What fits, fits elsewhere, or fails and where; and of each file of tests the same.
    """

    version: str
    verdict: Verdict
    text: str


def rebase(library: str, version: str, root: Path = ROOT) -> Rebased:
    """Try overlays and patches on another release, in a temporary folder, and run their tests.

    Args:
        library: Name of the fork.
        version: Of the other release, which pip fetches without a hash to hold it to; "newest" for
            the newest that pip finds for this Python, pre-releases left out.
        root: The repository, in which nothing that git tracks is changed.
    """
    fork = dataclasses.replace(Fork.read(library, root), version=version)
    with tempfile.TemporaryDirectory() as folder:
        sdist, tree = download(fork, Path(folder)), Path(folder, "tree")
        fork = dataclasses.replace(fork, version=version_of(fork, sdist))
        which = f"{fork.name} {fork.version}"
        newest = ", the newest release," if version == NEWEST else ","
        lines = [f"{which}{newest} fetched without a hash:"]
        begin(fork, sdist, tree)
        said, applied, fits = _applied(fork, tree)
        ran = run_own(fork, tree)
        lines += [*said, *_told(ran, tree, applied)]
    verdict: Verdict = "right"
    if not fits:
        verdict = "does not fit"
    elif any(file.verdict == "failed" for file in ran):
        verdict = "broken"
    elif not ran or any(file.verdict == "not run" for file in ran):
        verdict = "not run"
    lines.append(f"{which}: {verdict}")
    return Rebased(fork.version, verdict, "\n".join(lines))


def _applied(fork: Fork, tree: Path) -> tuple[list[str], list[str], bool]:
    """Apply what applies: what to say of it, the patches that did, and whether all is well."""
    patches, lines, applied, fits = listed(fork), [], [], True
    if patches and contained(tree, patches):
        lines.append("All patches are in this release already; it needs no series.")
    for source, target in fork.overlays.items():
        fault = overlay(fork, source, target, tree)
        fits = fits and not fault
        lines.append(f"{source}: {fault or 'fits'}")
    close_overlays(fork, tree)
    for name, patch in patches.items():
        moved, failed = misfits(tree, patch)
        if failed and already(tree, patch):
            failed = ["is in the release already", *failed]
        failed = failed or apply(tree, patch)
        applied += [] if failed else [name]
        verdict = "fails" if failed else "applies with an offset" if moved else "applies"
        lines += [f"{name}: {verdict}", *(f"    {fault}" for fault in failed or moved)]
    fits = fits and len(applied) == len(patches)
    if not fits:
        lines.append("What fails was left out for those after it.")
    return lines, applied, fits


def _told(ran: list[Ran], tree: Path, applied: list[str]) -> list[str]:
    """Describe the tests: where they ran, and of each file its patches and its outcome."""
    if not ran:
        return ["tests not run: what applies of the series brings none"]
    brought: dict[str, list[str]] = {}
    for name, commit in zip(applied, commits(tree), strict=True):
        for path in git(tree, "diff", "--name-only", f"{commit}~", commit).splitlines():
            brought.setdefault(path, []).append(name.partition("-")[0])
    lines = [f"The series' own tests, on {_environment(tree)}:"]
    for file in ran:
        numbers = sorted({n for path in file.files for n in brought[path]})
        of = f"{file.name} (of {', '.join(numbers)})"
        told = f"tests not run: {file.text}" if file.verdict == "not run" else file.text
        lines.append(f"{of}: {told}")
        lines += [f"    {_inside(failure, tree)}" for failure in file.failures[:1]]
    return lines


def _inside(failure: str, tree: Path) -> str:
    """A failure whose place, if it is in the tree, is told from there."""
    return re.sub(rf"(?<= )\S*{re.escape(f'{tree.parent.name}/{tree.name}')}/", "", failure)


def _environment(tree: Path) -> str:
    """The Python that runs the tests, and the versions there of what the release asks for."""
    said = [f"Python {platform.python_version()}"]
    fields = BytesHeaderParser().parsebytes((tree / "PKG-INFO").read_bytes())
    asked = [Requirement(line) for line in fields.get_all("Requires-Dist", [])]
    asked = [one for one in asked if not one.marker or one.marker.evaluate({"extra": ""})]
    if "torch" not in {one.name for one in asked}:  # transformers has it in an extra alone.
        asked.insert(0, Requirement("torch"))
    for one in asked:
        try:
            version = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            said.append(f"no {one.name}")
            continue
        fits = one.specifier.contains(version, prereleases=True)
        said.append(f"{one.name} {version}" + ("" if fits else f" (asked for: {one.specifier})"))
    return ", ".join(said)
