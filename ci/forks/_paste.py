"""The reproduction of a request, run on a tree of sources, on a CPU.

    python -m ci.forks._paste LIBRARY TREE [--sanitize] < CODE

runs code that a maintainer pastes on a machine with a GPU. causal-conv1d's kernels run on the
emulation, those of mamba-ssm in Triton's interpreter and on the emulation, all else as it is.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ci.forks._release import ROOT
from ci.forks.behaviour import PACKAGES

_SANITIZER = re.compile(r"ERROR: (AddressSanitizer: [\w-]+)")
# In the place of what the emulation and the interpreter have not.
_ON_A_CPU = {'"cuda"': '"cpu"', ".cuda()": ""}


def paste(library: str, code: str, tree: Path, *, sanitize: bool = False) -> str:
    """Say what a reproduction prints, with the sources in `tree`.

    Args:
        library: Name of the fork.
        code: The reproduction.
        tree: Of sources.
        sanitize: Build with the address sanitizer. Its finding is one line more, without addresses.

    Returns:
        Its output; if it ends with an error, the last line of that too.
    """
    path = [tree / PACKAGES.get(library, "."), ROOT, os.environ.get("PYTHONPATH", "")]
    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if sanitize:
        from ci.kernels import emulation

        environment |= emulation.sanitizer_environment()
    command = [sys.executable, "-P", "-m", __name__, library, str(tree)]
    run = subprocess.run(
        [*command, *(["--sanitize"] if sanitize else [])],
        env=os.environ | environment,
        input=code,
        capture_output=True,
        text=True,
    )
    found = _SANITIZER.search(run.stderr) if sanitize else None
    if found:
        return f"{run.stdout}{found[1]}\n"
    # An error may be what it is to show.
    ended = f"{run.stderr.strip().rpartition(chr(10))[2]}\n" if run.returncode else ""
    return run.stdout + ended


def _causal_conv1d(tree: Path, sanitize: bool) -> dict[str, Any]:
    """The modules of causal-conv1d, with its kernels emulated."""
    from ci.kernels import emulation

    types = [("float", "float")] if sanitize else emulation.TYPES
    conv = emulation.causal_conv1d(tree, sanitize=sanitize, types=types)
    modules = {f"causal_conv1d.{name}": part for name, part in conv.modules.items()}
    return {"causal_conv1d": conv} | modules


def _selective_scan(tree: Path) -> dict[str, Any]:
    """The modules of Mamba-1, with its kernels for rows of up to 128 tokens emulated."""
    from ci.kernels.emulation import selective_scan

    types = [("float", "float"), ("float", "complex_t")]
    scan = selective_scan.selective_scan(tree, types=types, sizes=[(32, 4)])
    packages = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.modules")
    modules = {"ops.selective_scan_interface": scan, "modules.mamba_simple": scan.mamba_simple}
    named = {f"mamba_ssm.{name}": module for name, module in modules.items()}
    return {name: ModuleType(name) for name in packages} | named


def _mamba2(tree: Path) -> dict[str, Any]:
    """The modules of Mamba-2 in Triton's interpreter, with the convolution in plain torch."""
    from ci.kernels import interpreter
    from ci.kernels.emulation import selective_scan

    modules = ("modules.mamba2", "utils.generation")
    scan = selective_scan.when_used(tree)  # By the references.
    ops = interpreter.mamba_ssm(tree, modules=modules, selective_scan_cuda=scan)
    found: dict[str, Any] = ops.imported
    return found


def main() -> None:
    """Run the code on stdin."""
    library, tree, *options = sys.argv[1:]
    code = sys.stdin.read()
    if library == "causal-conv1d":
        sys.modules |= _causal_conv1d(Path(tree), "--sanitize" in options)
    elif library == "mamba-ssm":
        of_mamba1 = "selective_scan" in code or "mamba_simple" in code
        sys.modules |= (_selective_scan if of_mamba1 else _mamba2)(Path(tree))
    if library in ("causal-conv1d", "mamba-ssm"):
        for on_a_gpu, here in _ON_A_CPU.items():
            code = code.replace(on_a_gpu, here)
    exec(compile(code, "reproduction", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
