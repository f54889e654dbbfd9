"""Text to train and evaluate the default model on: `python -m ci.model.data`.

The sources are packages of Debian's main section, fetched by apt-get, which need not be installed:
manual pages and HTML documentation, and the descriptions of all packages. Of these come pairs of
a line that says what a text is about and the text itself, some short, some as long as a book.

Pairs of one page stay together: some pages are kept for the evaluation, and so are all sources in
`HELD_OUT`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal

from tqdm import tqdm

OUT = Path("model-out")
PAIRS = "pairs.jsonl"
# Packages, all of Debian's main section, and the licences of their documentation.
PACKAGES = {
    "coreutils": "GPL-3.0-or-later, GFDL-1.3 without invariant sections",
    "debian-policy": "GPL-2.0-or-later, FHS",
    "developers-reference": "GPL-2.0-or-later",
    "erlang-manpages": "Apache-2.0",
    "git-man": "GPL-2.0-only",
    "iproute2": "GPL-2.0-only",
    "libssl-doc": "Apache-2.0",
    "manpages": "Linux-man-pages-copyleft, GPL-2.0-or-later, BSD",
    "manpages-dev": "Linux-man-pages-copyleft, GPL-2.0-or-later, BSD",
    "openssl": "Apache-2.0",
    "perl-doc": "Artistic-1.0-Perl or GPL-1.0-or-later",
    "postgresql-doc-15": "PostgreSQL",
    "python3.11-doc": "PSF-2.0",
    "systemd": "LGPL-2.1-or-later, GPL-2.0-or-later",
    "tcl8.6-doc": "TCL",
    "util-linux": "GPL-2.0-or-later, LGPL-2.1-or-later, BSD",
}
DESCRIPTIONS = "package descriptions"  # Each under its package's own free licence.
HELD_OUT = frozenset({"perl-doc"})
TEST_SHARE = 20  # One page in so many is kept for the evaluation.
SHORT, LONG = 2000, (8_000, 400_000)  # Characters: of a short text at most, of a long one.

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Pair:
    """A line and the text that it is about.

    Attributes:
        source: The package, or `DESCRIPTIONS`.
        page: What the text is a part of.
        query: The line.
        text: The text, without the line.
        long: Whether it is a whole page, of `LONG` characters.
    """

    source: str
    page: str
    query: str
    text: str
    long: bool

    @property
    def split(self) -> Split:
        """Pairs of one page are on one side."""
        digest = hashlib.sha256(f"{self.source} {self.page}".encode()).digest()
        kept = self.source in HELD_OUT or int.from_bytes(digest[:4], "big") % TEST_SHARE == 0
        return "test" if kept else "train"


def pairs(folder: Path, split: Split) -> list[Pair]:
    """The pairs that `main` has written into a folder."""
    with (folder / PAIRS).open() as lines:
        read = [Pair(**json.loads(line)) for line in lines]
    return [pair for pair in read if pair.split == split]


# Fetching.


def fetch(folder: Path) -> None:
    """Download what is not there yet, and unpack it."""
    packages, lists = folder / "packages", folder / "lists"
    packages.mkdir(parents=True, exist_ok=True)
    (folder / "text").mkdir(exist_ok=True)
    for name in tqdm(PACKAGES, desc="packages", disable=None):
        if not list(packages.glob(f"{name}_*.deb")):
            subprocess.run(["apt-get", "-q", "download", name], cwd=packages, check=True)
        unpacked = folder / "text" / name
        if not unpacked.is_dir():
            (package,) = packages.glob(f"{name}_*.deb")
            subprocess.run(["dpkg-deb", "-x", package, unpacked], check=True)
    if not list(lists.glob("*_main_i18n_Translation-en*")):
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        # The lists of its own leave the system's as they are, which may lack descriptions.
        options = [f"Dir::State::Lists={lists.resolve()}", "Acquire::Languages=en"]
        words = [word for option in options for word in ("-o", option)]
        subprocess.run(["apt-get", "-q", *words, "update"], check=True)


# Reading.


def read_descriptions(lists: Path) -> Iterator[Pair]:
    """The summaries of packages and what follows them; of packages that begin alike, the first."""
    seen = set()
    for path in sorted(lists.glob("*_main_i18n_Translation-en*")):
        command = ["/usr/lib/apt/apt-helper", "cat-file", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for entry in text.split("\n\n"):
            found = re.search(r"^Description-en: (.*)\n((?: .*\n?)+)", entry, re.MULTILINE)
            if found is None:
                continue
            summary, body = found.groups()
            paragraphs = [" ".join(p.split()) for p in re.split(r"\n \.\n", body)]
            beginning = re.sub(r"\W+", " ", paragraphs[0].lower())[:200]
            whole = "\n\n".join(paragraphs)
            about = re.sub(r"\W+", " ", summary.lower())
            if len(whole) >= 100 and beginning not in seen and about not in seen:
                seen |= {beginning, about}
                yield Pair(DESCRIPTIONS, beginning, summary, whole[:SHORT], long=False)


def read_manual(source: str, path: Path) -> Iterator[Pair]:
    """A manual page: its description line, with its DESCRIPTION and with all but its name."""
    sections = manual_sections(gzip.decompress(path.read_bytes()).decode(errors="replace"))
    name = " ".join(sections.pop("NAME", "").split())
    _, dash, query = name.partition(" - ")
    if not dash or len(query) < 15:
        return
    page = query.lower()  # Pages of one description are one page, under several names.
    if len(text := sections.get("DESCRIPTION", "")) >= 100:
        yield Pair(source, page, query, text[:SHORT], long=False)
    whole = "\n\n".join(f"{title}\n\n{text}" for title, text in sections.items())
    if LONG[0] <= len(whole) <= LONG[1]:
        yield Pair(source, page, query, whole, long=True)


_FONT = re.compile(r"\\f(?:\[[^\]]*\]|\(..|.)|\\s[-+]?\d|\\m\[[^\]]*\]|\\[&|^)%:/,cz]|\\v'[^']*'")
_STRINGS = {"aq": "'", "Aq": "'", "lq": '"', "rq": '"', "dq": '"', "oq": "'", "cq": "'", "ti": "~"}
_STRINGS |= {"ha": "^", "bu": "*", "em": "-", "en": "-", "rs": "\\", "C+": "C++", "--": "-"}
_STRINGS |= {"ga": "`", "bv": "|", "ba": "|", "->": "->", "<=": "<=", ">=": ">=", "mu": "x"}


def _plain(text: str) -> str:
    """What is left of text without roff's escapes."""
    text = re.sub(r'\\".*', "", text)
    text = _FONT.sub("", text)
    text = re.sub(r"\\\*?(?:\[([^\]]*)\]|\((..))", lambda m: _STRINGS.get(m[1] or m[2], ""), text)
    return re.sub(r"\\(.)", lambda m: {"e": "\\", "t": " "}.get(m[1], m[1]), text)


def manual_sections(roff: str) -> dict[str, str]:
    """The sections of a manual page in roff's macros "man", as plain text; others have none."""
    sections: dict[str, list[str]] = {}
    lines: list[str] | None = None
    skipped = False  # Within the definition of a macro.
    for line in roff.splitlines():
        request, _, rest = line.partition(" ")
        if skipped or request in (".de", ".de1", ".ig"):
            skipped = line != ".."
        elif request == ".SH":
            lines = sections.setdefault(_plain(rest.strip(' "')).upper(), [])
        elif lines is None or line.startswith(("'", '.\\"')):
            continue
        elif not line.startswith("."):
            lines.append(_plain(line))
        elif request in (".PP", ".P", ".LP", ".TP", ".sp", ".HP", ".IP", ".SS"):
            lines.append("")
            if request in (".IP", ".SS"):
                lines.append(_plain(" ".join(_arguments(rest)[: 1 if request == ".IP" else 99])))
        elif request in (".B", ".I", ".SM", ".SB"):
            lines.append(_plain(" ".join(_arguments(rest))))
        elif request in (".BR", ".BI", ".RB", ".IR", ".RI", ".IB"):
            lines.append(_plain("".join(_arguments(rest))))
    return {
        title: re.sub(r"\n\s*\n+", "\n\n", "\n".join(lines)).strip()
        for title, lines in sections.items()
    }


def _arguments(rest: str) -> list[str]:
    return [quoted or bare for quoted, bare in re.findall(r'"([^"]*)"?|((?:\\ |\S)+)', rest)]


def read_html(source: str, path: Path) -> Iterator[Pair]:
    """A page of documentation: its sections by their titles, and the whole by its own."""
    parser = _Sections()
    parser.feed(path.read_text(errors="replace"))
    sections = [(" ".join(t.split()), _tidy(text)) for t, text in parser.sections]
    sections = [(title, text) for title, text in sections if title]
    if not sections:
        return
    heading = sections[0][0]
    for title, text in sections:
        query = heading if title == heading else f"{heading}: {title}"
        if len(text) >= 150 and len(query) >= 10:
            yield Pair(source, path.name, query, text[:SHORT], long=False)
    whole = "\n\n".join([sections[0][1], *(f"{t}\n\n{text}" for t, text in sections[1:])])
    if LONG[0] <= len(whole) <= LONG[1]:
        yield Pair(source, path.name, heading, whole, long=True)


def _tidy(text: str) -> str:
    return re.sub(r"\n\s*\n+", "\n\n", re.sub(r"[ \t]+", " ", text)).strip()


class _Sections(HTMLParser):
    """Collects `sections`, each its title and its text."""

    _void = frozenset(
        ["area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "wbr"]
    )
    _apart = re.compile("sphinxsidebar|related|navheader|navfooter|headerlink|toc|footer|clearer")

    def __init__(self) -> None:
        super().__init__()
        self.sections: list[tuple[str, str]] = []
        self._open: list[bool] = []  # For each element around: whether it is left out.
        self._tags: list[str] = []
        self._heading = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self._void:
            return
        name = dict(attrs).get("class") or ""
        left_out = tag in ("script", "style", "head", "nav") or bool(self._apart.search(name))
        self._tags.append(tag)
        self._open.append(left_out or (bool(self._open) and self._open[-1]))
        if re.fullmatch("h[1-5]", tag) and not self._open[-1]:
            self._heading = True
            self.sections.append(("", ""))
        elif tag in ("p", "pre", "li", "dt", "dd", "tr", "div"):
            self.handle_data("\n\n" if tag in ("p", "pre") else "\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._tags:
            while self._tags.pop() != tag:
                self._open.pop()
            self._open.pop()
        if re.fullmatch("h[1-5]", tag):
            self._heading = False

    def handle_data(self, data: str) -> None:
        if self.sections and not (self._open and self._open[-1]):
            title, text = self.sections[-1]
            read = (title + data, text) if self._heading else (title, text + data)
            self.sections[-1] = read


def read(folder: Path) -> Iterator[Pair]:
    """All pairs of what was fetched."""
    yield from read_descriptions(folder / "lists")
    for source in PACKAGES:
        root = folder / "text" / source
        paths = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
        for path in tqdm(paths, desc=source, leave=False, disable=None):
            if path.suffix == ".html" and not re.search("genindex|search|whatsnew", str(path)):
                yield from read_html(source, path)
            elif re.search(r"/man/man\d/[^/]*\.gz$", str(path)):
                yield from read_manual(source, path)


def main() -> None:
    """Fetch, read and write the pairs; print what there is."""
    fetch(OUT)
    found = list({(p.query, p.text): p for p in read(OUT)}.values())
    with (OUT / PAIRS).open("w") as file:
        file.writelines(json.dumps(asdict(pair)) + "\n" for pair in found)
    for source in (DESCRIPTIONS, *PACKAGES):
        of = [pair for pair in found if pair.source == source]
        counts = [f"{sum(p.long for p in of):5} long", f"{sum(not p.long for p in of):6} short"]
        counts.append(f"{sum(p.split == 'test' for p in of):5} kept for the evaluation")
        print(f"{source:22}", *counts)


if __name__ == "__main__":
    main()
