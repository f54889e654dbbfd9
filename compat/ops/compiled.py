"""The native kernels: C++ without torch's headers, compiled on first use and kept in a cache.

The system's compiler makes one small shared library of native/*.cpp, for the vector instructions
that torch itself found in this CPU. Its threads are those of the OpenMP pool that torch has loaded.
A file beside it in the cache holds its length and hash: a torn library would end the process when
it is loaded, so it is made anew. Where the cache cannot be used, each process compiles for itself;
where there is no compiler, or COMPAT_NATIVE=0, the ops run in plain torch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent / "native"
# -ffast-math is left out, so that NaN and infinity go through as they do in torch.
_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math"]
_FLAGS += ["-fopenmp-simd", "-ffp-contract=fast", "-pthread"]
_X86 = {
    "AVX512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "AVX2": ["-march=x86-64-v3"],
}
_SECONDS = 120


class _Unavailable(Exception):
    """Raised where there is no library; says why."""


class View(ctypes.Structure):
    """The struct `View` of native/common.h; it holds no reference to its tensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("stride", ctypes.c_int64 * 4),
        ("is_bf16", ctypes.c_int64),
    )

    @classmethod
    def of(cls, tensor: torch.Tensor | None) -> View:
        """Return the view of a tensor of four dimensions, or of none."""
        if tensor is None:
            return cls()
        strides = (ctypes.c_int64 * 4)(*tensor.stride())
        return cls(tensor.data_ptr(), strides, tensor.dtype == torch.bfloat16)


def library() -> ctypes.CDLL | None:
    """Return the library, built if need be; None where it is not available, see `reason`."""
    return _loaded()[0]


def reason() -> str:
    """Say in one line how the library was built, or why it is not available."""
    return _loaded()[1]


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    try:
        if os.environ.get("COMPAT_NATIVE") == "0":
            raise _Unavailable("COMPAT_NATIVE=0")
        compiler, says = _compiler()
        capability = torch.backends.cpu.get_cpu_capability()
        found, lost = _open(compiler, says, capability)
    except _Unavailable as error:
        return None, str(error)
    openmp = runtime()
    team = None if openmp is None else ctypes.cast(openmp.GOMP_parallel, ctypes.c_void_p)
    found.compat_set_team(team)
    threads = "torch's threads" if team else "threads of its own, as torch's are not OpenMP's"
    return found, f"built by {_first_line(says)}, {capability}, on {threads}{lost}"


def _compiler() -> tuple[list[str], str]:
    """Return the command of the C++ compiler, and what it says about its version."""
    own = os.environ.get("CXX")
    for command in [shlex.split(own)] if own else [["c++"], ["g++"], ["clang++"]]:
        if command and shutil.which(command[0]):
            try:
                return command, _run([*command, "--version"])
            except _Unavailable as error:
                raise _Unavailable(f"{shlex.join(command)} does not run: {error}") from error
    raise _Unavailable(f"no C++ compiler ({own or 'c++, g++ or clang++'}) was found")


def _open(compiler: list[str], says: str, capability: str) -> tuple[ctypes.CDLL, str]:
    """Return the library for this compiler and CPU; compile it unless the cache has it whole.

    Returns:
        The library, and the reason why it is not kept for the next process; empty where it is kept.
    """
    flags = [*_FLAGS, *(_X86.get(capability, []) if platform.machine() == "x86_64" else [])]
    sources = sorted(_FOLDER.glob("*.cpp"))
    key = hashlib.sha256(repr((compiler, says, flags, platform.machine())).encode())
    for path in [*sources, *sorted(_FOLDER.glob("*.h"))]:
        key.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    name = f"native-{key.hexdigest()[:20]}.so"
    try:
        kept = _cache() / name
        if _is_whole(kept):
            return ctypes.CDLL(str(kept)), ""
    except OSError:
        pass  # Unreadable, or where nothing may be loaded from: what keeping it meets is told.
    try:
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch) / name
            try:
                _run([*compiler, *flags, *map(str, sources), "-o", str(made)])
            except _Unavailable as error:
                raise _Unavailable(f"{shlex.join(compiler)} failed: {error}") from error
            if not made.is_file():
                raise _Unavailable(f"{shlex.join(compiler)} failed: it wrote no library")
            try:
                kept = _cache() / name
                _keep(made, kept)
                return ctypes.CDLL(str(kept)), ""
            except OSError as error:
                # A library stays loaded when its file is gone.
                return ctypes.CDLL(str(made)), f", for this process only: {_one_line(error)}"
    except OSError as error:
        raise _Unavailable(f"it cannot be written or loaded: {_one_line(error)}") from error


def _cache() -> Path:
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise FileNotFoundError(f"there is no cache folder: {error}") from error
    return Path(home) / "vertical-chunking"


def _is_whole(library: Path) -> bool:
    """Return whether a cached library has the length and the hash that lie beside it."""
    beside = _beside(library)
    if not library.exists() or not beside.exists():
        return False
    return beside.read_text(errors="replace") == _sum(library.read_bytes())


def _keep(made: Path, kept: Path) -> None:
    """Put a library and its sum into the cache, each of them whole or not at all.

    Several processes may do this at the same time. If the library of one comes to lie beside the
    sum of another, and they differ, the next process makes both anew.
    """
    kept.parent.mkdir(parents=True, exist_ok=True)
    content = made.read_bytes()
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        for target, data in ((kept, content), (_beside(kept), _sum(content).encode())):
            written = Path(scratch) / target.name
            with written.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # The later rename may survive a power cut alone.
            written.replace(target)


def _beside(library: Path) -> Path:
    return library.with_suffix(".sum")


def _sum(content: bytes) -> str:
    return f"{len(content)} {hashlib.sha256(content).hexdigest()}\n"


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise _Unavailable(_first_line(str(error))) from error
    if done.returncode:
        raise _Unavailable(_first_line(done.stderr) or f"exit status {done.returncode}")
    return done.stdout


def _first_line(text: str) -> str:
    """Return the first line that names an error, else the first line."""
    lines = text.strip().splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else "")


def _one_line(error: OSError) -> str:
    return " ".join(str(error).split())


@functools.cache
def runtime() -> ctypes.CDLL | None:
    """Return the OpenMP runtime of torch, if it has GOMP_parallel, as libgomp and libomp do."""
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    for name in (None, str(torch_cpu)):  # A preloaded runtime comes first.
        try:
            found = ctypes.CDLL(name)
        except OSError:
            continue
        if hasattr(found, "GOMP_parallel"):
            return found
    return None
