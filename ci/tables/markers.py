"""Write the generated parts of Markdown files; each stands between two markers."""

from __future__ import annotations

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
