"""Say where the stages run: the packed folder, its sources and builds, and the device."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from ci import forks

# The libraries whose kernels are built, in the order in which they need each other.
LIBRARIES = ("causal-conv1d", "mamba-ssm")
SOURCES = ("stock", "patched")
ON_CPU = "rehearsed on a CPU: nothing was run on a GPU, and no time says anything"


@dataclass(frozen=True)
class Place:
    """A packed folder, and how its stages run.

    Attributes:
        root: The folder.
        also: Where results are written besides, if anywhere.
        rehearsed: On a CPU, with tiny sizes.
    """

    root: Path
    also: Path | None
    rehearsed: bool

    @property
    def out(self) -> Path:
        """The folder of results, beside what was built, to be gone on from."""
        return self.root / "out"

    @property
    def device(self) -> str:
        """The device of the tensors, for torch."""
        return "cpu" if self.rehearsed else "cuda"

    def built(self, source: str, library: str) -> Path:
        """The folder of a built copy of a library's sources, to be put on Python's path."""
        return self.root / "built" / ("cpu" if self.rehearsed else "gpu") / source / library

    def environment(self, source: str) -> dict[str, str]:
        """Return the environment of a process that imports the kernels of `source`."""
        # In a rehearsal they cannot be imported: what is emulated is put in their place.
        path = [] if self.rehearsed else [f"{self.built(source, one)}" for one in LIBRARIES]
        own = {
            "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]),
            "HF_HUB_OFFLINE": "1",
            # The laws are about float32, which Triton would round to TF32 in matrix products.
            "TRITON_F32_DEFAULT": "ieee",
            # What was compiled and tuned once is taken by later stages, and by a run that goes on.
            "TRITON_CACHE_DIR": str(self.root / "built" / "triton"),
            "TRITON_CACHE_AUTOTUNING": "1",
            # pytest's processes would share the one device, and what is a core each elsewhere.
            "PYTEST_XDIST_AUTO_NUM_WORKERS": "0",
        }
        if self.rehearsed:
            own |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        return os.environ | own

    def fork(self, library: str) -> forks.Fork:
        """The fork of a library; on a GPU its tests run by themselves."""
        fork = forks.Fork.read(library, self.root)
        return fork if self.rehearsed else dataclasses.replace(fork, run_by={})

    @functools.cached_property
    def packed(self) -> dict[str, Any]:
        """The notes that `pack` made.

        Raises:
            FileNotFoundError: This is no packed folder.
        """
        path = self.root / forks.PACKED
        if not path.is_file():
            raise FileNotFoundError(
                f"Found no {path}; needed: a folder that `python -m ci.gpu pack --out FOLDER` "
                "made, whose `run` runs the stages."
            )
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    @property
    def requests(self) -> list[forks.RequestTests]:
        """The pull requests and the tests that they bring."""
        return [forks.RequestTests(**one) for one in self.packed["requests"]]

    @functools.cached_property
    def machine(self) -> dict[str, str]:
        """The machine that the results are from."""
        import torch

        names = ["torch", "triton", "transformers", "sentence-transformers"]
        return {
            "device": ON_CPU if self.rehearsed else torch.cuda.get_device_name(),
            "date": f"{date.today()}",
            "packed": f"{self.packed['made']}, {self.packed['commit']}, {self.packed['contents']}",
            "python": platform.python_version(),
            **{name: _version(name) for name in names},
            "nvcc": _said("nvcc", "--version", pattern="release"),
            "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }

    @property
    def title(self) -> str:
        """The machine, in a line."""
        named = ("torch", "triton", "date")
        return f"{self.machine['device']}; " + ", ".join(f"{n} {self.machine[n]}" for n in named)


def sources(library: str, source: str) -> Path:
    """The sources of a library, by one of SOURCES."""
    return forks.stock(library) if source == "stock" else forks.patched(library)


def missing() -> str | None:
    """Say what is missing for kernels to be built and run, and the remedy; None if nothing is."""
    import torch

    if torch.version.cuda is None:
        return (
            f"Found torch {torch.__version__}, a build without CUDA; needed: one with CUDA, on a "
            "machine with an NVIDIA GPU. There, `pip install torch` takes such a build. With "
            "--rehearse the stages run on a CPU."
        )
    if not torch.cuda.is_available():
        return (
            f"Found no CUDA device (torch {torch.__version__}); needed: an NVIDIA GPU of compute "
            "capability 8.0 or more, and its driver. `nvidia-smi` says what the machine has. With "
            "--rehearse the stages run on a CPU."
        )
    if torch.cuda.get_device_capability() < (8, 0):
        return (
            f"Found {torch.cuda.get_device_name()}, of compute capability "
            f"{'.'.join(map(str, torch.cuda.get_device_capability()))}; needed: 8.0 or more."
        )
    if shutil.which("nvcc") is None:
        return (
            "Found no nvcc on the PATH; needed: the CUDA toolkit, of the version of torch's CUDA "
            f"({torch.version.cuda}), to build the kernels. Install it, or add it to the PATH."
        )
    return None


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _said(*command: str, pattern: str = "") -> str:
    """Return the first line of what a command prints that has the pattern; "none" without it."""
    if shutil.which(command[0]) is None:
        return "none"
    run = subprocess.run(command, capture_output=True, text=True)
    return next((line.strip() for line in run.stdout.splitlines() if pattern in line), "none")
