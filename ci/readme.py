"""The parts of README.md that programs write: each stands between two markers of its name."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def put(section: str, text: str) -> None:
    """Replace what stands between the two markers of a section.

    Raises:
        ValueError: The file does not have both markers.
    """
    begin, end = f"<!-- {section} -->", f"<!-- /{section} -->"
    before, found_begin, rest = README.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"{README} needs the lines {begin} and {end}: put them where it goes.")
    README.write_text(f"{before}{begin}\n{text}\n{end}{after}")
