"""Turn CUDA sources into a Python extension for the CPU: rewrite three things, build with g++."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

HERE = Path(__file__).parent
BUILD = HERE.parents[2] / "build" / "emulation"

# The headers that CUDA sources include, and the one of ours that stands in for each.
HEADERS = {
    "cuda_bf16.h": "cuda.h",
    "cuda_fp16.h": "cuda.h",
    "c10/cuda/CUDAException.h": "cuda.h",
    "c10/cuda/CUDAStream.h": "cuda.h",
    "cub/block/block_load.cuh": "cub.h",
    "cub/block/block_store.cuh": "cub.h",
    "cub/block/block_reduce.cuh": "cub.h",
    "ATen/cuda/Atomic.cuh": "cub_scan.h",
    "c10/cuda/CUDAGuard.h": "cub_scan.h",
    "cub/block/block_raking_layout.cuh": "cub_scan.h",
    "cub/block/block_scan.cuh": "cub_scan.h",
    "cub/config.cuh": "cub_scan.h",
    "cub/util_ptx.cuh": "cub_scan.h",
    "cub/util_type.cuh": "cub_scan.h",
    "cuda/std/type_traits": "cub_scan.h",
    "torch/extension.h": "torch.h",
    "torch/python.h": "torch.h",
}

FLAGS = [
    "-std=c++20",
    "-fPIC",
    "-g1",
    "-fno-strict-aliasing",  # Kernels cast what they load.
    "-fno-gnu-unique",  # Each build has its own state, even two in one process.
]
SANITIZE = [
    "-fsanitize=address,bounds",
    "-fno-sanitize-recover=bounds",
    "-fno-omit-frame-pointer",
]


class Unavailable(RuntimeError):
    """Raised where this machine lacks something that the emulation needs."""


def compiler() -> str:
    """Return the path of g++, or raise `Unavailable`."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    if not found:
        raise Unavailable("found no g++; the emulation compiles CUDA sources with it: install g++")
    if not (Path(torch.__file__).parent / "include/torch/extension.h").exists():
        raise Unavailable(
            f"torch {torch.__version__} has no C++ headers; install a wheel from PyPI"
        )
    return found


def rewrite(text: str, path: Path) -> str:
    """Replace CUDA's own syntax, launches and `__shared__` arrays, by function calls.

    Raises:
        ValueError: a launch or a `__shared__` that is written in a way not understood here.
    """
    code = re.sub(r'//[^"\n]*$', "", text, flags=re.MULTILINE)
    code = re.sub(
        r"\b(\w+)\s*<<<([^;<>]*(?:<[^;<>]*>[^;<>]*)?)>>>\s*\(",
        r"emulation::launch(\1, \2)(",
        code,
    )
    code = re.sub(
        r"\bextern\s+__shared__\s+(\w+)\s+(\w+)\s*\[\s*\]\s*;",
        r"auto &\2 = emulation::shared_dynamic<\1>();",
        code,
    )
    code = re.sub(
        r"\b__shared__\s+((?:typename\s+)?[\w:]+)\s+(\w+)\s*((?:\[[^;\]]*\])*)\s*;",
        r"auto &\2 = emulation::shared<\1\3>([] {});",
        code,
    )
    for syntax, pattern in (("a launch", "<<<"), ("a declaration", r"\b__shared__\b")):
        left = re.search(pattern, code)
        if left:
            number = code[: left.start()].count("\n") + 1
            line = code.splitlines()[number - 1].strip()
            raise ValueError(f"{path}:{number}: {syntax} that is not understood: {line!r}")
    code = code.replace(".is_cuda()", ".is_cpu()")
    return f'#line 1 "{path.name}"\n{code}'


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text(text)
        temporary.replace(path)


@contextmanager
def _making(target: Path) -> Iterator[Path | None]:
    """Yield a path at which to make a file that other processes may make too; None if it exists.

    A file that has been loaded is never replaced: a second load would be another library, with a
    state of its own.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            yield None
            return
        temporary = target.with_suffix(f".{os.getpid()}{target.suffix}")
        yield temporary
        temporary.replace(target)


def _instantiate(text: str, wanted: list[tuple[str, str]]) -> str:
    """Replace explicit instantiations of other (input, weight) types by functions that raise."""

    def choose(match: re.Match[str]) -> str:
        if (match[2], match[3]) in wanted:
            return match[0]
        body = f'{{ emulation::fail("not built for <{match[2]}, {match[3]}>"); }}'
        return f"template <> {match[1]}<{match[2]}, {match[3]}>{match[4]} {body}"

    pattern = r"^template (void \w+)<([\w:]+), ([\w:]+)>(\([^)]*\));"
    return re.sub(pattern, choose, text, flags=re.MULTILINE)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def build(
    name: str,
    csrc: Path,
    types: list[tuple[str, str]],
    sanitize: bool,
    replace: dict[str, str],
) -> Path:
    """Compile all sources in `csrc` to the extension `name`; reuse what was compiled before.

    Args:
        name: the extension's name for Python.
        csrc: a folder with .cu, .cuh, .cpp and .h files.
        types: (input, weight) C++ types of the instantiations that are built.
        sanitize: with the address sanitizer and bounds checks; needs `sanitizer_environment`.
        replace: file name to the text that stands in for what the file has, for mutants.

    Returns:
        The path of the shared object.

    Raises:
        Unavailable: no g++, no headers of torch, no sanitizer.
        ValueError: a source that cannot be rewritten.
        RuntimeError: the compiler's message.
    """
    gxx = compiler()
    if sanitize and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        raise Unavailable("a sanitized build needs a process with sanitizer_environment()")
    include = Path(torch.__file__).parent / "include"
    sources = {
        p.name: p for p in sorted(csrc.iterdir()) if p.suffix in (".cu", ".cuh", ".cpp", ".h")
    }
    texts = {n: rewrite(replace.get(n, p.read_text()), p) for n, p in sources.items()}
    stand_ins = {h: s for h, s in HEADERS.items() if any(h in text for text in texts.values())}
    own = {n: (HERE / n).read_text() for n in {"cuda.h", *stand_ins.values()}}
    flags = [
        *FLAGS,
        *(SANITIZE if sanitize else []),
        f"-DTORCH_EXTENSION_NAME={name}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    headers = {n: t for n, t in texts.items() if n.endswith((".h", ".cuh"))}
    key = _digest(headers, sorted(own.items()), stand_ins, flags, torch.__version__, gxx)
    folder = BUILD / f"headers-{key}"
    for header, text in headers.items():
        _write(folder / header, text)
    for header, stand_in in stand_ins.items():
        _write(folder / header, f'#include "{HERE / stand_in}"\n')

    units = {n: text for n, text in texts.items() if n not in headers}
    units = {n: _instantiate(t, types) if n.endswith(".cu") else t for n, t in units.items()}
    units["runtime.cpp"] = (HERE / "runtime.cpp").read_text()
    includes = [folder, HERE, include, include / "torch/csrc/api/include"]
    includes.append(Path(sysconfig.get_path("include")))
    jobs = []
    for unit, text in units.items():
        # Compiling is most of the total time, and fibers are most of the run time.
        level = "-O2" if unit == "runtime.cpp" else "-O0"
        command = [gxx, *flags, level, *(f"-I{path}" for path in includes), "-c"]
        jobs.append((BUILD / f"{unit}-{_digest(key, text, level)}.o", text, command))
    jobs.sort(key=lambda job: -len(job[1]))

    def compile_one(job: tuple[Path, str, list[str]]) -> None:
        target, text, command = job
        source = target.with_suffix(".cpp")
        with _making(target) as temporary:
            if temporary:
                _write(source, text)
                _run([*command, str(source), "-o", str(temporary)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, jobs))

    objects = [str(target) for target, _, _ in jobs]
    library = BUILD / _digest(objects) / f"{name}.so"
    lib = Path(torch.__file__).parent / "lib"
    command = [gxx, "-shared", *(SANITIZE if sanitize else []), *objects, "-Wl,-Bsymbolic"]
    command += [f"-L{lib}", f"-Wl,-rpath,{lib}", "-ltorch_python", "-ltorch", "-ltorch_cpu"]
    with _making(library) as temporary:
        if temporary:
            _run([*command, "-lc10", "-ldl", "-o", str(temporary)])
    return library
