"""Keep results of a GPU in ci/gpu/results, with tables and plots, and say what was run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ci import forks
from ci.gpu.place import LIBRARIES, ON_CPU
from ci.gpu.table import NOT_RUN, shown
from ci.gpu.tests import REQUESTS
from ci.tables import markers

RESULTS = Path(__file__).parent / "results"
SECTION = "gpu"
NOTHING = "Nothing was run on a GPU."


def report(folders: list[Path], root: Path = forks.ROOT, kept: Path = RESULTS) -> list[str]:
    """Take results in, and write what is kept into the README and the requests' pages.

    Args:
        folders: `out` of packed folders; none: write the texts anew.
        root: The repository.
        kept: Where results are kept, a folder for each date and device.

    Returns:
        What was written, in lines.

    Raises:
        FileNotFoundError: A folder has no results.
        RuntimeError: Results are of a rehearsal, which says nothing about a GPU.
    """
    lines = [f"{_keep(folder, kept)}: kept" for folder in folders]
    runs = {path: _records(path) for path in sorted(kept.glob("*/"))}
    markers.put(SECTION, _summary(runs, root), root / "README.md")
    for library in LIBRARIES:
        for page in sorted(forks.Fork.read(library, root).requests.glob("[0-9]*.md")):
            name = f"{library}: {page.stem.partition('-')[2]}"
            markers.put(SECTION, "\n".join(_of_request(runs, name)) or NOTHING, page)
    return [*lines, f"README.md and the pages: {len(runs)} runs on a GPU"]


def _records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def _keep(folder: Path, kept: Path) -> Path:
    """Copy the results of a machine, with tables and plots of them."""
    records = _records(folder)
    if not records:
        raise FileNotFoundError(f"Found no STAGE.json in {folder}; needed: the `out` of a run.")
    machine = records[0]["machine"]
    if machine["device"] == ON_CPU:
        raise RuntimeError(f"Found a rehearsal in {folder}; needed: what was run on a GPU.")
    device = re.sub(r"\W+", "-", machine["device"]).strip("-").lower()
    target = kept / f"{machine['date']}-{device}"
    target.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.json"):
        shutil.copy(path, target)
    (target / "README.md").write_text(_tables(records))
    for record in records:
        for title, table in record["tables"].items():
            if title.startswith("Over the length"):
                _draw(table, target)
    return target


def _tables(records: Iterable[dict[str, Any]]) -> str:
    """Return all tables in Markdown."""
    lines: list[str] = []
    for record in records:
        machine = record["machine"]
        said = ", ".join(f"{name} {value}" for name, value in machine.items())
        lines += [f"# {record['stage']}", "", said, ""]
        for title, table in record["tables"].items():
            columns = table["columns"]
            lines += [
                f"## {title}",
                "",
                f"| | {' | '.join(columns)} |",
                "|---" * (1 + len(columns)) + "|",
            ]
            for name, row in table["rows"].items():
                cells = [shown(row.get(column, "")) for column in columns]
                if NOT_RUN in row:
                    cells[0] = f"not run: {row[NOT_RUN]}"
                cells[-1] += f" **{row['fault']}**" if "fault" in row else ""
                lines.append(f"| {' | '.join([name, *cells])} |".replace("\n", " "))
            lines.append("")
    return "\n".join(lines)


def _draw(table: dict[str, Any], folder: Path) -> None:
    """Draw time and memory over the length, a line for each way of each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    for unit, label in {"s": "seconds", "MB": "peak memory above the model, MB"}.items():
        figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in table["rows"].values():
            for column in table["columns"]:
                way, _, of = column.rpartition(" ")
                if of == unit and isinstance(row.get(column), float):
                    lines.setdefault(f"{row['model']}, {way}", []).append(
                        (row["tokens"], row[column])
                    )
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel="length of the text, tokens", ylabel=label)
        axes.grid(color="0.9")
        axes.legend(fontsize="small")
        figure.savefig(folder / f"length-{unit}.png", dpi=110)
        plt.close(figure)


def _summary(runs: dict[Path, list[dict[str, Any]]], root: Path) -> str:
    if not runs:
        return NOTHING
    return "\n".join(
        f"[{records[0]['machine']['device']}, {records[0]['machine']['date']}]"
        f"({path.relative_to(root)}/README.md): {', '.join(one['stage'] for one in records)}."
        for path, records in runs.items()
    )


def _of_request(runs: dict[Path, list[dict[str, Any]]], name: str) -> Iterable[str]:
    """Say what its tests did, run by run."""
    for records in runs.values():
        for record in records:
            row = record["tables"].get(REQUESTS, {"rows": {}})["rows"].get(name)
            if row and NOT_RUN not in row:
                where = f"{record['machine']['device']}, {record['machine']['date']}"
                said = (
                    f"{row['fail on stock']} cases fail on the release, {row['pass patched']} pass"
                )
                yield f"{where}: {said} with all patches. {row.get('fault', '')}".strip()
