"""Build the kernels, stock and patched, for the devices that are there; say registers and spills.

Each source gets a folder of its own that is put on Python's path, with the patched tree's tests.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from ci import forks
from ci.gpu.place import LIBRARIES, SOURCES, Place, sources
from ci.gpu.table import Record, Row, UnavailableError
from ci.kernels import emulation, registers

COLUMNS = ["seconds", "kernels", "registers", "spilling", "spilled"]
# The C++ extension of each library, and where its sources are.
EXTENSIONS = {
    "causal-conv1d": ("causal_conv1d_cuda", "csrc"),
    "mamba-ssm": ("selective_scan_cuda", "csrc/selective_scan"),
}
_CONV = LIBRARIES[0]
# All of both packages, with their extensions, or with stand-ins for these.
IMPORT = "import causal_conv1d, mamba_ssm"
STAND_INS = "import sys, types; sys.modules |= {{n: types.ModuleType(n) for n in {names}}}; "


def run(place: Place, record: Record, _options: argparse.Namespace) -> None:
    """Build all of it at once."""
    pairs = [(source, library) for source in SOURCES for library in LIBRARIES]
    if not all(place.built(*pair).exists() for pair in pairs):
        record.forget()  # What was said of a build that is gone.
    for source, library in pairs:
        lay_out(place, source, library)
    if place.rehearsed:
        emulated = {f"{s} {_CONV}": functools.partial(_emulate, s) for s in SOURCES}
        record.table("CUDA sources on the emulation", ["seconds"], emulated)
        pairs = [(source, _CONV) for source in SOURCES]
    makers = {f"{s} {one}": functools.partial(_extension, place, s, one) for s, one in pairs}
    title = f"Extensions for {', '.join(architectures(place))}"
    record.table(title, COLUMNS, makers, at_once=len(makers))
    imports = {source: functools.partial(_import, place, source) for source in SOURCES}
    record.table("Packages as they are imported", ["seconds"], imports)


def lay_out(place: Place, source: str, library: str) -> Path:
    """Make the copy that is built, with the patched tree's tests, where it is not yet there."""
    folder = place.built(source, library)
    if not folder.exists():
        new = folder.with_name(f"{library}.new")
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(sources(library, source), new)
        shutil.copytree(forks.patched(library) / "tests", new / "tests", dirs_exist_ok=True)
        new.rename(folder)
    return folder


def architectures(place: Place) -> list[str]:
    """The architectures of the devices that are there, as nvcc names them."""
    if place.rehearsed:
        return ["sm_90"]
    import torch

    every = range(torch.cuda.device_count())
    return sorted({"sm_{}{}".format(*torch.cuda.get_device_capability(n)) for n in every})


def _emulate(source: str) -> Row:
    start = time.monotonic()
    emulation.causal_conv1d(sources(_CONV, source))
    return {"seconds": time.monotonic() - start}


def _extension(place: Place, source: str, library: str) -> Row:
    """Build one extension; ninja builds what has changed or was interrupted."""
    if shutil.which("nvcc") is None:
        raise UnavailableError("there is no nvcc on the PATH")
    folder = place.built(source, library)
    wanted = [arch.removeprefix("sm_") for arch in architectures(place)]
    own = {
        "TORCH_CUDA_ARCH_LIST": ";".join(f"{arch[:-1]}.{arch[-1]}" for arch in wanted),
        "MAX_JOBS": f"{os.cpu_count()}",
    }
    name, csrc = EXTENSIONS[library]
    command = [sys.executable, "-m", "ci.gpu.extension", f"{folder}", name, csrc]
    command += ["--rehearse"] if place.rehearsed else []
    start = time.monotonic()
    log = place.out / "build" / f"{source}-{library}-{time.time_ns()}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run(
            command, env=place.environment(source) | own, stdout=file, stderr=subprocess.STDOUT
        )
    if done.returncode:
        raise RuntimeError(f"{log}: {' | '.join(log.read_text().strip().splitlines()[-12:])}")
    return {"seconds": time.monotonic() - start} | _used(place, source, library)


def _used(place: Place, source: str, library: str) -> Row:
    """Say what registers and spills have become, of what was compiled by this run and before."""
    uses: dict[registers.Kernel, registers.Use] = {}
    for log in sorted((place.out / "build").glob(f"{source}-{library}-*.log")):
        # Of each file and architecture there is a part of its own: ninja does not mix them.
        for part in re.split(r"^\[\d+/\d+\] ", log.read_text(), flags=re.MULTILINE):
            uses |= registers.parse("", part)
    spilling = {k: use.spills for k, use in uses.items() if use.spills}
    return {
        "kernels": len(uses),
        "registers": max((use.registers for use in uses.values()), default=0),
        "spilling": len(spilling),
        "spilled": f"{max(spilling.values(), default=0)} B",
    }


def _import(place: Place, source: str) -> Row:
    """Import all of both packages, in a process that has them on its path."""
    names = [name for name, _ in EXTENSIONS.values()]
    code = (STAND_INS.format(names=names) if place.rehearsed else "") + IMPORT
    path = [f"{place.built(source, library)}" for library in LIBRARIES]
    path.append(os.environ.get("PYTHONPATH", ""))
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=place.environment(source) | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return {"seconds": time.monotonic() - start}
