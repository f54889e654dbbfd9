"""The parts of README.md, and of others, that programs write: each between two markers."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def put(section: str, text: str, path: Path | None = None) -> None:
    """Replace what stands between the two markers of a section, by default in README.md.

    Raises:
        ValueError: The file does not have both markers.
    """
    begin, end = f"<!-- {section} -->", f"<!-- /{section} -->"
    path = path or README
    before, found_begin, rest = path.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"{path} needs the lines {begin} and {end}: put them where it goes.")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")
