"""The longer sessions of noxfile.py, and what several of them do.

Nothing here imports what a session installs: it runs in nox's own environment.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import nox
from packaging.requirements import Requirement

# No test and no demo reaches for a model hub.
OFFLINE = {"HF_HUB_OFFLINE": "1"}
# Triton's kernels run on a CPU, in its interpreter.
INTERPRET = {"TRITON_INTERPRET": "1"}
# Tests share the cores; each of them has one thread.
PYTEST = ["pytest", "-n", "auto", "--dist", "worksteal"]
# The patched sources of the kernel libraries, in the order in which they need each other.
TREES = {library: f"forks/{library}/tree" for library in ["causal-conv1d", "mamba-ssm"]}
# The patched libraries that need no compat; tests hold them to the laws without it.
NATIVE = ["transformers", "sentence-transformers"]
_HOOKS = "stack refusals workers"
LAWS = [
    *(f"tests/laws/test_{name}.py" for name in ["model", "encode", "released"]),
    *(f"tests/hooks/test_{name}.py" for name in _HOOKS.split()),
    "tests/kernels/test_fused_fork.py",
]


def install(
    session: nox.Session, *groups: str, extras: str = "", pins: str = "ci/constraints.txt"
) -> None:
    """Install the package itself, and dependency groups of pyproject.toml, as pinned.

    torch is named first and exactly, so that a machine that has a wheel of it at hand takes that.
    """
    session.install("-c", pins, "torch")
    wanted = [word for group in groups for word in ("--group", group)]
    session.install("-c", pins, "-e", f".{extras}", *wanted)


def install_trees(
    session: nox.Session, libraries: Iterable[str], *options: str, env: dict[str, str] | None = None
) -> Path:
    """Install copies of patched trees, and return the folder in which the copies lie."""
    scratch = Path(session.create_tmp())
    for library in libraries:
        copy = scratch / library  # A build in the tree would leave its traces there.
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(f"forks/{library}/tree", copy, ignore=shutil.ignore_patterns(".git"))
        session.install("--no-build-isolation", *options, f"{copy}", env=env)
    return scratch


def install_newest(session: nox.Session, torch: str | None) -> None:
    """Install the newest release of everything but torch, which is the pinned one or `torch`."""
    # Without this pin pip installs the newest build for CUDA, gigabytes that nothing here uses,
    # and most machines have the pinned one already.
    pins = Path("ci/constraints.txt").read_text()
    pinned = re.findall("^torch==(.+)$", pins, re.MULTILINE)
    project = nox.project.load_toml("pyproject.toml")
    # By name alone, as pyproject.toml may claim less than what PyPI has.
    wanted = [
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["embed"],
        *nox.project.dependency_groups(project, "tests"),
    ]
    names = sorted({Requirement(line).name for line in wanted} - {"torch"})
    session.install("--upgrade", f"torch=={torch or pinned[0]}", *names)
    session.install("--no-deps", "-e", ".")


def compile_sources(session: nox.Session, tree: str | Path, architectures: str, *more: str) -> None:
    """Compile the CUDA sources of a tree, and say what registers and spills have become."""
    if shutil.which("nvcc"):
        options = ["--arch", *architectures.split(), *more]
        session.run("python", "-m", "ci.kernels.registers", f"{tree}", *options)
    else:
        session.warn(f"The CUDA sources of {tree} were not compiled: there is no nvcc on the PATH")


def test_kernels(session: nox.Session) -> None:
    """Run the kernels' tests; without arguments rehearse test-gpu and compile, too."""
    install(session, "tests")
    session.run(*PYTEST, "tests/kernels", *session.posargs, env=OFFLINE | INTERPRET)
    if session.posargs:
        return
    gpu_stages(session, "--rehearse")
    session.run("python", "-m", "ci.kernels.triton_aot")
    for tree in TREES.values():
        compile_sources(session, tree, "sm_80 sm_90 sm_100")


def test_gpu(session: nox.Session) -> None:
    """Pack, and run the stages with what is installed here; their tables go on in later runs."""
    if shutil.which("nvidia-smi") is None:
        session.error(
            "Found no nvidia-smi on the PATH; needed: a machine with an NVIDIA GPU, its driver and "
            "the CUDA toolkit. Without one, `nox -s test-kernels` rehearses this session."
        )
    install(session, "tests", extras="[embed]")
    gpu_stages(session, *session.posargs)


def gpu_stages(session: nox.Session, *options: str) -> None:
    """Pack what a machine without a network takes, and run its stages here."""
    folder = Path(session.create_tmp(), "gpu").absolute()
    session.run("python", "-m", "ci.gpu", "pack", "--no-wheels", "--out", f"{folder}")
    # What the emulation has built before is not built again.
    Path("build").mkdir(exist_ok=True)
    if not (folder / "build").exists():
        (folder / "build").symlink_to(Path("build").absolute())
    for stage in ["build", "tests", "kernels", "models", "upstream"]:
        # 3: the time of a stage was spent, and another run of it goes on.
        command = [f"{folder}/run", stage, *options]
        session.run(*command, env=OFFLINE, external=True, success_codes=[0, 3])


def test_forks(session: nox.Session) -> None:
    """Install the forks of transformers and sentence-transformers, and run the laws on them."""
    install(session, "tests", extras="[embed]")
    session.run("python", "-m", "ci.forks", "sync", *NATIVE)
    # A fork has the same version as the installed release.
    install_trees(session, NATIVE, "--force-reinstall", "--no-deps")
    stack = {"VERTICAL_CHUNKING_STACK": "forks"}
    session.run(*PYTEST, *(session.posargs or LAWS), env=OFFLINE | INTERPRET | stack)


def test_hub_kernels(session: nox.Session) -> None:
    """Build the hub kernels and run their tests; without arguments, their own tests and nvcc."""
    install(session, "hub", pins="ci/constraints-hub.txt")
    session.run("python", "-m", "ci.forks", "propagate")
    tests: Sequence[str] = session.posargs or ["tests/hub", "tests/ci/test_hub_kernels.py"]
    session.run(*PYTEST, *tests, env=OFFLINE | INTERPRET)
    if session.posargs:
        return
    for kernel in TREES:
        # These are the kernel's own tests, which find it as they do in kernels-community.
        folder = Path("forks/kernels-community", kernel).absolute()
        local = {"LOCAL_KERNELS": f"kernels-community/{kernel}={folder}/tree"}
        own = ["-c", os.devnull, "--rootdir", f"{folder}", "-m", "kernels_ci"]
        session.run("pytest", *own, f"{folder}/tests", env=OFFLINE | local)
        # The other sources of mamba-ssm are those of causal-conv1d.
        files = ["--files", "selective*"] if kernel == "mamba-ssm" else []
        compile_sources(session, folder / "tree", "sm_80 sm_90", *files)


def test_newest(session: nox.Session) -> None:
    """Install the newest of everything, and print what is to be done."""
    parser = argparse.ArgumentParser(prog="nox -s test-newest --", allow_abbrev=False)
    parser.add_argument("--torch", metavar="VERSION", help="another than the one that is pinned")
    options, arguments = parser.parse_known_args(session.posargs)
    install_newest(session, options.torch)
    session.run("python", "-m", "ci.tables.newest", *arguments, env=OFFLINE | INTERPRET)


def bench(session: nox.Session) -> None:
    """Run the benchmark; without arguments that choose, those beside it, too."""
    install(session, "demo")
    session.run("python", "-m", "ci.bench", *session.posargs, env=OFFLINE)
    if not {*session.posargs} <= {"--readme", "--smoke"}:
        return
    for part in ["chunk_sizes", "short_texts", "training"]:
        session.run("python", "-m", f"ci.bench.{part}", *session.posargs, env=OFFLINE)
    # Last, as released transformers takes fla wherever it is, which runs on no CPU.
    install(session, "bench", extras="[fla]")
    only = ["--only", "rwkv7-float32", "rwkv7-bfloat16"]
    session.run("python", "-m", "ci.bench", *only, *session.posargs, env=OFFLINE)
