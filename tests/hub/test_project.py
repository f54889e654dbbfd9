"""The projects as kernel-builder reads them."""

import pytest
from hub_kernels import LAYERS, tree
from kernels._rust import Backend, Build


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
