"""All tasks of this repository, each under one short verb: `python3 -m nox -s VERB`."""

import sys
from pathlib import Path

import nox

# The command `nox` does not import from here by itself.
sys.path.insert(0, f"{Path(__file__).parent}")

from ci import sessions
from ci.sessions import INTERPRET, NATIVE, OFFLINE, PYTEST, install

nox.options.sessions = ["lint", "tests"]
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True


@nox.session
def demo(session):
    """Embed real text, whole and in chunks: numbers on the screen, a plot in demo-out/."""
    install(session, "demo")
    session.run("python", "-m", "ci.demo", *session.posargs, env=OFFLINE)


@nox.session(name="demo-states", default=False)
def demo_states(session):
    """Search inside a book by passages in context, and embed a log at every line: a minute."""
    install(session, "demo")
    session.run("python", "-m", "ci.demo_states", env=OFFLINE)


@nox.session
def tests(session):
    """Run all tests that need no GPU, except the slow ones of the kernels."""
    install(session, "tests", extras="[embed]")
    session.run(*PYTEST, "-m", "not slow", *session.posargs, env=OFFLINE | INTERPRET)


@nox.session(default=False)
def forks(session):
    """Build the forks, hold each request to its page, and print the roadmap: 40 minutes."""
    install(session, "tests")  # Some items of the roadmap are probed by running tiny models.
    for verb in ["sync", "check", "status"]:
        session.run("python", "-m", "ci.forks", verb, *session.posargs)


@nox.session(name="test-kernels", default=False)
def test_kernels(session):
    """Run and compile the forks' kernels, stock and patched, without a GPU: 20 minutes."""
    sessions.test_kernels(session)


@nox.session(name="test-futures", default=False)
def test_futures(session):
    """Run models on mutated sources of transformers: each must end exact or refused."""
    install(session, "tests")
    session.run("python", "-m", "ci.futures", *session.posargs, env=OFFLINE)


@nox.session(name="fuzz-tokenizers", default=False)
def fuzz_tokenizers(session):
    """Hold streamed token ids to those of the whole text, in 2,000 cases a kind: 5 minutes."""
    install(session, "tests")
    # Some random tokenizers panic on the whole text too, which is counted.
    quiet = {"RUST_BACKTRACE": "0"}
    session.run("python", "-m", "ci.fuzz", *session.posargs, env=OFFLINE | quiet)


@nox.session(name="test-gpu", default=False)
def test_gpu(session):
    """Build, test and measure the kernels on a machine with a GPU, as in `python -m ci.gpu`."""
    sessions.test_gpu(session)


@nox.session(name="test-forks", default=False)
def test_forks(session):
    """Test the laws on the forks of transformers and sentence-transformers, without hooks."""
    sessions.test_forks(session)


@nox.session(name="test-upstream", default=False)
def test_upstream(session):
    """Run upstream's own tests on the releases, on the forks, and on the releases with compat."""
    install(session, "upstream")
    for library in NATIVE:
        session.run("python", "-m", "ci.forks.upstream_tests", library, *session.posargs)


@nox.session(name="test-hub-kernels", default=False)
def test_hub_kernels(session):
    """Test the hub kernels, built from the forks: under transformers' models, and compiled."""
    sessions.test_hub_kernels(session)


@nox.session(name="test-matrix", default=False)
def test_matrix(session):
    """Try compat on older releases of both libraries, down to those that are too old."""
    install(session, "tests")
    session.run("python", "-m", "ci.tables.matrix", *session.posargs, env=OFFLINE)


@nox.session(name="test-newest", default=False, reuse_venv=False)
def test_newest(session):
    """Say what the newest upstream releases break; to be run weekly; `-- --torch VERSION`."""
    sessions.test_newest(session)


@nox.session(default=False)
def downstream(session):
    """Test libraries that call encode, in chunks: LangChain, LlamaIndex, Haystack."""
    install(session, "downstream")
    session.run("pytest", "tests/downstream", *session.posargs, env=OFFLINE)


@nox.session(name="test-ray", default=False)
def test_ray(session):
    """Embed on a local Ray of two actors, kill them and the driver, and carry on: some minutes."""
    install(session, "ray", extras="[embed,ray]")
    # On a small machine Ray takes the memory of others for its own.
    quiet = {"RAY_memory_monitor_refresh_ms": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    session.run("pytest", "-m", "ray", "tests/jobs", *session.posargs, env=OFFLINE | quiet)


@nox.session(name="test-fla", default=False)
def test_fla(session):
    """Test models of flash-linear-attention and xlstm, in Triton's interpreter: some minutes."""
    install(session, "tests", extras="[fla,xlstm]")
    files = [f"tests/families/test_{name}.py" for name in ["fla", "fla_rwkv", "xlstm_large"]]
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


@nox.session(default=False, reuse_venv=False)
def bench(session):
    """Measure time and memory beside released transformers and a transformer; not a test."""
    sessions.bench(session)
