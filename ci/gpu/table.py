"""Show the rows of a stage as they come, and keep them, so that the stage can go on from there."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ci.gpu.place import Place

Row = dict[str, Any]
"""A value for each column: a number or a text."""

NOT_RUN = "not run"
SPOILED = "spoiled"


class UnavailableError(Exception):
    """This machine lacks something without which a row cannot be made; that is no fault."""


class SpoiledError(Exception):
    """A row left the process's device unusable; what is left has to be made in another process."""


class Record:
    """The tables of a stage, in `out/STAGE.json`, and in `$OUT` where that is another place.

    Attributes:
        faults: What was not as it must be, in lines.
        late: Whether a row was left out, since the stage's time was spent.
    """

    def __init__(self, place: Place, stage: str, seconds: float) -> None:
        self.place, self.stage = place, stage
        self.faults: list[str] = []
        self.late = False
        self._end = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._tables: dict[str, dict[str, Any]] = {}
        kept = place.out / f"{stage}.json"
        if kept.exists():
            found = json.loads(kept.read_text())
            # Rows of another machine or folder, or of a rehearsal, are not gone on from.
            if all(found["machine"][key] == place.machine[key] for key in ("device", "packed")):
                self._tables = found["tables"]

    def table(
        self,
        title: str,
        columns: Sequence[str],
        makers: Mapping[str, Callable[[], Row]],
        *,
        at_once: int = 1,
    ) -> dict[str, Row]:
        """Show and keep a table.

        A row that was made before is shown and not made again, unless it could not be made or has
        a fault. One that spoiled the device is not tried again.

        Args:
            title: Of the table.
            columns: The values of a row that are shown; a row may have more.
            makers: What makes each row, by its name. A maker may raise: the row says why, and that
                is a fault, but for an UnavailableError. So is a value under "fault".
            at_once: How many makers run at a time.

        Returns:
            The rows that are there, by their names.

        Raises:
            SpoiledError: A row, which is kept, spoiled the device of this process.
        """
        table = self._tables.setdefault(title, {"columns": list(columns), "rows": {}})
        print(f"\n{title}\n({self.place.title})\n{line('', columns, {c: c for c in columns})}")
        if at_once == 1:  # In this thread, whose settings of torch they need.
            for name, make in makers.items():
                self._row(table, name, make)
        else:
            with ThreadPoolExecutor(at_once) as pool:
                list(pool.map(lambda item: self._row(table, *item), makers.items()))
        rows: dict[str, Row] = table["rows"]
        return rows

    def forget(self) -> None:
        """Make all rows again."""
        self._tables = {}

    def _row(self, table: dict[str, Any], name: str, make: Callable[[], Row]) -> None:
        row = table["rows"].get(name)
        spoiled = False
        if row is None or (SPOILED not in row and (NOT_RUN in row or "fault" in row)):
            row = self._made(make)
            spoiled = SPOILED in row
        with self._lock:
            table["rows"][name] = row
            if fault := row.get("fault"):
                self.faults.append(f"{name}: {fault}")
            print(line(name, table["columns"], row), flush=True)
            self._write()
        if spoiled:
            raise SpoiledError(name)

    def _made(self, make: Callable[[], Row]) -> Row:
        if time.monotonic() > self._end:
            self.late = True
            return {NOT_RUN: "the time of a stage was spent; run it again to go on"}
        try:
            return make()
        except UnavailableError as error:
            return {NOT_RUN: f"{error}"}
        except Exception as error:
            said = f"{type(error).__name__}: {error}".strip()[:300]
            return {NOT_RUN: said, "fault": said} | ({SPOILED: True} if is_spoiled() else {})

    def _write(self) -> None:
        found = {"stage": self.stage, "machine": self.place.machine, "tables": self._tables}
        for folder in {self.place.out, self.place.also or self.place.out}:
            folder.mkdir(parents=True, exist_ok=True)
            new = folder / f"{self.stage}.new"
            new.write_text(json.dumps(found, indent=1))
            new.replace(folder / f"{self.stage}.json")


def is_spoiled() -> bool:
    """Return whether CUDA, where this process uses it, fails in all that comes after a fault."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def line(name: str, columns: Sequence[str], row: Row) -> str:
    """Return a row as a line of the table on the screen."""
    cells = [shown(row.get(column, "")).rjust(max(len(column), 9)) for column in columns]
    if NOT_RUN in row:
        cells = [f"{NOT_RUN}: {row[NOT_RUN]}"]
    elif "fault" in row:
        cells.append(f"fault: {row['fault']}")
    return "  ".join([f"  {name:<46}", *cells]).rstrip()


def shown(value: Any) -> str:
    """Return a value as a table shows it: three digits of a number that is not whole."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else f"{value}"
