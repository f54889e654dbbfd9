"""The README and the other texts: the example prints what they say, and what they name is there."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support.embedders import record_widths

import compat

ROOT = Path(compat.__file__).parents[1]
TEXTS = [
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("*/*/*.md")]
    if not {"tree", "stock"} & set(path.relative_to(ROOT).parts)
]
# The texts in forks/ speak of upstream's files.
OWN = [path for path in TEXTS if "forks" not in path.parts]


def name_of(path):
    return str(path.relative_to(ROOT))


def test_the_first_example_prints_what_stands_below_it():
    code, printed = re.search(
        r"```python\n([\s\S]*?)```\n\n((?:    .*\n)+)", (ROOT / "README.md").read_text()
    ).groups()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout == re.sub("^    ", "", printed, flags=re.MULTILINE), run.stderr


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_files_that_a_text_links_to_are_there(path):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", OWN, ids=name_of)
def test_files_and_modules_that_a_text_names_are_there(path):
    text = path.read_text()
    for name in re.findall(r"`((?:compat|ci|tests|forks|patches)/[\w./-]+)`", text):
        assert "LIBRARY" in name or (ROOT / name).exists(), name
    for name in re.findall(r"python3? -m (ci[.\w]+|compat[.\w]*)", text):
        assert find_spec(name.rstrip(".")), name


def test_the_example_of_training_trains(tmp_path, monkeypatch):
    """Run it on two short texts of several chunks, smaller ones than "auto" takes."""
    pytest.importorskip("datasets")
    (code,) = re.findall(r"```python\n(from datasets[\s\S]*?)```", (ROOT / "README.md").read_text())
    code = code.replace('"auto"', "16").replace(
        'report_to="none"', 'report_to="none", use_cpu=True'
    )
    monkeypatch.chdir(tmp_path)
    with compat.vertical_chunking():
        model = compat.load_default_model(device="cpu")
        before = [parameter.clone() for parameter in model.parameters()]
        widths = record_widths(model)
        exec(code, {"model": model, "texts": ["for and while " * 20, "a class is a type " * 20]})
    assert max(widths) <= 17
    assert len(widths) > 10
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(moved)
