"""Check that this machine can run the kernels: `python -m ci.gpu` exits with 1 if it cannot."""

from __future__ import annotations

import shutil
import sys

import torch


def missing() -> str | None:
    """Say what is missing for kernels to be built and run, and the remedy; None if nothing is."""
    if torch.version.cuda is None:
        return (
            f"Found torch {torch.__version__}, a build without CUDA; needed: one with CUDA, on a "
            "machine with an NVIDIA GPU. There, `pip install torch` takes such a build."
        )
    if not torch.cuda.is_available():
        return (
            f"Found no CUDA device (torch {torch.__version__}); needed: an NVIDIA GPU of compute "
            "capability 8.0 or more, and its driver. `nvidia-smi` says what the machine has."
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


def main() -> int:
    """Say what is there, or what is missing."""
    if reason := missing():
        print(reason, file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
