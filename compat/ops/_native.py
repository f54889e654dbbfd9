"""The native kernels: C++ without torch's headers, compiled on first use and kept in a cache.

One small shared library is made of native/*.cpp by the system's compiler, for the vector
instructions that torch itself found in this CPU. Its threads are those of the OpenMP pool that
torch has loaded. Where there is no compiler, or COMPAT_NATIVE=0, the ops run in plain torch.
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
# No -ffast-math: NaN and infinity go through as they do in torch.
_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math"]
_FLAGS += ["-fopenmp-simd", "-ffp-contract=fast", "-pthread"]
_X86 = {
    "AVX512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "AVX2": ["-march=x86-64-v3"],
}
_SECONDS = 120


class _Unavailable(Exception):
    """Why there is no library."""


def library() -> ctypes.CDLL | None:
    """The library, built where it is not yet; None where it is not to be had, see `reason`."""
    return _loaded()[0]


def reason() -> str:
    """In one line: how the library was built, or why it is not to be had."""
    return _loaded()[1]


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    try:
        if os.environ.get("COMPAT_NATIVE") == "0":
            raise _Unavailable("COMPAT_NATIVE=0")
        compiler, says = _compiler()
        capability = torch.backends.cpu.get_cpu_capability()
        path = _build(compiler, says, capability)
        try:
            found = ctypes.CDLL(str(path))
        except OSError as error:
            raise _Unavailable(f"{path} cannot be loaded: {_first_line(str(error))}") from error
    except _Unavailable as error:
        return None, str(error)
    team = _team()
    found.compat_set_team(team)
    threads = "torch's threads" if team else "threads of its own, as torch's are not OpenMP's"
    return found, f"built by {_first_line(says)}, {capability}, on {threads}"


def _compiler() -> tuple[list[str], str]:
    """The command of the C++ compiler, and what it says about its version."""
    own = os.environ.get("CXX")
    for command in [shlex.split(own)] if own else [["c++"], ["g++"], ["clang++"]]:
        if command and shutil.which(command[0]):
            try:
                return command, _run([*command, "--version"])
            except _Unavailable as error:
                raise _Unavailable(f"{shlex.join(command)} does not run: {error}") from error
    raise _Unavailable(f"no C++ compiler ({own or 'c++, g++ or clang++'}) was found")


def _build(compiler: list[str], says: str, capability: str) -> Path:
    """The path of the shared library for this compiler and CPU, compiled where it is not yet."""
    flags = [*_FLAGS, *(_X86.get(capability, []) if platform.machine() == "x86_64" else [])]
    sources = sorted(_FOLDER.glob("*.cpp"))
    key = hashlib.sha256(repr((compiler, says, flags, platform.machine())).encode())
    for path in [*sources, *sorted(_FOLDER.glob("*.h"))]:
        key.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise _Unavailable(f"there is no cache folder: {error}") from error
    cache = Path(home) / "vertical-chunking"
    target = cache / f"native-{key.hexdigest()[:20]}.so"
    if target.exists():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Beside the target, and renamed when it is whole: processes may do this at the same time.
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / "native.so"
            _run([*compiler, *flags, *map(str, sources), "-o", str(made)])
            made.replace(target)
    except OSError as error:
        raise _Unavailable(f"{cache} cannot be written: {error}") from error
    except _Unavailable as error:
        raise _Unavailable(f"{shlex.join(compiler)} failed: {error}") from error
    return target


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise _Unavailable(_first_line(str(error))) from error
    if done.returncode:
        raise _Unavailable(_first_line(done.stderr) or f"exit status {done.returncode}")
    return done.stdout


def _first_line(text: str) -> str:
    """The first line that names an error, else the first."""
    lines = text.strip().splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else "")


def _team() -> ctypes.c_void_p | None:
    """GOMP_parallel of the OpenMP runtime that torch runs on, which libgomp and libomp have."""
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    for name in (None, str(torch_cpu)):  # A preloaded runtime comes before torch's own.
        try:
            return ctypes.cast(ctypes.CDLL(name).GOMP_parallel, ctypes.c_void_p)
        except (OSError, AttributeError):
            continue
    return None
