"""Build the extension of a copy of a kernel library: `python -m ci.gpu.extension FOLDER NAME CSRC`.

Upstream's setup.py names nine architectures, of which a machine has one. The flags are its own.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from torch.utils import cpp_extension

from ci.kernels.registers import FLAGS, leave_few


def main() -> int:
    """Build it into the folder, and import it; in a rehearsal torch has no CUDA, and it is not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    parser.add_argument("csrc")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    sources = sorted((options.folder / options.csrc).glob("*.cpp"))
    kernels = sorted((options.folder / options.csrc).glob("*.cu"), key=lambda p: p.stat().st_size)
    # All of them take minutes.
    sources += [_few(kernels[0], options.folder / "few")] if options.rehearse else kernels
    library = options.folder / f"{options.name}.so"
    # Of a run that was stopped; torch would wait for its end.
    (options.folder / "lock").unlink(missing_ok=True)
    stubs = None
    if options.rehearse:
        stubs = _stubs(options.folder / "stubs")
        cpp_extension.CUDA_HOME = _toolkit()  # torch's build for a CPU does not look for it.
    try:
        cpp_extension.load(
            options.name,
            [f"{path}" for path in sources],
            extra_include_paths=[
                f"{options.folder / options.csrc}",
                *([f"{stubs}"] if stubs else []),
            ],
            extra_cflags=["-O3"],
            extra_cuda_cflags=[*FLAGS, "-lineinfo", "--ptxas-options=-v"],
            extra_ldflags=[f"-L{stubs}"] if stubs else [],
            build_directory=f"{options.folder}",
            verbose=True,
        )
    except ImportError as error:
        if not (options.rehearse and library.exists()):
            raise
        print(f"{library} is linked; this torch cannot load it: {error}")
    return 0


def _toolkit() -> str:
    """Return the folder of the CUDA toolkit whose nvcc is on the PATH, which may be a script."""
    command = ["nvcc", "--dryrun", "-c", "x.cu"]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    found = re.search(r"TOP=(.*)", said)
    if found is None:
        raise RuntimeError(f"found no TOP in what {' '.join(command)} prints: {said}")
    return f"{Path(found[1]).resolve()}"


def _few(source: Path, folder: Path) -> Path:
    """Make a copy of a CUDA source with few of its kernels."""
    folder.mkdir(exist_ok=True)
    copy = folder / source.name
    copy.write_text(leave_few(source.read_text()))
    return copy


def _stubs(folder: Path) -> Path:
    """Make what torch's build for a CPU lacks: a header that declares nothing, empty libraries."""
    header = folder / "c10/cuda/impl/cuda_cmake_macros.h"
    header.parent.mkdir(parents=True, exist_ok=True)
    header.touch()
    for name in ("c10_cuda", "torch_cuda"):
        command = ["g++", "-shared", "-x", "c++", "/dev/null", "-o", f"{folder}/lib{name}.so"]
        subprocess.run(command, check=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
