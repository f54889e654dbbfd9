"""A model whose own module takes `vertical_chunk_size` works the same with hooks and without."""

import logging

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule, Router, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from support.embedders import embedder, text
from support.tolerances import CHUNKED

import compat
from compat.installed.recurrent_cache import forward_of, state_argument, state_of

TEXTS = [text(n) for n in (20, 12)]
METHODS = ["encode", "encode_query", "encode_document"]


class OwnTransformer(Transformer):
    """A module that reads texts in chunks by its own loop, and notes their sizes.

    Attributes:
        sizes: The size given to each forward.
        widths: The number of tokens of each call of the model.
    """

    forward_kwargs = {"vertical_chunk_size"} | Transformer.forward_kwargs

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sizes, self.widths = [], []

    def forward(self, features, vertical_chunk_size=None, **kwargs):
        self.sizes.append(vertical_chunk_size)
        ids, state, hidden = features["input_ids"], None, []
        name = state_argument(forward_of(self.model))
        for chunk in ids.split(vertical_chunk_size or ids.shape[1], dim=1):
            self.widths.append(chunk.shape[1])
            output = self.model(input_ids=chunk, use_cache=True, **{name: state})
            hidden.append(output.last_hidden_state)
            state = state_of(output)
        features["token_embeddings"] = torch.cat(hidden, dim=1)
        return features


class StrictTransformer(OwnTransformer):
    """A module that does not expect the size where features are made of texts."""

    def preprocess(self, inputs, prompt=None, task=None):
        return super().preprocess(inputs, prompt=prompt, task=task)


class OldTransformer(OwnTransformer):
    """A module that makes features of texts as older modules do, without any argument."""

    preprocess = InputModule.preprocess

    def tokenize(self, texts):
        return Transformer.preprocess(self, texts)


def own(checkpoint, module=OwnTransformer, **pooling):
    transformer = module(checkpoint)
    width = transformer.get_embedding_dimension()
    modules = [transformer, Pooling(width, "mean", **pooling)]
    return SentenceTransformer(modules=modules, prompts={"query": "a: "}, device="cpu")


def assert_close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=CHUNKED[torch.float32])


@pytest.mark.parametrize("method", METHODS)
def test_it_gets_the_size_and_gives_bit_for_bit_what_it_gives_without_hooks(
    mamba2_checkpoint, method
):
    model = own(mamba2_checkpoint)
    released = getattr(model, method)(TEXTS, vertical_chunk_size=8, batch_size=1)
    sizes, widths = model[0].sizes[:], model[0].widths[:]
    compat.enable_vertical_chunking()
    with compat.ops.using("released"):
        found = getattr(model, method)(TEXTS, vertical_chunk_size=8, batch_size=1)
    np.testing.assert_array_equal(found, released)
    assert sizes == [8, 8]
    assert model[0].sizes == sizes * 2
    assert model[0].widths == widths * 2


@pytest.mark.parametrize("method", METHODS)
def test_a_stored_size_reaches_it(mamba2_checkpoint, method):
    model = own(mamba2_checkpoint)
    full = getattr(model, method)(TEXTS, batch_size=1)
    compat.enable_vertical_chunking()
    model.vertical_chunk_size = 8
    assert_close(getattr(model, method)(TEXTS, batch_size=1), full)
    assert model[0].sizes == [None, None, 8, 8]
    getattr(model, method)(TEXTS, batch_size=1, vertical_chunk_size=5)
    assert model[0].sizes[4:] == [5, 5]


@pytest.mark.parametrize("size", [None, 0, "all"])
def test_a_size_is_what_the_module_makes_of_it(mamba2_checkpoint, size):
    """Accept 0, which hooks refuse, as they know nothing of a module's own sizes."""
    model = own(mamba2_checkpoint)
    seen = []
    model[0].forward = lambda features, vertical_chunk_size=5: (
        seen.append(vertical_chunk_size) or OwnTransformer.forward(model[0], features)
    )
    compat.enable_vertical_chunking()
    model.encode(TEXTS, vertical_chunk_size=size)
    assert seen == [size]


@pytest.mark.parametrize("default", [False, True])
def test_the_size_reaches_it_in_a_pool(mamba2_checkpoint, default):
    model = own(mamba2_checkpoint)
    model[0].register_forward_hook(_mark_by_its_size)
    compat.enable_vertical_chunking()
    model.vertical_chunk_size = 7 if default else None
    arguments = {} if default else {"vertical_chunk_size": 7}
    pool = model.start_multi_process_pool(["cpu"])
    try:
        found = model.encode(TEXTS, pool=pool, **arguments)
    finally:
        model.stop_multi_process_pool(pool)
    np.testing.assert_array_equal(found, np.full_like(found, 7))


def _mark_by_its_size(module, args, features):
    """Let the embedding show the size in which the worker was asked to read."""
    features["token_embeddings"] = torch.full_like(features["token_embeddings"], module.sizes[-1])


@pytest.mark.parametrize("module", [StrictTransformer, OldTransformer])
@pytest.mark.parametrize("prompt", [None, "a: "])
def test_a_preprocess_that_does_not_take_the_size_does_not_get_it(
    mamba2_checkpoint, module, prompt
):
    arguments = {"prompt": prompt, "batch_size": 1}
    pooling = {"include_prompt": module is OldTransformer}  # It does not report a prompt's length.
    wanted = own(mamba2_checkpoint, **pooling).encode(TEXTS, **arguments)
    model = own(mamba2_checkpoint, module, **pooling)
    compat.enable_vertical_chunking()
    assert_close(model.encode(TEXTS, vertical_chunk_size=8, **arguments), wanted)
    assert model[0].sizes == [8, 8]


def test_the_route_of_a_text_decides(mamba2_checkpoint):
    """Read queries by the module's own loop and documents by the hooks, in one model."""
    width = embedder(mamba2_checkpoint).get_embedding_dimension()
    ours = OwnTransformer(mamba2_checkpoint)
    plain = Transformer(mamba2_checkpoint)
    router = Router.for_query_document([ours], [plain])
    model = SentenceTransformer(modules=[router, Pooling(width)], device="cpu")
    full = model.encode_query(TEXTS), model.encode_document(TEXTS)
    compat.enable_vertical_chunking()
    read = []
    plain.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: read.append(args[0].shape[1])
    )
    assert_close(model.encode_document(TEXTS, vertical_chunk_size=8), full[1])
    assert max(read) == 8
    assert ours.sizes == [None]
    assert_close(model.encode_query(TEXTS, vertical_chunk_size=10), full[0])
    assert ours.sizes == [None, 10]


def test_module_kwargs_are_a_route_too(mamba2_checkpoint):
    """Do as for modules that are no `Module` of sentence-transformers."""
    model = own(mamba2_checkpoint)
    model[0].forward_kwargs = Transformer.forward_kwargs
    model.module_kwargs = {"0": ["vertical_chunk_size"]}
    compat.enable_vertical_chunking()
    model.encode(TEXTS, vertical_chunk_size=8)
    assert model[0].sizes == [8]


def test_it_is_named_native_once_for_each_model(mamba2_checkpoint, caplog):
    compat.enable_vertical_chunking()
    with caplog.at_level(logging.INFO, logger="compat"):
        for _ in range(2):
            model = own(mamba2_checkpoint)
            model.encode(TEXTS)
            assert not caplog.records
            model.encode(TEXTS, vertical_chunk_size=8)
            model.encode(TEXTS, vertical_chunk_size=8)
            (record,) = caplog.records
            assert "OwnTransformer" in record.getMessage()
            assert "native" in record.getMessage()
            caplog.clear()


def test_the_models_arguments_are_those_of_the_released_library(mamba2_checkpoint):
    model = own(mamba2_checkpoint)
    released = model.get_model_kwargs()
    compat.enable_vertical_chunking()
    assert model.get_model_kwargs() == released
    with pytest.raises(ValueError, match="unknown"):
        model.encode(TEXTS, vertical_chunk_size=8, unknown=1)
