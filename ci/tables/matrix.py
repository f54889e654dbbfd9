"""Say what compat can do with which releases: `python -m ci.tables.matrix` prints a table.

With `--readme` the table is also written into compat/families/README.md.

Each environment is a virtual environment that takes torch and all else from the one that runs this
program, and brings its own transformers and sentence-transformers. In each, every family is read in
chunks, without padding, with padding on the left, and in rows of mixed lengths; a text is encoded
in chunks; all results are compared with one pass. The exit status is 1 where numbers differ, or
anything but an error of compat is raised (a FutureWarning too); where releases that pyproject.toml
claims cannot encode, or refuse a family other than those of `REFUSED_BEFORE`; or where the newest
releases leave any family untried.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from packaging.requirements import Requirement
from packaging.version import Version

from ci.tables import markers

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
# transformers and sentence-transformers: the oldest and the newest that are claimed, some between,
# and some older ones, which must be refused with a reason.
ENVIRONMENTS = [
    ("5.5.0", "6.2.0"),
    ("5.14.1", "6.2.0"),
    ("5.15.0", "6.2.0"),
    ("5.18.0", "6.2.0"),
    ("5.21.1", "6.2.0"),
    ("5.22.2", "6.1.0"),
    ("5.23.0", "6.2.0"),
    ("5.24.0", "6.2.0"),
]
RIGHT, WRONG, REFUSED, ABSENT = "right", "wrong", "refused", "not in this release"
# The model is there, but its configuration lacks layers that the tests' has, which came later.
UNTRIED = "not tried"
# Types that are refused although claimed, and the release in which that ends.
REFUSED_BEFORE = {
    "qwen4_exp_text": "5.21.1",  # Its cache does not let a row leave the batch; 5.18 was tried.
    "recurrent_gemma": "5.23.0",  # Its cache takes every layer for an attention layer.
}
# The padding of three rows of 36 tokens; it fills whole chunks at the end of two of them.
MIXED_LENGTHS = [0, 9, 27]


def environment(transformers: str, sentence_transformers: str) -> Path:
    """Return the Python of a virtual environment with these releases; make it if it is missing."""
    folder = Path(sys.prefix, "matrix", f"{transformers}-{sentence_transformers}")
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        venv.create(folder, clear=True, with_pip=True, symlinks=True)
        (own,) = folder.glob("lib/*/site-packages")
        base = sysconfig.get_path("purelib")
        (own / "base.pth").write_text(f"import site; site.addsitedir({base!r})\n")
        command = "-m pip install --quiet --disable-pip-version-check --no-warn-conflicts"
        releases = [
            f"transformers=={transformers}",
            f"sentence-transformers=={sentence_transformers}",
            f"torch=={version('torch').partition('+')[0]}",
        ]
        subprocess.run([python, *command.split(), *releases], check=True)
        # It gets its own, even if the environment around it has the same releases now: those may
        # move.
        own_ones = ["--no-deps", "--ignore-installed", *releases[:2]]
        subprocess.run([python, *command.split(), *own_ones], check=True)
        ready.touch()
    return python


def inside() -> dict[str, Any]:
    """Return the results in this environment: the report, each family, and encode."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    import compat
    from compat.families.lookup import FAMILIES

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".* has attention layers")
    # A later release breaks what a release announces by one.
    warnings.filterwarnings("error", category=FutureWarning)
    sys.path.append(str(TESTS))
    status = compat.status()
    return {
        "versions": [library.version for library in status.libraries],
        "reasons": {library.library: library.reason for library in status.libraries},
        "models": {n: model(n) if n in MODEL_MAPPING_NAMES else ABSENT for n in sorted(FAMILIES)},
        "encode": encode(),
    }


def judged(errors: list[float]) -> str:
    """Return `RIGHT`, or how wrong the errors are."""
    import torch

    right: float = importlib.import_module("support.tolerances").CHUNKED[torch.float32]
    # An error that is not a number is not right, and max() would miss it.
    wrong = [error for error in errors if not error <= right]
    return f"{WRONG}, {max(wrong):.1g}" if wrong else RIGHT


def attempted(probe: Callable[[], T]) -> T | str:
    """Return the verdict of a probe, or its error as one."""
    import compat

    try:
        return probe()
    except compat.VerticalChunkingError as error:
        return f"{REFUSED}: {error.found}"
    except Exception as error:
        return f"{WRONG}, {type(error).__name__}: {error}"


def model(name: str) -> str:
    """Return the verdict on a tiny model of a family that is read in chunks."""
    return attempted(partial(_read, name))


def _read(name: str) -> str:
    import torch

    from ci.tables.families import LEFT_PADDING, NO_PADDING, in_chunks
    from compat.installed.recurrent_cache import require_support

    families: Any = importlib.import_module("support.families")
    require_support()
    try:
        tiny = families.tiny_model(name)
    except Exception as error:
        return f"{UNTRIED}, {type(error).__name__}: {error}"
    ids = families.tokens(3, 36)
    errors = []
    for left, right in (
        (NO_PADDING, NO_PADDING),
        (LEFT_PADDING, NO_PADDING),
        (NO_PADDING, MIXED_LENGTHS),
    ):
        found = in_chunks(tiny, ids, left, right)
        for row, hidden, n, m in zip(ids, found, left, right, strict=True):
            real = slice(n, len(row) - m)
            with torch.no_grad():
                whole = tiny(row[None, real], use_cache=False)[0][0]
            errors.append(float((hidden[real] - whole).abs().max()))
    return judged(errors)


def encode() -> str:
    """Return the verdict on a text that a tiny Mamba2 encodes in chunks, with the hooks on."""
    return attempted(_encoded)


def _encoded() -> str:
    import compat

    compat.enable_vertical_chunking()
    embedders: Any = importlib.import_module("support.embedders")
    with tempfile.TemporaryDirectory() as folder:
        model = embedders.embedder(embedders.save_checkpoint(folder))
        text = embedders.text(40)
        whole, widths = model.encode(text), embedders.record_widths(model)
        chunked = model.encode(text, vertical_chunk_size=8)
    if max(widths) > 8:
        return f"{WRONG}: {max(widths)} tokens at once"
    return judged([float(abs(chunked - whole).max())])


def claimed() -> list[Requirement]:
    """Return the requirements of pyproject.toml for transformers and sentence-transformers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {Requirement(line).name: Requirement(line) for line in project["dependencies"]}
    return [found["transformers"], found["sentence-transformers"]]


def faults(found: dict[str, Any]) -> list[str]:
    """List what is wrong in an environment."""
    pairs = zip(claimed(), found["versions"], strict=True)
    supported = [requirement.specifier.contains(version) for requirement, version in pairs]
    newest = found["versions"] == list(ENVIRONMENTS[-1])

    def is_fault(name: str, what: str) -> bool:
        if what.startswith(REFUSED):
            release, until = Version(found["versions"][0]), REFUSED_BEFORE.get(name, "0")
            return newest or (supported[0] and release >= Version(until))
        return what.startswith(WRONG) or (newest and what not in (RIGHT, ABSENT))

    said = {name: what for name, what in found["models"].items() if is_fault(name, what)}
    what = found["encode"]
    if what.startswith(WRONG) or (all(supported) and what != RIGHT):
        said["encode"] = what
    return [f"{' '.join(found['versions'])}: {name}: {what}" for name, what in said.items()]


def row(found: dict[str, Any]) -> str:
    """Write a line of the table."""
    models = {name: what for name, what in found["models"].items() if what != ABSENT}
    right = [name for name in models if models[name] == RIGHT]
    untried = [name for name in models if models[name].startswith(UNTRIED)]
    others = [name for name in models if name not in [*right, *untried]]
    cell = f"{len(right)} of {len(models)}"
    if not right:
        cell = f"none: {found['reasons']['transformers']}"
    else:
        cell += f", not {', '.join(others)}" if others else ""
        cell += f", {UNTRIED}: {', '.join(untried)}" if untried else ""
    said = found["encode"].replace(f"{REFUSED}: ", "no: ") if right else "no"
    cells = [*found["versions"], cell, "yes" if said == RIGHT else said]
    return f"| {' | '.join(cells)} |"


def main(into_file: bool = False) -> int:
    """Print the table, write it if asked to, and return the exit status."""
    lines = [
        "| transformers | sentence-transformers | models, of those it has | encode |",
        "|---|---|---|---|",
    ]
    print(*lines, sep="\n", flush=True)
    wrong = []
    for releases in ENVIRONMENTS:
        run = subprocess.run(
            [environment(*releases), "-m", "ci.tables.matrix", "inside"],
            env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found = json.loads(run.stdout.splitlines()[-1])
        lines.append(row(found))
        print(lines[-1], flush=True)
        wrong += faults(found)
    if into_file:
        markers.put("matrix", "\n".join(lines), markers.MODELS)
    for fault in wrong:
        print(fault, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    if sys.argv[1:] == ["inside"]:
        print(json.dumps(inside()))
    else:
        raise SystemExit(main("--readme" in sys.argv[1:]))
