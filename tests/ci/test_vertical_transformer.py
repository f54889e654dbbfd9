"""Models that bring their own modules for vertical chunks: stored, loaded, and saved again."""

import runpy
import sys

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from support.embedders import embedder, record_widths, save_checkpoint, text
from support.tolerances import CHUNKED

import compat
from ci.forks import ROOT
from compat.stream.chunk import Chunk
from compat.stream.pooling import POOLING_MODES
from compat.stream.pooling import TokenStream as Ours

HUB = ROOT / "forks/sentence-transformers/hub"
TEXTS = [text(n) for n in (40, 3, 17, 25, 1)]
store = runpy.run_path(str(HUB / "store.py"))["store"]


@pytest.fixture(autouse=True)
def _own_cache_of_code(tmp_path, monkeypatch):
    code = str(tmp_path / "code")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", code)
    monkeypatch.syspath_prepend(code)
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)


def saved(tmp_path, model_type="mamba2", **options):
    folder = tmp_path / f"saved-{model_type}"
    model = embedder(save_checkpoint(tmp_path / model_type, model_type), **options)
    model.save_pretrained(str(folder), create_model_card=False)
    return folder


def load(folder):
    return SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)


def assert_close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=CHUNKED[torch.float32])


def test_it_is_stored_loaded_and_saved_again(tmp_path):
    folder = saved(tmp_path, pooling=POOLING_MODES)
    wanted = np.stack([load(folder).encode(one) for one in TEXTS])
    store(folder)
    for _ in range(2):
        model = load(folder)
        assert [type(m).__name__ for m in model] == ["VerticalTransformer", "VerticalPooling"]
        assert model.get_model_kwargs() == ["vertical_chunk_size"]
        assert_close(model.encode(TEXTS, vertical_chunk_size=8), wanted)
        np.testing.assert_array_equal([model.encode(one) for one in TEXTS], wanted)
        widths = record_widths(model)
        model.encode(TEXTS, vertical_chunk_size=8)
        assert max(widths) <= 9
        folder = tmp_path / "again"
        model.save_pretrained(str(folder), create_model_card=False)


def test_no_code_is_run_without_leave(tmp_path):
    store(folder := saved(tmp_path))
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(folder), device="cpu")


def test_compat_leaves_it_alone(tmp_path):
    store(folder := saved(tmp_path))
    model = load(folder)
    wanted = model.encode(TEXTS, vertical_chunk_size=8)
    with compat.vertical_chunking(), compat.ops.using("released"):
        np.testing.assert_array_equal(model.encode(TEXTS, vertical_chunk_size=8), wanted)


@pytest.mark.parametrize("model_type", ["mamba", "recurrent_gemma"])
def test_a_model_that_does_not_go_on_from_its_state_is_refused(tmp_path, model_type):
    """Released models of these types do not."""
    store(folder := saved(tmp_path, model_type))
    with pytest.raises(ValueError, match="does not go on exactly from its state"):
        load(folder).encode(TEXTS, vertical_chunk_size=8)


def test_a_model_of_other_modules_is_left_as_it_is(tmp_path):
    folder = saved(tmp_path)
    store(folder)
    before = (folder / "modules.json").read_text()
    with pytest.raises(ValueError, match="VerticalTransformer"):
        store(folder)
    assert (folder / "modules.json").read_text() == before


@pytest.mark.parametrize("prompt_length", [0, 3, 7])
def test_it_pools_as_compat_does(prompt_length):
    """Run both on the same chunks; compat's rows leave when they end, and these do not."""
    theirs = runpy.run_path(str(HUB / "vertical_chunks.py"))["TokenStream"]
    lengths = torch.tensor([9, 8, 20, 13])
    hidden = torch.randn(4, 20, 6)
    hidden[torch.arange(20) >= lengths[:, None]] = torch.nan
    starts = range(0, 20, 6)
    ours = [
        Chunk(
            s, rows := (lengths > s).nonzero()[:, 0], (lengths[rows] - s).clamp(max=6), part[rows]
        )
        for s, part in zip(starts, hidden.split(6, dim=1), strict=True)
    ]
    chunks = zip(starts, hidden.split(6, dim=1), strict=True)
    found = theirs(chunks, lengths).pool(POOLING_MODES, prompt_length)
    torch.testing.assert_close(found, Ours(iter(ours), lengths).pool(POOLING_MODES, prompt_length))
