import hashlib
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tolerances import COSINE

import compat
from ci import corpus
from ci.measure import measure
from compat import _default_model
from compat._default_model import FOLDER, WEIGHTS, load_default_model

END, PAD = 0, 1


@pytest.fixture(scope="module")
def model():
    return load_default_model(device="cpu")


@pytest.fixture(scope="module")
def tokenizer(model):
    return model.tokenizer


def digest(model):
    """A hash of all weights."""
    found = hashlib.sha256()
    for name, weight in model.state_dict().items():
        found.update(name.encode() + weight.numpy().tobytes())
    return found.hexdigest()


def test_embeds(model):
    embeddings = model.encode(["a text", "another one", ""], convert_to_tensor=True)
    assert embeddings.shape == (3, 256)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))


def test_chunks_give_the_embedding_of_the_full_pass(model):
    texts = [corpus.text_of_length(9000), ""]
    full = model.encode(texts, convert_to_tensor=True)
    with compat.vertical_chunking():
        chunked = model.encode(texts, vertical_chunk_size=512, convert_to_tensor=True)
    distance = 1 - torch.cosine_similarity(full.double(), chunked.double())
    assert distance.max() <= COSINE[torch.float32]


def digest_of_default_model(_subject):
    torch.manual_seed(5)
    return digest(load_default_model(device="cpu"))


def test_the_weights_are_the_same_in_another_process(model):
    there = measure(int, digest_of_default_model).result
    assert there == digest(model)


def test_the_callers_random_numbers_are_not_touched():
    before = torch.get_rng_state()
    load_default_model(device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_keyword_arguments_reach_sentence_transformers():
    model = load_default_model(device="cpu", model_kwargs={"dtype": torch.bfloat16})
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_weights_in_the_folder_are_loaded_instead(model, tmp_path, monkeypatch):
    folder = tmp_path / "trained"
    shutil.copytree(FOLDER, folder)
    weights = {name: weight + 1 for name, weight in model.transformers_model.state_dict().items()}
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    monkeypatch.setattr(_default_model, "FOLDER", folder)
    monkeypatch.setattr(_default_model, "DEFAULT_MODEL_IS_TRAINED", True)
    loaded = load_default_model(device="cpu").transformers_model.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


@given(text=st.text())
def test_decoding_gives_the_text_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_decoding_gives_real_text_back(tokenizer):
    for text in corpus.topics().values():
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_every_text_ends_with_the_end_token_also_in_a_padded_batch(tokenizer):
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (END, PAD)
    assert tokenizer("")["input_ids"] == [END]
    batch = tokenizer(["", "three of them"], padding=True)
    short, long = batch["input_ids"]
    assert short == [END] + [PAD] * (len(long) - 1)
    assert long[-1] == END
    assert END not in long[:-1]
    assert batch["attention_mask"] == [[1] + [0] * (len(long) - 1), [1] * len(long)]


def test_the_length_of_a_text_has_no_limit(tokenizer):
    text = corpus.long_text()
    assert len(text) > 400_000
    assert len(tokenizer(text)["input_ids"]) > 80_000  # No warning, which would be an error here.


def test_the_corpus_has_texts_of_any_length():
    for length in (0, 1, 2, 999, 600_000):
        assert len(corpus.text_of_length(length)) == length
    assert corpus.text_of_length(5000) == corpus.long_text()[:5000]
