"""Make the text to train and evaluate the default model on: `python -m ci.model.data`.

The sources are packages of Debian's main section, fetched by apt-get, which need not be installed:
manual pages, documentation and help in HTML and Mallard, a dictionary, and the descriptions of all
packages. They are turned into pairs: a line that says what a text is about, and the text itself.
Some texts are short, some as long as a book.

Pairs of one page stay together. Some pages are kept for validation, to make choices by while the
model is made; others, which are looked at only at the end, are kept for the evaluation. The same is
done with some whole sources.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal

from tqdm import tqdm

OUT = Path("model-out")
PAIRS = "pairs.jsonl"
# Packages, all of Debian's main section, and the licences of their documentation, as their files
# /usr/share/doc/*/copyright have them.
PACKAGES = {
    "apache2-doc": "Apache-2.0",
    "apt-doc": "GPL-2.0-or-later",
    "aptitude-doc-en": "GPL-2.0-or-later",
    "bind9-doc": "MPL-2.0",
    "clang-14-doc": "Apache-2.0 with LLVM exceptions",
    "cmake-doc": "BSD-3-Clause",
    "coreutils": "GPL-3.0-or-later, GFDL-1.3 without invariant sections",
    "debian-faq": "free to copy and modify",
    "debian-policy": "GPL-2.0-or-later, FHS",
    "debian-reference-en": "GPL-2.0-or-later",
    "developers-reference": "GPL-2.0-or-later",
    "docutils-doc": "public domain, BSD-2-Clause",
    "erlang-manpages": "Apache-2.0",
    "exim4-doc-html": "GPL-2.0-or-later",
    "gap-doc": "GPL-2.0-or-later",
    "git-man": "GPL-2.0-only",
    "gnome-user-docs": "CC-BY-SA-3.0",
    "harden-doc": "GPL-2.0",
    "iproute2": "GPL-2.0-only",
    "libboost1.74-doc": "BSL-1.0",
    "libreoffice-help-en-us": "MPL-2.0",
    "libssl-doc": "Apache-2.0",
    "libvirt-doc": "LGPL-2.1-or-later",
    "lilypond-doc-html": "GFDL-1.3-or-later without invariant sections",
    "linux-doc-6.1": "GPL-2.0-only",
    "manpages": "Linux-man-pages-copyleft, GPL, BSD, MIT",
    "manpages-dev": "Linux-man-pages-copyleft, GPL, BSD, MIT",
    "maxima-doc": "GPL-2.0",
    "mutt": "GPL-2.0-or-later",
    "nodejs-doc": "MIT",
    "octave-doc": "GPL-3.0-or-later",
    "openssl": "Apache-2.0",
    "perl-doc": "Artistic-1.0-Perl or GPL-1.0-or-later",
    "postfix-doc": "EPL-2.0 or IPL-1.0",
    "postgresql-doc-15": "PostgreSQL",
    "python-celery-doc": "CC-BY-SA-4.0",
    "python-django-doc": "BSD-3-Clause",
    "python-pandas-doc": "BSD-3-Clause",
    "python-pil-doc": "HPND",
    "python-sqlalchemy-doc": "MIT",
    "python3.11-doc": "PSF-2.0",
    "r-doc-html": "GPL-2.0",
    "rsyslog-doc": "GPL-3.0-or-later and Apache-2.0, GFDL-1.2 without invariant sections",
    "rust-doc": "MIT or Apache-2.0",
    "sphinx-doc": "BSD-2-Clause",
    "sqlite3-doc": "public domain",
    "swi-prolog-doc": "BSD-2-Clause",
    "systemd": "LGPL-2.1-or-later, GPL-2.0-or-later",
    "tcl8.6-doc": "TCL",
    "util-linux": "GPL-2.0-or-later, LGPL-2.1-or-later, BSD",
    "vim-doc": "Vim, OPL-1.0 without options",
    "wireshark-doc": "GPL-2.0-or-later",
    "wordnet-base": "WordNet-3.0",
    "zsh-doc": "Zsh",
}
DESCRIPTIONS = "package descriptions"  # Each has its own package's free licence.
DICTIONARY = "wordnet-base"

Split = Literal["train", "validation", "test"]

# Sources that are completely on one side: a word of the dictionary is no line about a text.
SIDES: dict[str, Split] = {"perl-doc": "test", "tcl8.6-doc": "validation", DICTIONARY: "train"}
SHARE = 20  # One page in this many is kept for the evaluation, and one for validation.
PAGES = 500  # At most this many files of a package are read.
# In characters: the most of a short text, the range of a long one, and the most of a long one to
# train on.
SHORT, LONG, CUT = 2000, (8_000, 400_000), 64_000


@dataclass(frozen=True)
class Pair:
    """A line and the text that it is about.

    Attributes:
        source: The package, or `DESCRIPTIONS`.
        page: The page that the text is a part of.
        query: The line.
        text: The text, without the line.
        long: True where it is a whole page, with a length within `LONG`.
    """

    source: str
    page: str
    query: str
    text: str
    long: bool

    @property
    def split(self) -> Split:
        """Return the side that the pair is on; pairs of one page are on one side."""
        if self.source in SIDES:
            return SIDES[self.source]
        place = _number(f"{self.source} {self.page}") % SHARE
        return "test" if place == 0 else "validation" if place == 1 else "train"


def _number(text: str) -> int:
    """Return a number that is always the same for a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


@functools.cache
def _read(folder: Path) -> list[Pair]:
    with (folder / PAIRS).open() as lines:
        return [Pair(**json.loads(line)) for line in lines]


def pairs(folder: Path, split: Split) -> list[Pair]:
    """Return the pairs that `main` has written into a folder."""
    return [pair for pair in _read(folder) if pair.split == split]


# Fetching.


def fetch(folder: Path) -> None:
    """Download and unpack the packages that are not there yet."""
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
        # Separate lists leave the system's unchanged; those may lack descriptions.
        options = [f"Dir::State::Lists={lists.resolve()}", "Acquire::Languages=en"]
        words = [word for option in options for word in ("-o", option)]
        subprocess.run(["apt-get", "-q", *words, "update"], check=True)


# Reading.


def read_descriptions(lists: Path) -> Iterator[Pair]:
    """Yield the summaries of packages and the texts below; of texts that begin alike, the first."""
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
    """Yield a manual page's description line, with its DESCRIPTION and with all but its name."""
    sections = manual_sections(gzip.decompress(path.read_bytes()).decode(errors="replace"))
    name = " ".join(sections.pop("NAME", "").split())
    _, dash, query = name.partition(" - ")
    if not dash or len(query) < 15:
        return
    page = query.lower()  # Pages with one description are one page under several names.
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
    """Return the text without roff's escapes."""
    text = re.sub(r'\\".*', "", text)
    text = _FONT.sub("", text)
    text = re.sub(r"\\\*?(?:\[([^\]]*)\]|\((..))", lambda m: _STRINGS.get(m[1] or m[2], ""), text)
    return re.sub(r"\\(.)", lambda m: {"e": "\\", "t": " "}.get(m[1], m[1]), text)


def manual_sections(roff: str) -> dict[str, str]:
    """Return the sections of a manual page in roff's macros "man", as plain text; else none."""
    sections: dict[str, list[str]] = {}
    lines: list[str] | None = None
    skipped = False  # True within the definition of a macro.
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


def read_dictionary(source: str, path: Path) -> Iterator[Pair]:
    """Yield the words of each meaning, with WordNet's explanation of it."""
    for line in path.read_text().splitlines():
        fields, _, gloss = line.partition(" | ")
        if len(gloss) >= 40 and not line.startswith(" "):
            names = fields.split()[4 : 4 + 2 * int(fields.split()[3], 16) : 2]
            query = ", ".join(re.sub(r"\(\w+\)$", "", name).replace("_", " ") for name in names)
            yield Pair(source, query, query, gloss.strip(), long=False)


def read_html(source: str, path: Path) -> Iterator[Pair]:
    """Yield the sections of a page of HTML or Mallard by their titles, and the whole by its own."""
    parser = _Sections()
    parser.feed(path.read_text(errors="replace"))
    sections = [(" ".join(t.split()), _tidy(text)) for t, text in parser.sections]
    sections = [(title, text) for title, text in sections if title]
    if not sections:
        return
    heading, page = sections[0][0], f"{path.parent.name}/{path.name}"
    for title, text in sections:
        query = heading if title == heading else f"{heading}: {title}"
        if len(text) >= 150 and len(query) >= 10:
            yield Pair(source, page, query, text[:SHORT], long=False)
    whole = "\n\n".join([sections[0][1], *(f"{t}\n\n{text}" for t, text in sections[1:])])
    if LONG[0] <= len(whole) <= LONG[1]:
        yield Pair(source, page, heading, whole, long=True)


def _tidy(text: str) -> str:
    return re.sub(r"\n\s*\n+", "\n\n", re.sub(r"[ \t]+", " ", text)).strip()


_HEADING = re.compile("h[1-5]|title")  # "title" is Mallard's; HTML has it in its head.


class _Sections(HTMLParser):
    """A parser that collects `sections`, each its title and its text."""

    _void = frozenset(
        ["area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "wbr"]
    )
    _apart = re.compile("sphinxsidebar|related|navheader|navfooter|headerlink|toc|footer|clearer")

    def __init__(self) -> None:
        super().__init__()
        self.sections: list[tuple[str, str]] = []
        self._open: list[bool] = []  # For each open element, whether it is left out.
        self._tags: list[str] = []
        self._heading = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self._void:
            return
        name = dict(attrs).get("class") or ""
        left_out = tag in ("script", "style", "head", "nav", "info") or bool(
            self._apart.search(name)
        )
        self._tags.append(tag)
        self._open.append(left_out or (bool(self._open) and self._open[-1]))
        if _HEADING.fullmatch(tag) and not self._open[-1]:
            self._heading = True
            self.sections.append(("", ""))
        elif tag in ("p", "pre", "li", "dt", "dd", "tr", "div"):
            self.handle_data("\n\n" if tag in ("p", "pre") else "\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._tags:
            while self._tags.pop() != tag:
                self._open.pop()
            self._open.pop()
        if _HEADING.fullmatch(tag):
            self._heading = False

    def handle_data(self, data: str) -> None:
        if self.sections and not (self._open and self._open[-1]):
            title, text = self.sections[-1]
            read = (title + data, text) if self._heading else (title, text + data)
            self.sections[-1] = read


_READ = re.compile(r"/man/man\d/[^/]*\.gz$|\.html$|/help/C/.*\.page$|/wordnet/data\.\w+$")
_NOT_READ = re.compile(
    r"index\.html$|genindex|modindex|search|whatsnew|changelog|history|release|credits|_source|_8h"
    r"|_modules/|_static/|/(core|alloc|src|arch)/"
    r"|/(?!en)[a-z]{2}(-[A-Za-z]{2})?/|\.(?!en)[a-z]{2}([-_]\w\w)?\.html",  # Other languages.
    re.IGNORECASE,
)


def read_package(root: Path) -> list[Pair]:
    """Return the pairs of an unpacked package; of a large one, of files from all over it."""
    source = root.name
    found: list[Pair] = []
    names = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
    chosen = [n for n in names if _READ.search(n) and not _NOT_READ.search(n)]
    chosen = [n for n in chosen if not names[n].is_symlink()]
    chosen.sort(key=lambda name: (_number(name), name))
    for path in map(names.__getitem__, chosen[: None if source in SIDES else PAGES]):
        if path.suffix == ".gz":
            found += read_manual(source, path)
        elif source == DICTIONARY:
            found += read_dictionary(source, path)
        else:
            found += read_html(source, path)
    return found


def read(folder: Path) -> Iterator[Pair]:
    """Yield all pairs of the fetched packages."""
    yield from read_descriptions(folder / "lists")
    roots = [folder / "text" / source for source in PACKAGES]
    with ProcessPoolExecutor() as pool:
        for found in tqdm(pool.map(read_package, roots), total=len(roots), disable=None):
            yield from found


def main() -> None:
    """Fetch, read and write the pairs, unless they are there; print a summary of them."""
    if not (OUT / PAIRS).is_file():
        fetch(OUT)
        found = {}
        for pair in read(OUT):
            if pair.long and pair.split == "train":
                pair = replace(pair, text=pair.text[:CUT])
            found[pair.query, pair.text] = pair
        with (OUT / "part.jsonl").open("w") as file:
            file.writelines(json.dumps(asdict(pair)) + "\n" for pair in found.values())
        (OUT / "part.jsonl").rename(OUT / PAIRS)
    splits: tuple[Split, ...] = ("train", "validation", "test")
    counts = Counter((pair.source, pair.long, pair.split) for pair in _read(OUT))
    print(
        f"{'':28}{'short':>24}{'long':>24}",
        f"{'':28}" + 2 * "".join(f"{s[:7]:>8}" for s in splits),
        sep="\n",
    )
    for source in (DESCRIPTIONS, *PACKAGES):
        cells = [counts[source, long, split] for long in (False, True) for split in splits]
        print(f"{source:28}" + "".join(f"{count:8,}" for count in cells))


if __name__ == "__main__":
    main()
