"""Requests that cannot be honoured raise and say what was found; odd but legal ones are exact."""

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.modules import (
    CNN,
    LSTM,
    Pooling,
    WeightedLayerPooling,
    WordWeights,
)
from support.embedders import character_tokenizer, embedder, record_widths, save_checkpoint, text
from support.families import tiny_model
from support.stack import FORKS, released_only
from support.tolerances import CHUNKED
from tokenizers import normalizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import compat

WIDTH = 32  # The hidden size of the tiny models.
TOKENS = "token_embeddings"
IDS = torch.arange(3, 13)[None].repeat(2, 1)


@pytest.fixture(autouse=True)
def _hooks_on():
    compat.enable_vertical_chunking()


@pytest.fixture(scope="module")
def ending_checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("ending"), end_of_text=True)


def assert_close(chunked, full):
    np.testing.assert_allclose(chunked, full, rtol=0, atol=CHUNKED[torch.float32])


# The chunk size.

PLACES = {
    "encode": lambda model, size: model.encode(["abc"], vertical_chunk_size=size),
    "encode_query": lambda model, size: model.encode_query(["abc"], vertical_chunk_size=size),
    "encode_document": lambda model, size: model.encode_document(["abc"], vertical_chunk_size=size),
    "iter_chunks": lambda model, size: compat.iter_chunks(
        model.transformers_model, input_ids=IDS, vertical_chunk_size=size
    ),
    "last_hidden_state": lambda model, size: compat.last_hidden_state(
        model.transformers_model, input_ids=IDS, vertical_chunk_size=size
    ),
    "the model's default": lambda model, size: setattr(model, "vertical_chunk_size", size),
}


@released_only
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("size", "error", "found"),
    [
        (0, ValueError, "found 0"),
        (-1, ValueError, "found -1"),
        (1.5, TypeError, "found 1.5 of type float"),
        (512.0, TypeError, "found 512.0 of type float"),
        (True, TypeError, "found True of type bool"),
        ("512", ValueError, "found '512'"),
    ],
)
def test_a_size_that_is_no_positive_int_is_refused(model, place, size, error, found):
    widths = record_widths(model)
    with pytest.raises(error, match=f"vertical_chunk_size must be .*{found}"):
        PLACES[place](model, size)
    assert not widths
    assert model.vertical_chunk_size is None


@pytest.mark.parametrize("length", [1, 2, 3, 20])
def test_chunks_of_one_token_are_exact(model, length):
    for layer in model.transformers_model.layers:
        layer.mixer.time_step_limit = (0.0, 0.05)  # Released models ignore it for one token.
    texts = [text(length), text(7)]
    assert_close(model.encode(texts, vertical_chunk_size=1), model.encode(texts))


# Texts.


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"output_value": "token_embeddings"},
        {"output_value": None},
    ],
)
def test_no_texts_give_what_the_released_library_gives(model, arguments):
    released = model.encode([], **arguments)
    chunked = model.encode([], vertical_chunk_size=4, **arguments)
    assert type(chunked) is type(released)
    assert len(chunked) == len(released) == 0
    if not isinstance(released, list):
        assert (chunked.dtype, chunked.shape) == (released.dtype, released.shape)


@released_only
@pytest.mark.parametrize("output_value", ["sentence_embedding", "token_embeddings"])
def test_an_empty_text_is_named_before_any_other_is_embedded(model, output_value):
    widths = record_widths(model)
    texts = ["abc", text(30), "", "d"]
    with pytest.raises(ValueError, match=r"Text 2 is ''.*no token.*Leave it out"):
        model.encode(texts, vertical_chunk_size=4, batch_size=1, output_value=output_value)
    assert not widths


def drop_z(model):
    """Let the tokenizer make no token of z."""
    model.tokenizer._tokenizer.normalizer = normalizers.Replace("z", "")


@pytest.mark.parametrize(
    "texts",
    [
        ["zz"],
        ["zz", "abc"],
        [{"text": ""}],
        [{"text": ""}, {"text": "abc"}],
        [("", "")],
        [("", ""), ("abc", "d")],
    ],
    ids=str,
)
def test_an_input_of_any_kind_without_a_token_is_refused(model, texts):
    drop_z(model)
    with pytest.raises(ValueError, match="no token"):
        model.encode(texts, vertical_chunk_size=4)


@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_empty_text_that_the_tokenizer_ends_has_an_embedding(ending_checkpoint, empty):
    model = embedder(ending_checkpoint)
    texts = [empty, text(9)]
    assert_close(model.encode(texts, vertical_chunk_size=4), model.encode(texts))


def test_an_empty_text_behind_a_prompt_has_an_embedding(model):
    texts = ["", text(9)]
    chunked = model.encode(texts, prompt="query: ", vertical_chunk_size=4)
    assert_close(chunked, model.encode(texts, prompt="query: "))


@pytest.mark.parametrize("pooling", ["cls", "lasttoken", "mean", "weightedmean"])
def test_a_text_of_one_token_is_exact(mamba2_checkpoint, pooling):
    model = embedder(mamba2_checkpoint, pooling=pooling)
    assert_close(model.encode("a", vertical_chunk_size=4), model.encode("a"))


def test_a_text_of_200_000_tokens_does_not_depend_on_its_chunks(mamba2_checkpoint):
    model = embedder(mamba2_checkpoint, pooling=("mean", "lasttoken"))
    very_long = text(200_000)
    # The last chunk has 1344 tokens, or 5: too few to tell the state that comes before them.
    one, other = (model.encode(very_long, vertical_chunk_size=size) for size in (2048, 1005))
    assert_close(one, other)
    assert not np.allclose(one[WIDTH:], model.encode(very_long[-5:])[WIDTH:], atol=1e-2)


# Arguments of encode.


def test_an_unknown_keyword_raises_as_in_the_released_library(model):
    compat.disable_vertical_chunking()
    with pytest.raises(ValueError, match="vertical_chunk_sise") as released:
        model.encode(["abc"], vertical_chunk_sise=4)
    compat.enable_vertical_chunking()
    with pytest.raises(ValueError, match="vertical_chunk_sise") as hooked:
        model.encode(["abc"], vertical_chunk_sise=4)
    assert str(hooked.value) == str(released.value)


@pytest.mark.parametrize("method", ["encode", "encode_query", "encode_document"])
def test_an_unknown_keyword_beside_a_chunk_size_raises(model, method):
    with pytest.raises(ValueError, match=r"does not use: \['unknown'\]"):
        getattr(model, method)(["abc"], vertical_chunk_size=4, unknown=1)


@pytest.mark.parametrize(
    "arguments", [{"precision": "int3"}, {"batch_size": 0}, {"prompt_name": "unknown"}]
)
def test_what_the_released_library_refuses_is_refused(model, arguments):
    with pytest.raises(ValueError, match=r"int3|batch_size|unknown"):
        model.encode(["abc"], vertical_chunk_size=4, **arguments)


# Modules.


class HalvedPooling(Pooling):
    def forward(self, features, **kwargs):
        features = super().forward(features, **kwargs)
        features["sentence_embedding"] = features["sentence_embedding"] / 2
        return features


class RenamedPooling(Pooling):
    """A subclass that changes nothing about the forward."""


class ShiftedDense(Dense):
    def forward(self, features):
        features[TOKENS] = features[TOKENS].roll(1, dims=1)
        return features


CANNOT_STREAM = {
    "CNN": lambda: CNN(WIDTH, WIDTH),
    "LSTM": lambda: LSTM(WIDTH, WIDTH // 2),
    "WeightedLayerPooling": lambda: WeightedLayerPooling(WIDTH, 2, 1),
    "WordWeights": lambda: WordWeights(["a", "b"], {"a": 2.0}),
    "ShiftedDense": lambda: ShiftedDense(WIDTH, WIDTH, module_input_name=TOKENS),
    "Dense": lambda: Dense(
        WIDTH, WIDTH, module_input_name=TOKENS, module_output_name="other_embeddings"
    ),
    "Normalize": lambda: Normalize(TOKENS, "other_embeddings"),
}


def assert_refused(model, *found, **arguments):
    """Expect a refusal of the pipeline with these words, before the model reads anything."""
    if FORKS:
        pytest.skip("the forks refuse it in their own words, which their own tests hold")
    widths = record_widths(model)
    with pytest.raises(compat.UnsupportedPipelineError) as caught:
        model.encode(["abc"], vertical_chunk_size=4, **arguments)
    assert all(word in caught.value.found for word in found), caught.value.found
    assert caught.value.needed
    assert caught.value.remedy
    assert not widths


@pytest.mark.parametrize("name", CANNOT_STREAM)
def test_a_module_that_cannot_stream_before_pooling_is_refused_by_name(mamba2_checkpoint, name):
    model = embedder(mamba2_checkpoint, CANNOT_STREAM[name](), Pooling(WIDTH))
    assert_refused(model, name, "between Transformer and Pooling")


def test_a_model_without_pooling_is_refused_but_for_its_tokens(mamba2_checkpoint):
    model = embedder(mamba2_checkpoint, Normalize(TOKENS))
    assert_refused(model, "without Pooling")
    arguments = {"output_value": TOKENS}
    (chunked,) = model.encode([text(20)], vertical_chunk_size=8, **arguments)
    assert_close(chunked, model.encode([text(20)], **arguments)[0])


def test_a_pooling_with_a_forward_of_its_own_is_refused_by_name(mamba2_checkpoint):
    assert_refused(embedder(mamba2_checkpoint, HalvedPooling(WIDTH)), "HalvedPooling")


def test_a_pooling_that_only_has_another_name_streams(mamba2_checkpoint):
    model = embedder(mamba2_checkpoint, RenamedPooling(WIDTH))
    assert_close(model.encode([text(20)], vertical_chunk_size=8), model.encode([text(20)]))


@pytest.mark.parametrize("output_value", ["sentence_embedding", TOKENS])
@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_another_backend_is_refused_by_name(model, backend, output_value):
    model[0].backend = backend
    assert_refused(model, backend, output_value=output_value)


@released_only
def test_a_cross_encoder_is_refused(monkeypatch):
    """Expect a refusal: the released one would ignore the argument, and read everything at once."""
    monkeypatch.setattr(CrossEncoder, "__init__", torch.nn.Module.__init__)
    with pytest.raises(compat.UnsupportedPipelineError, match="CrossEncoder"):
        CrossEncoder().predict([("a question", "a text")], vertical_chunk_size=8)


def test_keeping_every_layer_is_refused(model):
    model.transformers_model.config.output_hidden_states = True
    assert_refused(model, "output_hidden_states")


@released_only
def test_a_first_module_that_is_no_transformer_is_refused(model):
    static = SentenceTransformer(modules=[Pooling(WIDTH)], device="cpu")
    with pytest.raises(compat.UnsupportedPipelineError, match="Pooling as the first module"):
        static.encode(["abc"], vertical_chunk_size=4)


@pytest.mark.parametrize("output_value", ["sentence_embedding", TOKENS])
def test_inputs_that_cannot_be_cut_are_refused_by_name(model, monkeypatch, output_value):
    preprocess = model[0].preprocess

    def with_embeddings(*args, **kwargs):
        features = preprocess(*args, **kwargs)
        return {**features, "inputs_embeds": torch.zeros(*features["input_ids"].shape, WIDTH)}

    monkeypatch.setattr(model[0], "preprocess", with_embeddings)
    assert_refused(model, "inputs_embeds", output_value=output_value)


# Models.

ATTENTION = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
UNSUPPORTED = {
    "bert": lambda: BertModel(BertConfig(**ATTENTION)),
    "llama": lambda: LlamaModel(LlamaConfig(**ATTENTION)),
}


@pytest.mark.parametrize("model_type", UNSUPPORTED)
def test_an_unsupported_model_is_refused_by_its_type(tmp_path, model_type):
    backbone = UNSUPPORTED[model_type]()
    backbone.save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    model = embedder(str(tmp_path))
    widths = record_widths(model)
    calls = (
        lambda: model.encode(["abc"], vertical_chunk_size=4),
        lambda: model.encode(["abc"], vertical_chunk_size=4, output_value=TOKENS),
        lambda: compat.iter_chunks(backbone, input_ids=IDS, vertical_chunk_size=4),
        lambda: compat.last_hidden_state(backbone, input_ids=IDS, vertical_chunk_size=4),
    )
    for call in calls[2:] if FORKS else calls:
        with pytest.raises(compat.UnsupportedModelError) as caught:
            call()
        assert repr(model_type) in caught.value.found
        assert "mamba2" in caught.value.needed
        assert caught.value.remedy
    assert not widths
    assert model.encode(["abc"]).shape == (1, WIDTH)


def test_an_object_that_is_no_transformers_model_is_refused(model):
    with pytest.raises(compat.UnsupportedModelError, match=r"SentenceTransformer\b"):
        compat.iter_chunks(model, input_ids=IDS, vertical_chunk_size=4)


# Tensors.

MASK = torch.ones_like(IDS)
HOLE = MASK.clone()
HOLE[1, 4] = 0
BAD_TENSORS = {
    "a mask with a hole": ({"attention_mask": HOLE}, "zeros between the tokens of row 1"),
    "a chunk's mask": ({"attention_mask": MASK[:, :4]}, r"found \(2, 4\)"),
    "a row's mask": ({"attention_mask": MASK[0]}, r"found \(10,\)"),
    "only padding": ({"attention_mask": 0 * MASK}, "no token"),
    "float ids": ({"input_ids": IDS.float()}, "integer tensor"),
    "one row": ({"input_ids": IDS[0]}, r"\(batch, seqlen\)"),
    "a list": ({"input_ids": IDS.tolist()}, "integer tensor"),
    "no columns": ({"input_ids": IDS[:, :0]}, r"\(2, 0\) has no token"),
    "no rows": ({"input_ids": IDS[:0]}, r"\(0, 10\) has no token"),
}


@pytest.mark.parametrize("function", [compat.iter_chunks, compat.last_hidden_state])
@pytest.mark.parametrize("bad", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_refused_when_they_are_passed(model, function, bad):
    tensors, found = BAD_TENSORS[bad]
    with pytest.raises(ValueError, match=found):
        function(model.transformers_model, **{"input_ids": IDS, "vertical_chunk_size": 4} | tensors)


def test_a_row_of_padding_is_zeros_and_has_no_last_token(model):
    backbone, mask = model.transformers_model, MASK.clone()
    mask[0] = 0
    arguments = {"input_ids": IDS, "attention_mask": mask, "vertical_chunk_size": 4}
    hidden = torch.cat([h for _, h in compat.iter_chunks(backbone, **arguments)], dim=1)
    assert not hidden[0].any()
    with torch.no_grad():
        full = backbone(IDS[1:]).last_hidden_state
    torch.testing.assert_close(hidden[1:], full, rtol=0, atol=CHUNKED[torch.float32])
    with pytest.raises(ValueError, match="Row 0 has no token"):
        compat.last_hidden_state(backbone, **arguments)


def test_activation_checkpointing_in_training_turns_the_state_off():
    model = tiny_model("mamba2").train()
    model.activation_checkpointing_enable()
    ids = torch.arange(12)[None]
    with pytest.raises(compat.UnsupportedModelError, match=r"model\.eval"):
        compat.last_hidden_state(model, input_ids=ids, vertical_chunk_size=4)
