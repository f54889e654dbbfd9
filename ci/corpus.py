"""Real text that every Python has: the documentation topics and the docstrings of its library."""

from __future__ import annotations

import ast
import itertools
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics as _topics

# Not in every installation of a Python, so left out: the text would differ between machines.
_LEFT_OUT = frozenset(
    {"__pycache__", "dist-packages", "distutils", "ensurepip", "idlelib", "lib2to3"}
    | {"pydoc_data", "site-packages", "test", "tests", "tkinter", "turtledemo"}
)
_SEPARATOR = "\n\n"


def topics() -> dict[str, str]:
    """The language reference that `help("topics")` shows: some 80 texts, 465,000 characters."""
    return dict(_topics)


def docstrings() -> Iterator[tuple[str, str]]:
    """Docstrings of the standard library as `(module:line, text)`, some 1.3 million characters.

    They are read from the source files, in the order of their paths and lines; nothing is imported.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    for path in paths:
        if _LEFT_OUT.isdisjoint(path.parts):
            yield from _docstrings_of(root / path, ".".join(path.with_suffix("").parts))


def _docstrings_of(path: Path, module: str) -> Iterator[tuple[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # Of the library's own source, not of ours.
        tree = ast.parse(path.read_bytes())
    found = []
    for node in ast.walk(tree):
        if isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ) and (text := ast.get_docstring(node)):
            found.append((node.body[0].lineno, text))
    yield from ((f"{module}:{line}", text) for line, text in sorted(found))


def long_text() -> str:
    """All topics end to end."""
    return _SEPARATOR.join(topics().values())


def text_of_length(characters: int) -> str:
    """A text of exactly that many characters: all topics, then docstrings, over again if need be.

    A shorter text is the beginning of a longer one.
    """
    parts: list[str] = []
    missing = characters + len(_SEPARATOR)  # No separator follows the last text.
    texts = itertools.chain.from_iterable(
        itertools.chain(topics().values(), (text for _, text in docstrings()))
        for _ in itertools.count()
    )
    while missing > 0:
        parts.append(next(texts))
        missing -= len(parts[-1]) + len(_SEPARATOR)
    return _SEPARATOR.join(parts)[:characters]
