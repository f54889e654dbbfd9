"""The projects as kernel-builder reads them, and the builds as `kernels info` does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from kernels._rust import Backend, Build
from support.hub_kernels import LAYERS, tree


@pytest.mark.parametrize("name", LAYERS)
def test_build_toml_is_valid(name):
    assert Build.open(tree(name)).general.backends == [Backend.CPU, Backend.CUDA]


@pytest.mark.parametrize(
    ("old", "new"),
    [("edition = 5", "edition = 6"), ('"cuda"]', '"cuba"]'), ("depends = [", "depend = [")],
)
def test_what_is_wrong_in_it_would_be_found(old, new, tmp_path):
    text = (tree("mamba-ssm") / "build.toml").read_text()
    assert old in text
    (tmp_path / "build.toml").write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=r"build\.toml"):
        Build.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "version", "licence", "needs"),
    [("mamba-ssm", 6, "Apache-2.0", ["einops"]), ("causal-conv1d", 2, "BSD-3-Clause", [])],
)
def test_kernels_info_describes_the_build(name, version, licence, needs):
    program = Path(sys.executable).with_name("kernels")
    command = [program, "info", "--json", str(tree(name))]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert found["name"] == name
    assert found["version"] == version
    assert found["license"] == licence
    assert found["python_depends"] == needs
    assert found["backends"] == ["cpu"]  # Nothing of CUDA is built here.
