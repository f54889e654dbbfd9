"""Real text that every Python has: the documentation topics and docstrings of its library."""

from __future__ import annotations

import ast
import itertools
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics as _topics

# These are not in every installation of Python. They are left out, because otherwise the text would
# differ between machines.
_LEFT_OUT = frozenset(
    {"__pycache__", "dist-packages", "distutils", "ensurepip", "idlelib", "lib2to3"}
    | {"pydoc_data", "site-packages", "test", "tests", "tkinter", "turtledemo"}
)
_SEPARATOR = "\n\n"


def topics() -> dict[str, str]:
    """Return the language reference of `help("topics")`: some 80 texts, 465,000 characters."""
    return dict(_topics)


def docstrings() -> Iterator[tuple[str, str]]:
    """Yield docstrings of the library as `(module:line, text)`, some 1.3 million characters.

    They are read from the source files, in the order of their paths and lines; nothing is imported.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    for path in paths:
        if _LEFT_OUT.isdisjoint(path.parts):
            yield from _docstrings_of(root / path, ".".join(path.with_suffix("").parts))


def _docstrings_of(path: Path, module: str) -> Iterator[tuple[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # The warnings are about the library.
        tree = ast.parse(path.read_bytes())
    found = []
    for node in ast.walk(tree):
        if isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ) and (text := ast.get_docstring(node)):
            found.append((node.body[0].lineno, text))
    yield from ((f"{module}:{line}", text) for line, text in sorted(found))


def long_text() -> str:
    """Return all topics, end to end."""
    return _SEPARATOR.join(topics().values())


def text_of_length(characters: int) -> str:
    """Return exactly that many characters: all topics, then docstrings, repeated if need be.

    A shorter text is the beginning of a longer one.
    """
    parts: list[str] = []
    missing = characters + len(_SEPARATOR)  # The last text has no separator.
    texts = itertools.chain.from_iterable(
        itertools.chain(topics().values(), (text for _, text in docstrings()))
        for _ in itertools.count()
    )
    while missing > 0:
        parts.append(next(texts))
        missing -= len(parts[-1]) + len(_SEPARATOR)
    return _SEPARATOR.join(parts)[:characters]
