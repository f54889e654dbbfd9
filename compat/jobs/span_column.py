"""Spans that a table or a JSON object gives for its text."""

from __future__ import annotations

import hashlib
import json
from typing import Any

Span = tuple[int, int]


def read_spans(value: Any, column: str, text: str) -> list[Span] | str:
    """Return the spans in a column, or say what was found there and is needed.

    Args:
        value: What the column has for a text: pairs [start, end] of characters, or objects with
            both.
        column: Its name.
        text: The text.
    """
    if not isinstance(value, list) or not value:
        what = f"a {type(value).__name__}" if value else "nothing"
        return f"found {what} in column {column!r}, needed a list of pairs [start, end]"
    found = []
    for item in value:
        pair = [item.get("start"), item.get("end")] if isinstance(item, dict) else item
        if not isinstance(pair, list) or [type(place) for place in pair] != [int, int]:
            said = f"{json.dumps(item, default=str):.60}"
            return f"found {said} in column {column!r}, needed pairs [start, end] of characters"
        start, end = pair
        if not 0 <= start < end <= len(text):
            return (
                f"found the span [{start}, {end}] in column {column!r}, needed "
                f"0 <= start < end <= {len(text)}, the characters of the text"
            )
        found.append((start, end))
    return found


def digest(sha256: str, spans: list[Span]) -> str:
    """Hash a text's hash with its spans: passages are made of both."""
    return hashlib.sha256(f"{sha256} {json.dumps(spans)}".encode()).hexdigest()
