"""Compare registers and spills of every CUDA kernel of a fork, before and after its patches.

    folder=forks/causal-conv1d
    python -m ci.kernels.registers $folder/stock $folder/tree --arch sm_80 sm_90

compiles the .cu files of both trees and prints a Markdown table of what differs. The exit status is
1 when fewer blocks of a kernel that both have fit on a multiprocessor, or as many although more is
spilled, and when nvcc fails. With one tree it only compiles that: all files, but not all types and
sizes (`leave_few`), which is minutes instead of an hour; with --full all of them.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

# The flags that upstream's setup.py gives to nvcc, as far as they change code.
FLAGS = [
    "-O3",
    "-std=c++20",
    "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_BFLOAT16_OPERATORS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-U__CUDA_NO_BFLOAT162_OPERATORS__",
    "-U__CUDA_NO_BFLOAT162_CONVERSIONS__",
    "--expt-relaxed-constexpr",
    "--expt-extended-lambda",
    "--use_fast_math",
]

# A multiprocessor of sm_80 to sm_100 has this many registers. They are given to a warp in units of
# 256, and so to a thread in units of 8.
REGISTERS = 65536
UNIT = 8


class Kernel(NamedTuple):
    """An instantiation: `name`, its `types` (input, weight), and its other template arguments."""

    file: str
    name: str
    types: str
    arguments: tuple[str, ...]


class Use(NamedTuple):
    """The registers of a thread, and the bytes that it spills (stores and loads)."""

    registers: int
    spills: int


def parse(file: str, log: str) -> dict[Kernel, Use]:
    """Read from the output of `ptxas -v` what each kernel of one .cu file uses."""
    found = re.findall(
        r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        log,
        re.DOTALL,
    )
    mangled = "\n".join(name for name, *_ in found)
    names = subprocess.run(
        ["c++filt"], input=mangled, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    result = {}
    for name, (_, stores, loads, registers) in zip(names, found, strict=True):
        match = re.match(r"(?:void )?(\w+)(?:<(.*)>)?\(", name)
        if not match:
            raise ValueError(f"found no kernel's name in {name!r}, which c++filt gave")
        parameters = (match[2] or "").replace("c10::", "").replace("complex<float>", "complex")
        words = [w for w in re.split(r"[<>, ]+", parameters) if w]
        types = [w for w in words if w in ("float", "Half", "BFloat16", "complex")]
        others = tuple(w for w in words if re.fullmatch(r"\d+|true|false", w))
        kernel = Kernel(file, match[1], "/".join(types), others)
        if kernel in result:
            raise ValueError(f"found {kernel} twice in {file}; tell them apart in `parse`")
        result[kernel] = Use(int(registers), int(stores) + int(loads))
    return result


def leave_few(text: str) -> str:
    """Return a source with fewer instantiations, in which each line of it is still compiled.

    The file's first type of inputs remains, with weights in float and complex. Of the selective
    scan, which has kernels for several lengths of rows, those for the shortest remain: they have
    the least code, as their loops are unrolled.
    """
    first = re.search(r"^template void \w+<([\w:]+)", text, re.M)
    if first:
        kept = rf"{first[1]}(?:, (?:float|complex_t))?>"
        text = re.sub(rf"^template void \w+<(?!{kept}).*;$", "", text, flags=re.M)
    launch = r"\bselective_scan_\w+_launch<(\d+), (\d+), [^;]*;"
    blocks = [(int(threads), int(items)) for threads, items in re.findall(launch, text)]
    return re.sub(
        launch,
        lambda match: match[0] if (int(match[1]), int(match[2])) == min(blocks) else ";",
        text,
    )


def compile_tree(
    tree: Path, archs: list[str], *, files: str = "*.cu", full: bool = True
) -> dict[str, dict[Kernel, Use]]:
    """Compile the .cu files below `tree`/csrc, or `tree`; return their kernels by architecture.

    Args:
        tree: the sources of a fork, or of a hub kernel.
        archs: sm_80 and others.
        files: a pattern for the names of the files.
        full: compile all instantiations; else those that `leave_few` leaves.

    Raises:
        RuntimeError: nvcc's message.
    """
    import torch

    headers = Path(torch.__file__).parent / "include"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "csrc")
        whole = tree / "csrc" if (tree / "csrc").exists() else tree
        shutil.copytree(whole, folder)
        sources = [path for path in sorted(folder.rglob(files)) if path.suffix == ".cu"]
        if not sources:
            raise RuntimeError(f"found no .cu file {files} below {whole}; need a source tree")
        for path in [] if full else folder.rglob("*.cu*"):
            path.write_text(leave_few(path.read_text()))
        # The CPU build of torch lacks a header that holds no declaration.
        stub = Path(scratch) / "c10/cuda/impl/cuda_cmake_macros.h"
        stub.parent.mkdir(parents=True)
        stub.touch()
        folders = [
            Path(scratch),
            headers,
            headers / "torch/csrc/api/include",
            Path(sysconfig.get_path("include")),
        ]

        def compile_one(job: tuple[Path, str]) -> dict[Kernel, Use]:
            source, arch = job
            command = ["nvcc", *FLAGS, f"-arch={arch}", "-cubin", "-Xptxas", "-v"]
            command += [f"-I{folder}" for folder in folders]
            command += ["-o", str(Path(scratch) / f"{source.stem}-{arch}.cubin"), str(source)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            return parse(source.name, done.stderr)

        jobs = [(source, arch) for source in sources for arch in archs]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = list(pool.map(compile_one, jobs))
    uses: dict[str, dict[Kernel, Use]] = {arch: {} for arch in archs}
    for (_, arch), kernels in zip(jobs, results, strict=True):
        uses[arch] |= kernels
    return uses


def predecessor(kernel: Kernel, before: dict[Kernel, Use]) -> Kernel | None:
    """Return the kernel of `before` that `kernel` stands for.

    A patch may add template arguments at the end; false means what was there before it.
    """
    arguments = kernel.arguments
    while True:
        candidate = kernel._replace(arguments=arguments)
        if candidate in before:
            return candidate
        if not arguments or arguments[-1] != "false":
            return None
        arguments = arguments[:-1]


def blocks(kernel: Kernel, use: Use) -> int:
    """Return how many blocks fit on a multiprocessor, by registers alone.

    The first template argument is the number of threads in a block.
    """
    threads = int(kernel.arguments[0]) if kernel.arguments else 1024
    return REGISTERS // (-(-use.registers // UNIT) * UNIT * threads)


def is_worse(kernel: Kernel, before: Use, after: Use) -> bool:
    """Return whether fewer blocks fit, or as many although more is spilled."""
    fit, fitted = blocks(kernel, after), blocks(kernel, before)
    return fit < fitted or (fit == fitted and after.spills > before.spills)


def _text(use: Use) -> str:
    return f"{use.registers}" + (f" + {use.spills} B spilled" if use.spills else "")


def table(arch: str, before: dict[Kernel, Use], after: dict[Kernel, Use]) -> tuple[str, int]:
    """Return a Markdown table of the changes on `arch`, and how many kernels are worse."""
    pairs = {kernel: predecessor(kernel, before) for kernel in after}
    kept = [(old, kernel) for kernel, old in pairs.items() if old]
    equal = sum(before[old] == after[new] for old, new in kept)
    worse = [(old, new) for old, new in kept if is_worse(old, before[old], after[new])]
    rows: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
    for kernel, old in pairs.items():
        was = _text(before[old]) if old else "new"
        if old and before[old] == after[kernel]:
            continue
        mark = " **worse**" if (old, kernel) in worse else ""
        key = (kernel.name, ", ".join(kernel.arguments), was, _text(after[kernel]) + mark)
        rows[key].append(kernel.types)
    gone = len(set(before) - {old for old, _ in kept})
    lines = [
        f"### {arch}",
        "",
        f"{len(kept)} kernels are in both trees, {equal} of them unchanged and {len(worse)} worse; "
        f"{len(after) - len(kept)} are new, {gone} are gone.",
        "",
        "| kernel | template arguments | input/weight | before | after |",
        "|---|---|---|---|---|",
    ]
    for (name, arguments, was, now), types in sorted(rows.items()):
        lines.append(f"| {name} | {arguments} | {', '.join(sorted(types))} | {was} | {now} |")
    return "\n".join(lines), len(worse)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "trees", nargs="+", type=Path, help="before and after; one: only compile it"
    )
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90"])
    parser.add_argument("--files", default="*.cu", help="a pattern of the files' names: '*fp32*'")
    parser.add_argument("--full", action="store_true", help="all types and sizes of one tree")
    options = parser.parse_args()
    if len(options.trees) > 2:
        parser.error(f"found {len(options.trees)} trees; need one or two")
    try:
        uses = [
            compile_tree(
                tree,
                options.arch,
                files=options.files,
                full=options.full or len(options.trees) == 2,
            )
            for tree in options.trees
        ]
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    if len(uses) == 1:
        for arch in options.arch:
            print(f"{options.trees[0]}: {len(uses[0][arch])} kernels compile for {arch}")
        return 0
    worse = 0
    for arch in options.arch:
        text, count = table(arch, uses[0][arch], uses[1][arch])
        print(text, end="\n\n")
        worse += count
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
