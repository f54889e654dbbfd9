"""Pack for a GPU machine, run a stage there, report: `python -m ci.gpu --help`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import ci.gpu
from ci import forks
from ci.gpu.place import Place, missing
from ci.gpu.table import Record, SpoiledError

# By stage, the minutes that it is expected to take on 16 cores and one GPU: counted from seconds of
# compiling and numbers of tests on a CPU, not measured.
STAGES = {"build": 6, "tests": 6, "kernels": 7, "models": 8, "upstream": 8}
_SPOILED = 75  # The status of a process whose device is spoiled: another goes on.
LATE = 3  # The status of a stage whose time was spent.
LIMIT = 7 * 60  # No row of a table is begun later, in seconds.


def main() -> int:
    """Run the command line."""
    options = _parser().parse_args()
    try:
        return int(options.command(options))
    except (FileExistsError, FileNotFoundError, RuntimeError, forks.ForkError) as error:
        print(error, file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ci.gpu",
        description=ci.gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(required=True)
    pack = verbs.add_parser("pack", help="make the folder")
    pack.set_defaults(command=_pack)
    pack.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    pack.add_argument("--python", default="3.12", help="that of the machine; default: %(default)s")
    pack.add_argument("--no-wheels", action="store_true", help="the machine has what compat needs")
    run = verbs.add_parser("run", help="run a stage in a packed folder")
    run.set_defaults(command=_run)
    run.add_argument("stage", choices=STAGES)
    run.add_argument("--rehearse", action="store_true", help="tiny, on a CPU, without a GPU")
    run.add_argument("--graph", action="store_true", help="models: the chunk step as a CUDA graph")
    # For the process that a stage starts for itself: how long it has.
    run.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    report = verbs.add_parser("report", help="write tables and plots of results")
    report.set_defaults(command=_report)
    report.add_argument("results", nargs="*", type=Path, help="folders `out` of packed folders")
    return parser


def _pack(options: argparse.Namespace) -> int:
    from ci.gpu.pack import pack

    size = pack(options.out, options.python, wheels=not options.no_wheels)
    print(f"{options.out}: {size / 1e6:.1f} MB. On a machine with a GPU, in this order:")
    for stage, minutes in STAGES.items():
        print(f"    {options.out}/run {stage:<9}  some {minutes} minutes, estimated")
    print("Without one, --rehearse behind each.")
    return 0


def _run(options: argparse.Namespace) -> int:
    also = os.environ.get("OUT")
    place = Place(forks.ROOT, Path(also) if also else None, options.rehearse)
    stage = importlib.import_module(f"ci.gpu.{options.stage}")
    if not options.rehearse and (reason := missing()):
        print(reason, file=sys.stderr)
        return 1
    start = time.monotonic()
    limit = math.inf if options.rehearse else LIMIT
    if (source := getattr(stage, "SOURCE", None)) and options.seconds is None:
        # The stage itself imports the kernels of that source.
        status = _SPOILED
        while status == _SPOILED:
            left = f"{limit - (time.monotonic() - start)}"
            command = [sys.executable, "-m", "ci.gpu", *sys.argv[1:], "--seconds", left]
            status = subprocess.run(command, env=place.environment(source)).returncode
        return status
    place.out.mkdir(exist_ok=True)
    record = Record(place, options.stage, limit if options.seconds is None else options.seconds)
    log = place.out / f"{options.stage}.log"
    with log.open("a") as file, contextlib.redirect_stderr(file):
        try:
            stage.run(place, record, options)
        except SpoiledError:
            return _SPOILED
    print(f"\n{options.stage}: {time.monotonic() - start:.0f} s; details: {log}")
    for fault in record.faults:
        print(f"not as it must be: {fault}", file=sys.stderr)
    if record.late:
        print("Not all rows are there: run the stage again, and it goes on.", file=sys.stderr)
    return 1 if record.faults else LATE if record.late else 0


def _report(options: argparse.Namespace) -> int:
    from ci.gpu.report import report

    for line in report(options.results):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
