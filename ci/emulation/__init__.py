"""CUDA kernels that run on a CPU: compiled by g++ from their own sources, and checked as they run.

    from ci import emulation, forks

    conv = emulation.causal_conv1d(forks.stock("causal-conv1d"))
    out = conv.causal_conv1d_fn(x, weight, bias, activation="silu")  # CPU tensors
    with emulation.order("random", seed=1):
        out.sum().backward()

**What it is.** A block's threads are fibers (ucontext), which run one at a time until they wait at
a barrier or for their warp; blocks run one after the other. `cuda.h` has what a kernel sees of
CUDA, `cub.h` and `cub_scan.h` what it sees of CUB, with CUB's own use of shared memory and its
barriers; `runtime.cpp` schedules. Sources are compiled as they are, but for what C++ cannot
express: launches and `__shared__` declarations become function calls, `.is_cuda()` becomes
`.is_cpu()`. The tree's Python package is loaded on top, stock and patched in one process. Built
are float, half and bfloat16 inputs with float weights or weights of their own type; others raise.

**What it finds.** It raises a RuntimeError that names kernel, block and thread for
- barriers and shuffles that not all threads reach, or at different places;
- vector accesses that are misaligned, as a fault on a GPU would be;
- launches beyond CUDA's limits: grid, block, shared memory;
- writes beside a shared array, or beside a tensor made by `guarded` or by the package itself.
Shared memory and the package's `torch.empty` are NaN until written, so that a read too early is
seen in the result. Threads and blocks run in order, in reverse, or at random with some warps
starved (`order`): a missing barrier shows in at least one of them; the tests remove each barrier
of the kernels to prove it. `sanitize=True` builds with the address sanitizer and bounds checks of
g++: it ends the process at the first access outside of a tensor or array; see
`sanitizer_environment`.

**What it cannot find.** Fibers do not interleave between barriers, there is no memory model and no
second block at the same time: races within such a stretch show only where an order tried makes a
difference, races between blocks never. Floating point is g++'s: no fused multiply-add, expf from
libm. Nothing is said about registers, compilation by nvcc, or speed.

**How to extend it.** A header that a source includes needs a line in `_build.HEADERS`; what it
declares goes into one of ours. Mutants: pass `replace`, with `emulation::mutant(n)` in the text,
and switch by `mutant(n)`. Objects are kept in build/emulation by a hash of all that goes in.
"""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from ci.emulation import _build, _load
from ci.emulation._build import Unavailable
from ci.emulation._load import guarded

__all__ = [
    "Unavailable",
    "causal_conv1d",
    "guarded",
    "mutant",
    "order",
    "sanitizer_environment",
]

FLOAT, HALF, BFLOAT16 = "float", "at::Half", "at::BFloat16"
TYPES = ((FLOAT, FLOAT), (HALF, FLOAT), (BFLOAT16, FLOAT), (HALF, HALF), (BFLOAT16, BFLOAT16))
ORDERS = ("forward", "reverse", "random")


@contextmanager
def order(name: Literal["forward", "reverse", "random"], seed: int = 0) -> Iterator[None]:
    """The order in which a block's threads run, for the time of the context."""
    if name not in ORDERS:
        raise ValueError(f"found order {name!r}; need one of {', '.join(ORDERS)}")
    before = _load.set_order(ORDERS.index(name), seed)
    try:
        yield
    finally:
        _load.set_order(*before)


@contextmanager
def mutant(number: int) -> Iterator[None]:
    """The fault that is on in kernels built with `emulation::mutant(n)`; else none is."""
    _load.set_mutant(number)
    try:
        yield
    finally:
        _load.set_mutant(0)


def sanitizer_environment() -> dict[str, str]:
    """What the environment of a Python needs that loads a package with `sanitize=True`."""
    libraries = []
    for name in ("libasan.so", "libstdc++.so.6"):  # the second, so that exceptions are found
        command = [_build.compiler(), f"-print-file-name={name}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        libraries.append(done.stdout.strip())
    if not all(Path(library).is_absolute() for library in libraries):
        raise Unavailable("found no libasan.so; install the address sanitizer of g++")
    # Python and torch keep memory to the end; new and delete are torch's before ours.
    options = "detect_leaks=0:alloc_dealloc_mismatch=0"
    return {"LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": options}


def causal_conv1d(
    tree: Path,
    *,
    sanitize: bool = False,
    types: Sequence[tuple[str, str]] = TYPES,
    replace: Mapping[str, str] | None = None,
) -> Any:
    """The Python package `causal_conv1d` of a source tree, on CPU tensors.

    Args:
        tree: causal-conv1d's sources, stock or patched.
        sanitize: build with the address sanitizer; needs `sanitizer_environment`.
        types: the (input, weight) types to build.
        replace: source file name to the text that is compiled in its stead.

    Returns:
        A namespace with every public function of the package, its modules by name as `modules`,
        and the extension as `causal_conv1d_cuda`. Without triton, the varlen module is missing.

    Raises:
        Unavailable: no g++, no headers of torch, no sanitizer.
        ValueError: a source has CUDA syntax that is not understood.
        RuntimeError: the sources do not compile.
    """
    library = _build.build(
        "causal_conv1d_cuda", tree / "csrc", list(types), sanitize, dict(replace or {})
    )
    extension = _load.load_extension("causal_conv1d_cuda", library)
    # torch knows an op by its name: each load has names of its own.
    namespace = _load.unique("DaoAILab_emulated")
    folder = tree / "causal_conv1d"
    names = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    if not importlib.util.find_spec("triton"):
        names.discard("causal_conv1d_varlen")
    with _load.INTERPRET:
        modules = _load.load_package(
            folder,
            {"causal_conv1d_cuda": extension},
            sorted(names, key=lambda name: (name != "cpp_functions", name)),  # imported by others
            lambda text: text.replace('"DaoAILab"', f'"{namespace}"'),
        )
    public = SimpleNamespace(modules=modules, causal_conv1d_cuda=extension)
    for name, module in modules.items():
        if name == "causal_conv1d_varlen":
            module.causal_conv1d_varlen_states = _load.interpreted(  # type: ignore[attr-defined]
                module.causal_conv1d_varlen_states
            )
        for key, value in vars(module).items():
            if key.startswith("causal_conv1d") and callable(value):
                setattr(public, key, value)
    return public
