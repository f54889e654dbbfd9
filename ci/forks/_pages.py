"""The page of a request: what a person needs who sends it, and what a program reads of it."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ci.forks._release import Fork, ForkError

FENCE = "+++\n"
SECTIONS = ["Body", "Issue", "Reproduction", "On a GPU", "Before it is sent"]
# `draft`: it is not to be sent yet, and its page says why; it is applied, and not run. `waits`: for
# an answer to its issue, or for a request that it needs.
STATES = ["draft", "ready", "waits", "sent", "merged"]
BODY_LINES, REPRODUCTION_LINES, TITLE_LENGTH, PATCHES = 40, 15, 72, 2
BEGIN, END = "<!-- requests -->", "<!-- /requests -->"
# What the sender does, whatever the request is: each is a word of the last section.
CHECKLIST = ["read", "line", "how it was made", "pytest"]


@dataclass(frozen=True)
class Request:
    """A pull request that could be sent, as `forks/LIBRARY/pull_requests/NN-NAME.md` has it.

    Attributes:
        path: Of the page.
        title: Of the pull request, and the first line of its commit.
        flow: Whose work is wrong without it, in a sentence.
        patches: Names of patches, without number and ending, in their order.
        main: Upstream's main on which it was tried, and what conflicted.
        state: One of `STATES`.
        needs: Names of the requests that have to be merged before it.
        overlays: Paths in the tree of the overlays that come with it.
        controls: New tests that pass on the release too, since they hold what must not change.
        sanitizer: The reproduction shows the fault only under the address sanitizer.
        sections: Text of each of `SECTIONS`.
    """

    path: Path
    title: str
    flow: str
    patches: list[str]
    main: str
    state: str
    needs: list[str] = field(default_factory=list)
    overlays: list[str] = field(default_factory=list)
    controls: list[str] = field(default_factory=list)
    sanitizer: bool = False
    sections: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Request:
        """Read a page; a ForkError names what is wrong in its head."""
        start, head, text = [*path.read_text().split(FENCE, 2), "", ""][:3]
        if start or not text:
            raise ForkError(f"{path}: found no head; needed: TOML between two lines `+++`.")
        parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
        sections = dict(zip(parts[1::2], map(str.strip, parts[2::2]), strict=True))
        try:
            known: dict[str, Any] = tomllib.loads(head)
            return cls(path, sections=sections, **known)
        except (TypeError, tomllib.TOMLDecodeError) as error:
            raise ForkError(f"{path}: {error}") from error

    @property
    def name(self) -> str:
        """The name of the page without its number, which is also the branch's."""
        return self.path.stem.partition("-")[2]

    @property
    def code(self) -> str:
        """The reproduction, which a maintainer can paste."""
        return self._blocks("python")[0]

    @property
    def printed(self) -> list[str]:
        """Say what it prints, on the release and after."""
        return self._blocks("text")

    def _blocks(self, kind: str) -> list[str]:
        text = self.sections.get("Reproduction", "")
        return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)

    def faults(self) -> list[str]:
        """Say what is missing on the page, or over its limits."""
        faults = [f"no section `## {s}`, or an empty one" for s in SECTIONS if not self._has(s)]
        faults += [f"a section `## {s}` of no use" for s in self.sections if s not in SECTIONS]
        if self.state not in STATES:
            faults.append(f"state is {self.state!r}; needed: one of {', '.join(STATES)}")
        faults += [f"`{key}` is empty" for key in ("title", "flow", "main") if not self._said(key)]
        if len(self.title) > TITLE_LENGTH:
            faults.append(f"the title has {len(self.title)} columns, more than {TITLE_LENGTH}")
        if not 1 <= len(self.patches) <= PATCHES:
            faults.append(f"{len(self.patches)} patches; a request is one or two")
        lines = len(self.sections.get("Body", "").splitlines())
        if lines > BODY_LINES:
            faults.append(f"the body has {lines} lines, more than {BODY_LINES}")
        found = len(self._blocks("python")), len(self.printed)
        if found != (1, 2):
            faults.append(
                f"the reproduction has {found[0]} blocks ```python and {found[1]} ```text; "
                "needed: one, and two: what it prints on the release, and after"
            )
        elif (lines := len(self.code.splitlines())) > REPRODUCTION_LINES:
            faults.append(f"the reproduction has {lines} lines, more than {REPRODUCTION_LINES}")
        told = " ".join(self.sections.get("Before it is sent", "").lower().split())
        faults += [f"`Before it is sent` does not say {w!r}" for w in CHECKLIST if w not in told]
        return faults

    def _has(self, section: str) -> bool:
        return bool(self.sections.get(section))

    def _said(self, key: str) -> bool:
        return bool(str(getattr(self, key)).strip())


def pages(fork: Fork) -> list[Request]:
    """The requests of a library, in the order in which they would be sent."""
    return [Request.read(path) for path in sorted(fork.requests.glob("[0-9]*.md"))]


def page(fork: Fork, name: str) -> Request:
    """A request by its name, with or without its number."""
    found = pages(fork)
    for request in found:
        if name in (request.name, request.path.stem):
            return request
    raise ForkError(
        f"{fork.library}: no request {name!r}; there are {', '.join(r.name for r in found)}."
    )


def needed(requests: list[Request], request: Request) -> list[Request]:
    """All requests that one needs, also by way of others, in the order of their pages."""
    by_name = {one.name: one for one in requests}
    found: set[str] = set()
    todo = list(request.needs)
    while todo:
        name = todo.pop()
        if name not in by_name:
            raise ForkError(f"{request.path.name}: needs {name!r}, and no page has that name.")
        if name not in found:
            found.add(name)
            todo += by_name[name].needs
    return [one for one in requests if one.name in found]


def bare(patch: str) -> str:
    """The name of a patch without its number and its ending."""
    return patch.partition("-")[2].removesuffix(".patch")


def assignment(requests: list[Request], patches: list[str]) -> list[str]:
    """Say where a patch is in no request or in two, or a request names one that is not there."""
    faults, names = [], [bare(patch) for patch in patches]
    owners: dict[str, list[str]] = {name: [] for name in names}
    for request in requests:
        for name in request.patches:
            if name in owners:
                owners[name].append(request.name)
            else:
                faults.append(f"{request.path.name}: no patch {name!r} is in the series")
    for name, owning in owners.items():
        if len(owning) != 1:
            said = f"requests {', '.join(owning)}" if owning else "no request"
            faults.append(f"patch {name} is in {said}; needed: one, or the folder parked/")
    return faults


def table(requests: list[Request], parked: dict[str, str]) -> str:
    """The list of the requests with their state, and of what is parked with the reason."""
    lines = [
        "| | request | without it | needs | state | tried on main |",
        "|---|---|---|---|---|---|",
    ]
    for request in requests:
        number, link = request.path.stem.partition("-")[0], f"pull_requests/{request.path.name}"
        needs = ", ".join(request.needs) or "-"
        cells = [f"[{request.title}]({link})", request.flow, needs, request.state, request.main]
        lines.append("| " + " | ".join([str(int(number)), *cells]) + " |")
    if parked:
        lines += ["", "| parked | why |", "|---|---|"]
        lines += [f"| {name} | {reason} |" for name, reason in parked.items()]
    return "\n".join(lines)


def parked(fork: Fork) -> dict[str, str]:
    """The patches of `patches/LIBRARY/parked`, in the order of its `series`, with their reasons."""
    folder = fork.patches / "parked"
    file = folder / "series"
    reasons: dict[str, str] = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        name, _, reason = line.partition(" # ")
        reasons[name.strip()] = reason.strip()
    present = {path.name for path in folder.glob("*.patch")}
    faults = [f"{n} is listed, and no such file" for n in reasons if n not in present]
    faults += [f"{n} is not listed" for n in sorted(present - reasons.keys())]
    faults += [f"{n} has no reason; write `NAME # REASON`" for n, why in reasons.items() if not why]
    if faults:
        raise ForkError("\n".join(f"{fork.library}: {file}: {fault}." for fault in faults))
    return reasons


def index(fork: Fork) -> str:
    """PULL_REQUEST.md with its list as the pages are now."""
    path = fork.folder / "PULL_REQUEST.md"
    before, begin, rest = path.read_text().partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    if not begin or not end:
        raise ForkError(f"{path} needs the lines {BEGIN} and {END}: put them where the list goes.")
    text = table(pages(fork), parked(fork))
    return f"{before}{begin}{text}\n{end}{after}"
