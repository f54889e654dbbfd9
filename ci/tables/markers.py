"""Write the generated parts of Markdown files, each between two markers, and tables in them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

_ROOT = Path(__file__).parents[2]
README = _ROOT / "README.md"
EVALUATION = _ROOT / "compat" / "default_model" / "README.md"
BENCH = _ROOT / "ci" / "bench" / "RESULTS.md"
NEEDLES = _ROOT / "ci" / "bench" / "NEEDLES.md"
MODELS = _ROOT / "compat" / "families" / "README.md"


def put(section: str, text: str, path: Path) -> None:
    """Replace the text between the two markers of a section of a file.

    Raises:
        ValueError: The file does not have both markers.
    """
    begin, end = f"<!-- {section} -->", f"<!-- /{section} -->"
    before, found_begin, rest = path.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"{path} needs the lines {begin} and {end}: put them where it goes.")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    """Return a table; with `numbers`, all columns but the first are set to the right."""
    dashes = ["---", *["---:" if numbers else "---"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, dashes, *rows])


def section(about: str, *parts: str, smoke: bool = False) -> str:
    """Join the parts of a section: what was measured, wrapped, and tables or other text.

    Args:
        about: What was measured, when and where.
        parts: What stands below it.
        smoke: Whether it was measured at sizes that only show that it runs.
    """
    warning = ["**Smoke sizes: these numbers say nothing.**"] if smoke else []
    return "\n\n".join([*warning, textwrap.fill(about.strip(), 100), *parts])
