"""A model for the jobs, and a folder of its own for each test, whose paths are then short."""

import pytest
from support.embedders import embedder, save_checkpoint


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Make the folder of a tiny Mamba2 embedder with one token for each character."""
    folder = tmp_path_factory.mktemp("embedder")
    embedder(save_checkpoint(folder / "checkpoint"), pooling="lasttoken").save(str(folder / "it"))
    return str(folder / "it")


@pytest.fixture(autouse=True)
def _inside_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
