"""All tasks of this repository, each under one short verb: `python3 -m nox -s VERB`."""

import argparse
import os
import re
import shutil
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.options.sessions = ["lint", "tests"]
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True

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
_HOOKS = "stack refusals stored_default workers"
LAWS = [
    *(f"tests/laws/test_{name}.py" for name in ["model", "encode", "released"]),
    *(f"tests/hooks/test_{name}.py" for name in _HOOKS.split()),
    "tests/kernels/test_fused_fork.py",
]


def install(session, *groups, extras="", pins="ci/constraints.txt"):
    """Install the package itself, and dependency groups of pyproject.toml, as pinned.

    torch is named first and exactly, so that a machine that has a wheel of it at hand takes that.
    """
    session.install("-c", pins, "torch")
    wanted = [word for group in groups for word in ("--group", group)]
    session.install("-c", pins, "-e", f".{extras}", *wanted)


@nox.session
def demo(session):
    """Embed real text, whole and in chunks: numbers on the screen, a plot in demo-out/."""
    install(session, "demo")
    session.run("python", "-m", "ci.demo", *session.posargs, env=OFFLINE)


@nox.session
def tests(session):
    """Run all tests that need no GPU, except the slow ones of the kernels."""
    install(session, "tests", extras="[embed]")
    session.run(*PYTEST, "-m", "not slow", *session.posargs, env=OFFLINE | INTERPRET)


@nox.session(default=False)
def forks(session):
    """Build the forks, check that each series is in order, and print the roadmap."""
    install(session, "tests")  # Some items of the roadmap are probed by running tiny models.
    for verb in ["sync", "check", "status"]:
        session.run("python", "-m", "ci.forks", verb, *session.posargs)


@nox.session(name="test-kernels", default=False)
def test_kernels(session):
    """Run and compile the forks' kernels, stock and patched, without a GPU: 20 minutes."""
    install(session, "tests")
    session.run(*PYTEST, "tests/kernels", *session.posargs, env=OFFLINE | INTERPRET)
    if session.posargs:
        return
    # This rehearses test-gpu with a few examples of each law; above they were drawn in full.
    session.run(*PYTEST, "tests/gpu", "-k", "not thorough", env=OFFLINE | INTERPRET)
    tiny = ["--device", "cpu", "--layers", "2", "--hidden-size", "128", "--lengths", "64", "600"]
    session.run("python", "-m", "ci.bench.gpu", *tiny, env=OFFLINE)
    session.run("python", "-m", "ci.kernels.triton_aot")
    if shutil.which("nvcc"):
        for tree in TREES.values():
            session.run(
                "python", "-m", "ci.kernels.registers", tree, "--arch", "sm_80", "sm_90", "sm_100"
            )
    else:
        session.warn("CUDA sources were not compiled for a GPU: there is no nvcc on the PATH")


@nox.session(name="test-futures", default=False)
def test_futures(session):
    """Run models on mutated sources of transformers: each must end exact or refused."""
    install(session, "tests")
    session.run("python", "-m", "ci.futures", *session.posargs, env=OFFLINE)


@nox.session(name="fuzz-tokenizers", default=False)
def fuzz_tokenizers(session):
    """Streamed token ids against those of the whole text, 2,000 cases a kind: 5 minutes."""
    install(session, "tests")
    # Some random tokenizers panic on the whole text too, which is counted.
    quiet = {"RUST_BACKTRACE": "0"}
    session.run("python", "-m", "ci.fuzz", *session.posargs, env=OFFLINE | quiet)


@nox.session(name="test-gpu", default=False)
def test_gpu(session):
    """Test the patched kernels on a machine with a GPU: build, upstream's tests, laws, times."""
    if shutil.which("nvidia-smi") is None:
        session.error(
            "Found no nvidia-smi on the PATH; needed: a machine with an NVIDIA GPU, its driver and "
            "the CUDA toolkit. Without one, `nox -s test-kernels` rehearses this session."
        )
    install(session, "tests", extras="[embed]")
    session.run("python", "-m", "ci.gpu")  # Stops here if torch or the toolkit cannot use the GPU.
    session.run("python", "-m", "ci.forks", "sync")
    build = {"CAUSAL_CONV1D_FORCE_BUILD": "TRUE", "MAMBA_FORCE_BUILD": "TRUE"}
    scratch = Path(session.create_tmp())
    for library, tree in TREES.items():
        copy = scratch / library  # A build in the tree would leave its traces there.
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(tree, copy, ignore=shutil.ignore_patterns(".git"))
        install_kernels = ["--no-build-isolation", "-c", "ci/constraints.txt", f"{copy}"]
        session.install(*install_kernels, env=build)
    for library in TREES:
        # Upstream's own settings are used, not ours, and no model from a hub.
        own = ["-c", os.devnull, "--rootdir", f"{scratch / library}"]
        session.run("pytest", *own, f"{scratch / library}/tests", env=OFFLINE)
    # The laws are about float32, which Triton would round to TF32 in matrix products.
    session.run("pytest", "tests/gpu", env=OFFLINE | {"TRITON_F32_DEFAULT": "ieee"})
    session.run("python", "-m", "ci.bench.gpu", *session.posargs, env=OFFLINE)


@nox.session(name="test-forks", default=False)
def test_forks(session):
    """Test the laws on the forks of transformers and sentence-transformers, without hooks."""
    install(session, "tests", extras="[embed]")
    session.run("python", "-m", "ci.forks", "sync", *NATIVE)
    scratch = Path(session.create_tmp())
    for library in NATIVE:
        copy = scratch / library  # A build in the tree would leave its traces there.
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(f"forks/{library}/tree", copy, ignore=shutil.ignore_patterns(".git"))
        # The fork has the same version as the installed release.
        session.install("--force-reinstall", "--no-deps", "--no-build-isolation", f"{copy}")
    stack = {"VERTICAL_CHUNKING_STACK": "forks"}
    session.run(*PYTEST, *(session.posargs or LAWS), env=OFFLINE | INTERPRET | stack)


@nox.session(name="test-upstream", default=False)
def test_upstream(session):
    """Run upstream's own tests on the releases, on the forks, and on the releases with compat."""
    install(session, "upstream")
    for library in NATIVE:
        session.run("python", "-m", "ci.forks.upstream_tests", library, *session.posargs)


@nox.session(name="test-hub-kernels", default=False)
def test_hub_kernels(session):
    """Test the hub kernels, built from the forks: under transformers' models, and compiled."""
    install(session, "hub", pins="ci/constraints-hub.txt")
    session.run("python", "-m", "ci.forks", "propagate")
    tests = session.posargs or ["tests/hub", "tests/ci/test_hub_kernels.py"]
    session.run(*PYTEST, *tests, env=OFFLINE | INTERPRET)
    if session.posargs:
        return
    for kernel in TREES:
        # These are the kernel's own tests, which find it as they do in kernels-community.
        folder = Path("forks/kernels-community", kernel).absolute()
        local = {"LOCAL_KERNELS": f"kernels-community/{kernel}={folder}/tree"}
        own = ["-c", os.devnull, "--rootdir", f"{folder}", "-m", "kernels_ci"]
        session.run("pytest", *own, f"{folder}/tests", env=OFFLINE | local)
        if shutil.which("nvcc"):
            options = ["--arch", "sm_80", "sm_90"]
            if kernel == "mamba-ssm":  # Its other sources are those of causal-conv1d.
                options += ["--files", "selective*"]
            session.run("python", "-m", "ci.kernels.registers", f"{folder}/tree", *options)
        else:
            session.warn("CUDA sources were not compiled: there is no nvcc on the PATH")


@nox.session(name="test-matrix", default=False)
def test_matrix(session):
    """Try compat on older releases of both libraries, down to those that are too old."""
    install(session, "tests")
    session.run("python", "-m", "ci.tables.matrix", *session.posargs, env=OFFLINE)


@nox.session(name="test-newest", default=False, reuse_venv=False)
def test_newest(session):
    """Say what the newest upstream releases break; to be run weekly; `-- --torch VERSION`."""
    parser = argparse.ArgumentParser(prog="nox -s test-newest --", allow_abbrev=False)
    parser.add_argument("--torch", metavar="VERSION", help="another than the one that is pinned")
    options, arguments = parser.parse_known_args(session.posargs)
    # This is the one pin. Without it pip installs the newest build for CUDA, gigabytes that nothing
    # here uses, and most machines have the pinned one already.
    pinned = re.search("^torch==(.+)$", Path("ci/constraints.txt").read_text(), re.MULTILINE)[1]
    project = nox.project.load_toml("pyproject.toml")
    # By name alone, as pyproject.toml may claim less than what PyPI has.
    wanted = [
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["embed"],
        *nox.project.dependency_groups(project, "tests"),
    ]
    names = sorted({Requirement(line).name for line in wanted} - {"torch"})
    session.install("--upgrade", f"torch=={options.torch or pinned}", *names)
    session.install("--no-deps", "-e", ".")
    session.run("python", "-m", "ci.tables.newest", *arguments, env=OFFLINE | INTERPRET)


@nox.session(default=False)
def downstream(session):
    """Test libraries that call encode, in chunks: LangChain, LlamaIndex, Haystack."""
    install(session, "downstream")
    session.run("pytest", "tests/downstream", *session.posargs, env=OFFLINE)


@nox.session(name="test-fla", default=False)
def test_fla(session):
    """Test models of flash-linear-attention and xlstm, in Triton's interpreter: some minutes."""
    install(session, "tests", extras="[fla,xlstm]")
    files = ["tests/families/test_fla.py", "tests/families/test_xlstm_large.py"]
    session.run("pytest", *files, *session.posargs, env=OFFLINE | INTERPRET)


@nox.session
def lint(session):
    """Check lint, formatting, types, and the workflows."""
    install(session, "lint", extras="[embed]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    workflows = [f"{path}" for path in Path(".github/workflows").glob("*.yml")]
    schema = ["--builtin-schema", "vendor.github-workflows"]  # Built in: no network.
    session.run("check-jsonschema", *schema, *workflows)
    session.run("zizmor", "--offline", *workflows)


@nox.session(name="train-model", default=False)
def train_model(session):
    """Train the default model anew, into model-out/: an hour, on a Debian 12 with apt-get."""
    install(session, "model")
    session.run("python", "-m", "ci.model.data", env=OFFLINE)
    session.run("python", "-m", "ci.model.train", *session.posargs, env=OFFLINE)


@nox.session(name="evaluate-model", default=False)
def evaluate_model(session):
    """Evaluate the default model on text that it never saw, beside its teacher and BM25."""
    install(session, "model")
    session.run("python", "-m", "ci.model.data", env=OFFLINE)
    session.run("python", "-m", "ci.model.evaluate", *session.posargs, env=OFFLINE)


@nox.session(default=False)
def bench(session):
    """Measure time and memory beside released transformers and a transformer; not a test."""
    install(session, "demo")
    session.run("python", "-m", "ci.bench", *session.posargs, env=OFFLINE)
