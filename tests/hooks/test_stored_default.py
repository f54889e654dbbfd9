"""A model carries its own vertical chunk size: in memory, on disk, with hooks on and off."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from support.embedders import embedder, record_widths, text
from support.tolerances import CHUNKED

import compat

TEXTS = [text(20), text(5)]


def saved_config(folder):
    return json.loads((Path(folder) / "config_sentence_transformers.json").read_text())


def save(model, folder):
    model.save(str(folder), create_model_card=False)
    return str(folder)


def load(folder):
    return SentenceTransformer(folder, device="cpu")


@pytest.mark.parametrize("method", ["encode", "encode_query", "encode_document"])
def test_the_models_own_size_serves_calls_that_name_none(model, method):
    full = getattr(model, method)(TEXTS)
    compat.enable_vertical_chunking()
    model.vertical_chunk_size = 8
    widths = record_widths(model)
    chunked = getattr(model, method)(TEXTS)
    assert widths == [8, 8, 4]
    np.testing.assert_allclose(chunked, full, rtol=0, atol=CHUNKED[torch.float32])


def test_a_call_may_name_another_size(model):
    compat.enable_vertical_chunking()
    model.vertical_chunk_size = 8
    widths = record_widths(model)
    model.encode(TEXTS, vertical_chunk_size=10)
    assert widths == [10, 10]
    assert model.vertical_chunk_size == 8


def test_none_turns_the_default_off(model):
    compat.enable_vertical_chunking()
    assert model.vertical_chunk_size is None
    model.vertical_chunk_size = 8
    model.vertical_chunk_size = None
    widths = record_widths(model)
    model.encode(TEXTS)
    assert widths == [20]


def test_the_default_is_saved_with_the_model_and_loaded_with_it(model, tmp_path):
    compat.enable_vertical_chunking()
    model.vertical_chunk_size = 8
    folder = save(model, tmp_path)
    assert saved_config(folder)["vertical_chunk_size"] == 8
    loaded = load(folder)
    assert loaded.vertical_chunk_size == 8
    widths = record_widths(loaded)
    np.testing.assert_array_equal(loaded.encode(TEXTS), model.encode(TEXTS))
    assert widths == [8, 8, 4]


def test_a_model_without_a_default_is_saved_as_by_the_released_library(model, tmp_path):
    released = saved_config(save(model, tmp_path / "released"))
    compat.enable_vertical_chunking()
    model.vertical_chunk_size = 8
    model.vertical_chunk_size = None
    folder = save(model, tmp_path / "hooked")
    assert saved_config(folder) == released
    assert load(folder).vertical_chunk_size is None


def test_the_released_library_loads_a_model_with_a_default_and_gives_the_same(model, tmp_path):
    full = model.encode(TEXTS)
    with compat.vertical_chunking():
        model.vertical_chunk_size = 8
        folder = save(model, tmp_path)
    loaded = load(folder)
    widths = record_widths(loaded)
    np.testing.assert_array_equal(loaded.encode(TEXTS), full)
    assert widths == [20]


def test_a_default_set_before_the_hooks_is_honoured_with_them(model):
    model.vertical_chunk_size = 8
    compat.enable_vertical_chunking()
    assert model.vertical_chunk_size == 8
    widths = record_widths(model)
    model.encode(TEXTS)
    assert widths == [8, 8, 4]


def test_without_hooks_the_default_is_a_plain_attribute_that_does_nothing(model):
    with compat.vertical_chunking():
        model.vertical_chunk_size = 8
    assert model.vertical_chunk_size == 8
    widths = record_widths(model)
    model.encode(TEXTS)
    assert widths == [20]
    model.vertical_chunk_size = 10
    with compat.vertical_chunking():
        model.encode(TEXTS)
    assert widths == [20, 10, 10]


def test_one_models_default_is_not_anothers(model, mamba2_checkpoint):
    compat.enable_vertical_chunking()
    model.vertical_chunk_size = 8
    assert embedder(mamba2_checkpoint).vertical_chunk_size is None


def test_a_broken_default_set_without_hooks_is_refused_when_it_is_used(model):
    model.vertical_chunk_size = "8"
    compat.enable_vertical_chunking()
    with pytest.raises(ValueError, match="'8'"):
        model.encode(TEXTS)


def test_a_default_that_the_hooks_cannot_serve_is_said_to_be_ignored(model, tmp_path):
    """Save another encoder as a sentence-transformers with `vertical_chunk_size` does."""
    encoder = MultiVectorEncoder(modules=[model[0]], device="cpu")
    folder = Path(save(encoder, tmp_path))
    MultiVectorEncoder(str(folder), device="cpu")
    config = saved_config(folder) | {"vertical_chunk_size": 8}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    compat.enable_vertical_chunking()
    with pytest.warns(UserWarning, match="MultiVectorEncoder is stored with vertical_chunk_size=8"):
        MultiVectorEncoder(str(folder), device="cpu")


# Callers of the model itself instead of its encode.

METHODS = ["encode", "encode_query", "encode_document"]


@pytest.mark.parametrize("call", ["__call__", "forward"])
def test_a_call_of_the_model_that_does_not_follow_the_default_is_told_once(model, call):
    compat.enable_vertical_chunking()
    model.vertical_chunk_size = 8
    features = model.preprocess(TEXTS)
    with pytest.warns(UserWarning, match=r"vertical_chunk_size=8.* 20 tokens at once.*encode"):
        getattr(model, call)({**features})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(model, call)({**features})
    # Another model gets the warning as well.
    other = SentenceTransformer(modules=list(model.children()), device="cpu")
    other.vertical_chunk_size = 10
    with pytest.warns(UserWarning, match="vertical_chunk_size=10"):
        other(input={**features})


def test_a_call_of_the_model_is_not_told_where_there_is_nothing_to_tell(model):
    compat.enable_vertical_chunking()
    features = model.preprocess(TEXTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model({**features})  # It has no default.
        model.vertical_chunk_size = 20
        model({**features})  # It is one chunk.
        model.vertical_chunk_size = 8
        for method in METHODS:
            getattr(model, method)(TEXTS)
        model.train()
        model({**features})["sentence_embedding"].sum().backward()
        model.eval()
        compat.disable_vertical_chunking()
        model({**features})


def test_a_worker_is_not_told_of_a_default_that_its_caller_has_given_up(model, capfd):
    """Expect no warning although the worker's copy of the model still has the default."""
    model.vertical_chunk_size = 8
    pool = model.start_multi_process_pool(["cpu"])
    try:
        with compat.vertical_chunking():
            model.encode(TEXTS, pool=pool)  # This brings the hooks along.
            model.vertical_chunk_size = None
            model.encode(TEXTS, pool=pool)
    finally:
        model.stop_multi_process_pool(pool)
    assert "at once" not in capfd.readouterr().err


@pytest.mark.parametrize("call", ["__call__", "forward"])
def test_a_call_of_the_model_takes_the_size(model, call):
    full = model.encode(TEXTS)
    compat.enable_vertical_chunking()
    model.vertical_chunk_size = 8
    widths = record_widths(model)
    features = model.preprocess(TEXTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = getattr(model, call)(features, vertical_chunk_size=10)["sentence_embedding"]
    assert widths == [10, 10]
    np.testing.assert_allclose(found, full, rtol=0, atol=CHUNKED[torch.float32])


def test_a_call_of_the_model_with_a_size_that_cannot_be_served_is_refused(model):
    compat.enable_vertical_chunking()
    features = model.preprocess(TEXTS)
    with pytest.raises(ValueError, match="at least 1"):
        model({**features}, vertical_chunk_size=0)
    empty = {**features, "attention_mask": features["attention_mask"].clone()}
    empty["attention_mask"][1] = 0
    with pytest.raises(ValueError, match="Row 1 of attention_mask has no token"):
        model(empty, vertical_chunk_size=8)
    model.train()
    with pytest.raises(compat.UnsupportedPipelineError, match="training"):
        model({**features}, vertical_chunk_size=8)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_a_compiled_call_of_the_model_is_what_it_was(model):
    """Use the eager backend, which traces everything and compiles nothing."""
    features = model.preprocess(TEXTS)
    model.compile(backend="eager")
    with torch.no_grad():
        released = model({**features})["sentence_embedding"]
        compat.enable_vertical_chunking()
        with compat.ops.using("released"):
            found = model({**features})["sentence_embedding"]
    torch.testing.assert_close(found, released, rtol=0, atol=0)
    in_chunks = model.encode(TEXTS, vertical_chunk_size=10)
    np.testing.assert_allclose(in_chunks, released, rtol=0, atol=CHUNKED[torch.float32])
