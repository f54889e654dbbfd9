"""Pack all that a machine with a GPU needs, and that it cannot fetch, into one folder."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ci import forks
from ci.gpu.place import LIBRARIES

LIMIT = 60_000_000
OURS = ("ci", "compat", "tests", "pyproject.toml", "LICENSE")
# What compat and the tests need; their own needs come along.
WHEELS = ("transformers", "sentence-transformers", "pytest", "hypothesis", "einops", "ninja")
# Models that are measured, and that are not installed here.
EXTRA = ("flash-linear-attention==0.6.0", "fla-core==0.6.0")
# What the machine has, with what these need.
PROVIDED = "torch triton numpy scipy scikit-learn"
# Upstream's tests that its sdist lacks, so that they are not packed either.
LEFT_OUT = {
    "mamba-ssm": [
        "tests/ops/test_selective_scan.py",
        "tests/ops/triton/test_ssd.py",
    ]
}
_TRACES = shutil.ignore_patterns(
    ".git", "__pycache__", "*.egg-info", "*.so", "build", "*.pyc", ".*_cache"
)
RUN = """#!/bin/sh
# Run a stage: `./run STAGE [--rehearse]`; `./run --help` names the stages.
set -e
[ -z "$OUT" ] || OUT=$(realpath -m "$OUT")
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python3}
if [ ! -d site ]; then
    # Beside what is installed, which stays as it is.
    rm -rf site.new
    mkdir site.new
    if [ -d wheels ]; then
        "$PYTHON" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile \\
            --target site.new wheels/*.whl
    fi
    mv site.new site
fi
PATH="$PWD/site/bin:$PATH"
export OUT PATH HF_HUB_OFFLINE=1 PYTHONPATH="$PWD/site:$PWD" PYTHONDONTWRITEBYTECODE=1
exec "$PYTHON" -m ci.gpu run "$@"
"""


def pack(out: Path, python: str, *, wheels: bool = True) -> int:
    """Make the folder; it must not be there, or be one that this made.

    Args:
        out: The folder.
        python: The version of Python on the machine, as 3.12, for the wheels that are compiled.
        wheels: Take along the releases that compat needs; False where the machine has them.

    Returns:
        Its size in bytes.

    Raises:
        FileExistsError: There is something else.
        RuntimeError: pip cannot fetch a wheel, or the folder is too large for some machines.
    """
    if out.exists() and not (out / forks.PACKED).exists():
        raise FileExistsError(f"Found {out}, which is no packed folder; needed: a new one.")
    for old in ("built", *OURS, "forks", "site", "wheels"):
        shutil.rmtree(out / old, ignore_errors=True)
    for name in OURS:
        _copy(forks.ROOT / name, out / name)
    requests = []
    for library in LIBRARIES:
        folder = out / "forks" / library
        _copy(forks.stock(library), folder / "stock")
        _copy(forks.patched(library), folder / "tree")
        _copy(forks.ROOT / "forks" / library / "fork.toml", folder / "fork.toml")
        requests += forks.request_tests(library)
    if wheels:
        _fetch(out / "wheels", python)
    digest = hashlib.sha256()
    carried = [
        path for one in (*OURS, "forks", "wheels") for path in [out / one, *(out / one).rglob("*")]
    ]
    for path in sorted(path for path in carried if path.is_file()):
        digest.update(f"{path.relative_to(out)}".encode() + path.read_bytes())
    packed = {
        "made": f"{date.today()}",
        "commit": _commit(),
        "contents": digest.hexdigest()[:12],
        "python": python if wheels else "any, without wheels",
        "left_out": LEFT_OUT,
        "requests": [dataclasses.asdict(one) for one in requests],
    }
    (out / forks.PACKED).write_text(json.dumps(packed, indent=1))
    (out / "run").write_text(RUN)
    (out / "run").chmod(0o755)
    size = sum(path.stat().st_size for path in carried if path.is_file())
    if size > LIMIT:
        raise RuntimeError(f"{out} has {size / 1e6:.1f} MB; needed: at most {LIMIT / 1e6:.0f}.")
    return size


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=_TRACES, dirs_exist_ok=True)
    else:
        shutil.copy(source, target)


def _commit() -> str:
    """The commit of this repository; what a tarball has none of is "unknown"."""
    command = ["git", "describe", "--always", "--dirty"]
    run = subprocess.run(command, cwd=forks.ROOT, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def _fetch(folder: Path, python: str) -> None:
    """Fetch the wheels, in the versions that are installed here, and all that they need."""
    command = ["-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", python]
    for platform in ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"):
        command += ["--platform", platform]
    command += ["-d", f"{folder}", *EXTRA, *sorted(_needed(python))]
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{run.stdout}{run.stderr}")


def _needed(python: str) -> set[str]:
    """Return WHEELS and what they need, as installed here, without PROVIDED."""
    there = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    found: set[str] = set()
    todo = list(WHEELS)
    while todo:
        name = canonicalize_name(todo.pop())
        if name in PROVIDED.split() or any(line.startswith(f"{name}==") for line in found):
            continue
        found.add(f"{name}=={importlib.metadata.version(name)}")
        needs = map(Requirement, importlib.metadata.requires(name) or [])
        todo += [one.name for one in needs if not one.marker or one.marker.evaluate(there)]
    return found
