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

from ci.behaviour import PACKAGES
from ci.forks._release import ROOT

_SANITIZER = re.compile(r"ERROR: (AddressSanitizer: [\w-]+)")
# In the place of what the emulation and the interpreter have not.
_ON_A_CPU = {'"cuda"': '"cpu"', ".cuda()": ""}


def paste(library: str, code: str, tree: Path, *, sanitize: bool = False) -> str:
    """What a reproduction prints, with the sources in `tree`.

    Args:
        library: Name of the fork.
        code: The reproduction.
        tree: Of sources.
        sanitize: Build with the address sanitizer. Its finding is one line more, without addresses.

    Returns:
        Its output; if it ends with an error, the last line of that too.
    """
    path = [tree / PACKAGES[library]] if library in PACKAGES else []
    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT, os.environ.get("PYTHONPATH", "")])),
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if sanitize:
        from ci import emulation

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


def _prepare(library: str, tree: Path, sanitize: bool) -> None:
    """Put the library of a tree where an import finds it."""
    import torch

    torch.set_num_threads(1)
    if library not in ("causal-conv1d", "mamba-ssm"):
        return
    from ci import emulation

    types = [("float", "float")] if sanitize else emulation.TYPES
    if library == "causal-conv1d":
        conv = emulation.causal_conv1d(tree, sanitize=sanitize, types=types)
        package = type(sys)("causal_conv1d")
        vars(package).update(vars(conv))
        sys.modules["causal_conv1d"] = package
        sys.modules |= {f"causal_conv1d.{name}": part for name, part in conv.modules.items()}


def main() -> None:
    """Run the code on stdin."""
    library, tree, *options = sys.argv[1:]
    code = sys.stdin.read()
    if library in ("causal-conv1d", "mamba-ssm"):
        for on_a_gpu, here in _ON_A_CPU.items():
            code = code.replace(on_a_gpu, here)
    _prepare(library, Path(tree), "--sanitize" in options)
    exec(compile(code, "reproduction", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
