"""Sizes of chunks that the user leaves open: the fastest, or what fits into a memory."""

import json

import numpy as np
import pytest
import torch
from support.embedders import record_widths, text
from support.tolerances import CHUNKED

import compat
from compat.stream import chunk_size

CPU = torch.device("cpu")


@pytest.fixture
def of_eight(monkeypatch):
    monkeypatch.setattr(chunk_size, "FASTEST", 8)


def test_auto_is_a_size_of_the_device():
    assert chunk_size.settled("auto", CPU) == chunk_size.FASTEST
    assert chunk_size.settled("auto", torch.device("cuda")) == chunk_size.ELSEWHERE
    assert chunk_size.settled(7, CPU) == 7
    with pytest.raises(ValueError, match="auto"):
        chunk_size.settled("fast", CPU)
    with pytest.raises(TypeError, match="int"):
        chunk_size.settled(7.0, CPU)


def test_encode_and_its_kin_take_auto(model, of_eight):
    long = text(20)
    full = model.encode(long)
    compat.enable_vertical_chunking()
    widths = record_widths(model)
    found = [model.encode(long, vertical_chunk_size="auto")]
    reader = compat.Reader(model, vertical_chunk_size="auto")
    reader.append(long)
    found.append(reader.embedding())
    found.append(compat.encode_spans(model, long, [(0, len(long))], vertical_chunk_size="auto")[0])
    for each in found:
        np.testing.assert_allclose(each, full, rtol=0, atol=CHUNKED[torch.float32])
    assert widths[:3] == [8, 8, 4]
    assert max(widths) == 8  # A reader reads what is behind the last seam apart.


def test_a_plain_model_takes_auto(model, of_eight):
    ids = torch.arange(3, 23)[None]
    given = {"input_ids": ids, "vertical_chunk_size": "auto"}
    backbone = model.transformers_model
    assert [start for start, _ in compat.iter_chunks(backbone, **given)] == [0, 8, 16]
    with torch.no_grad():
        full = backbone(ids).last_hidden_state[:, -1]
    found = compat.last_hidden_state(backbone, **given)
    torch.testing.assert_close(found, full, rtol=0, atol=CHUNKED[torch.float32])


def test_auto_is_a_default_that_is_saved(model, of_eight, tmp_path):
    compat.enable_vertical_chunking()
    model.vertical_chunk_size = "auto"
    model.save(str(tmp_path), create_model_card=False)
    config = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    assert config["vertical_chunk_size"] == "auto"
    loaded = type(model)(str(tmp_path), device="cpu")
    widths = record_widths(loaded)
    loaded.encode(text(20))
    assert widths == [8, 8, 4]
    with pytest.raises(ValueError, match="auto"):
        model.vertical_chunk_size = "fast"


def test_the_peak_is_that_of_the_tensors_which_are_held_together():
    with chunk_size._peak() as peak:
        first = torch.empty(1000)
        second = torch.empty(3000)
        del first, second
        view = torch.empty(2000)[:10]
    assert peak[0] == 4000 * 4
    assert len(view) == 10


def test_a_chunk_of_the_size_fits_into_the_memory(model):
    backbone, family = chunk_size.backbone_of(model.transformers_model)
    assert compat.fastest_chunk_size(model) == chunk_size.FASTEST
    most = None
    for size in (256, 512, 1024):
        ids = torch.zeros(2, size, dtype=torch.int64)
        with torch.no_grad(), chunk_size._peak() as peak:
            family.forward(backbone, ids, 0, None)
        # What a chunk takes besides its tokens' tensors is small.
        found = compat.fastest_chunk_size(model, memory=int(1.1 * peak[0]), batch_size=2)
        assert found == size
        most = most or peak[0]
    assert compat.fastest_chunk_size(backbone, memory=10**12) == chunk_size.FASTEST
    with pytest.raises(ValueError, match="smaller batch_size"):
        compat.fastest_chunk_size(model, memory=most // 2, batch_size=2)


def test_a_model_that_is_not_supported_is_refused():
    with pytest.raises(compat.UnsupportedModelError):
        compat.fastest_chunk_size(torch.nn.Linear(2, 2))
