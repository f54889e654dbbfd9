"""The laws at the level of `encode`: the same embeddings as the released library, in chunks."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Router, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from support.embedders import PIPELINES, character_tokenizer, embedder, save_checkpoint, text
from support.stack import FORKS, released_only
from support.tolerances import COSINE

import compat
from compat.families.lookup import FAMILIES
from compat.stream.pooling import POOLING_MODES

FEW = settings().max_examples // 3
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=6)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Save a tiny model with its tokenizer, once for each set of arguments."""

    @functools.cache
    def make(*args, **kwargs):
        return save_checkpoint(tmp_path_factory.mktemp("model"), *args, **kwargs)

    return make


def cosine_distance(a, b):
    a, b = (np.asarray(torch.as_tensor(x).double()) for x in (a, b))
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(np.max(1 - (a * b).sum(-1) / norms))


def texts_of(lengths):
    return [text(length, seed) for seed, length in enumerate(lengths)]


def one_by_one(model, texts, **kwargs):
    """Embed each text alone with the released library: no padding, no batch, no chunk."""
    with_hooks_off = [model.encode([t], convert_to_tensor=True, **kwargs)[0] for t in texts]
    return torch.stack(with_hooks_off)


def in_chunks(model, texts, size, **kwargs):
    with compat.vertical_chunking():
        return model.encode(texts, vertical_chunk_size=size, convert_to_tensor=True, **kwargs)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@settings(max_examples=8)
@given(lengths=LENGTHS, size=st.integers(1, 65), mode=st.sampled_from(POOLING_MODES))
def test_every_family(checkpoint, model_type, lengths, size, mode):
    model = embedder(checkpoint(model_type), pooling=mode)
    texts = texts_of(lengths)
    distance = cosine_distance(in_chunks(model, texts, size), one_by_one(model, texts))
    assert distance <= COSINE[torch.float32]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@settings(max_examples=FEW)
@given(
    lengths=LENGTHS,
    size=st.integers(1, 65),
    modes=st.lists(st.sampled_from(POOLING_MODES), min_size=1, unique=True),
    prompt=st.sampled_from([None, "p", "query: "]),
    include_prompt=st.booleans(),
    batch_size=st.integers(1, 6),
)
def test_every_pooling_prompt_and_padding_side(
    checkpoint, padding_side, lengths, size, modes, prompt, include_prompt, batch_size
):
    path = checkpoint("mamba2", padding_side=padding_side)
    model = embedder(path, pooling=tuple(modes), include_prompt=include_prompt)
    texts = texts_of(lengths)
    found = in_chunks(model, texts, size, prompt=prompt, batch_size=batch_size)
    distance = cosine_distance(found, one_by_one(model, texts, prompt=prompt))
    assert distance <= COSINE[torch.float32]


@settings(max_examples=FEW)
@given(lengths=LENGTHS, size=st.integers(1, 65), mode=st.sampled_from(["mean", "lasttoken"]))
def test_bfloat16(checkpoint, lengths, size, mode):
    model = embedder(checkpoint("mamba2", dtype=torch.bfloat16), pooling=mode)
    assert model.dtype == torch.bfloat16
    texts = texts_of(lengths)
    distance = cosine_distance(in_chunks(model, texts, size), one_by_one(model, texts))
    assert distance <= COSINE[torch.bfloat16]


# Modules before Pooling are parked in the fork.
BEHIND = [name for name in PIPELINES if name.endswith("behind") or name == "normalize"]


@pytest.mark.parametrize("name", BEHIND if FORKS else PIPELINES)
def test_modules_before_and_behind_pooling(checkpoint, name):
    model = embedder(checkpoint("mamba2"), *PIPELINES[name]())
    texts = texts_of([1, 30, 60, 2, 17])
    for size in (1, 16, 64):
        distance = cosine_distance(in_chunks(model, texts, size), one_by_one(model, texts))
        assert distance <= COSINE[torch.float32]


@pytest.mark.parametrize("task", ["query", "document"])
def test_routes_of_a_router(checkpoint, task):
    def route(mode):
        return [Transformer(checkpoint("mamba2")), Pooling(32, mode)]

    router = Router.for_query_document(route("mean"), route("lasttoken"))
    model = SentenceTransformer(modules=[router, Normalize()], device="cpu")
    texts = texts_of([5, 40])
    found = in_chunks(model, texts, 8, task=task)
    assert cosine_distance(found, one_by_one(model, texts, task=task)) <= COSINE[torch.float32]


@released_only
def test_a_router_is_judged_by_the_route_that_the_texts_take(checkpoint):
    static = StaticEmbedding(character_tokenizer().backend_tokenizer, embedding_dim=32)
    document = [Transformer(checkpoint("mamba2")), Pooling(32, "mean")]
    router = Router.for_query_document([static], document)
    model, texts = SentenceTransformer(modules=[router], device="cpu"), texts_of([5, 40])
    released = model.encode_document(texts)
    with compat.vertical_chunking():
        found = model.encode_document(texts, vertical_chunk_size=8)
        with pytest.raises(compat.UnsupportedPipelineError, match="StaticEmbedding"):
            model.encode_query(texts, vertical_chunk_size=8)
    assert cosine_distance(found, released) <= COSINE[torch.float32]


@pytest.mark.parametrize("method", ["encode", "encode_query", "encode_document"])
def test_the_three_ways_to_encode(checkpoint, method):
    model = embedder(checkpoint("mamba2"))
    model.prompts = {"query": "ask: ", "document": "read: "}
    texts = texts_of([3, 50])
    released = getattr(model, method)(texts)
    with compat.vertical_chunking():
        found = getattr(model, method)(texts, vertical_chunk_size=16)
        single = getattr(model, method)(texts[1], vertical_chunk_size=16)
    assert cosine_distance(found, released) <= COSINE[torch.float32]
    assert single.shape == released[1].shape
    assert cosine_distance(single, released[1]) <= COSINE[torch.float32]


@pytest.mark.parametrize(
    "options",
    [
        {"truncate_dim": 8},
        {"normalize_embeddings": True},
        {"normalize_embeddings": True, "truncate_dim": 5},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
    ],
    ids=str,
)
def test_options_of_encode(checkpoint, options):
    model, texts = embedder(checkpoint("mamba2")), texts_of([60, 3, 31])
    released = model.encode(texts, **options)
    with compat.vertical_chunking():
        found = model.encode(texts, vertical_chunk_size=16, **options)
    assert type(found) is type(released)
    assert [x.shape for x in found] == [x.shape for x in released]
    for a, b in zip(found, released, strict=True):
        assert cosine_distance(a, b) <= COSINE[torch.float32]


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
def test_quantised_output(checkpoint, precision):
    """Use values that are far from zero, as bits flip where a value is zero to rounding."""
    model, texts = embedder(checkpoint("mamba2"), pooling="lasttoken"), texts_of([60, 3, 31])
    assert np.abs(model.encode(texts)).min() > 1e-4
    released = model.encode(texts, precision=precision)
    with compat.vertical_chunking():
        found = model.encode(texts, vertical_chunk_size=16, precision=precision)
    np.testing.assert_array_equal(found, released)


@released_only
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("output_value", ["token_embeddings", None])
def test_token_embeddings_are_those_of_the_full_pass(checkpoint, padding_side, output_value):
    model = embedder(checkpoint("mamba2", padding_side=padding_side))
    texts = texts_of([60, 3, 31])
    released = model.encode(texts, output_value=output_value)
    with compat.vertical_chunking():
        found = model.encode(texts, output_value=output_value, vertical_chunk_size=16)
    for a, b, length in zip(found, released, (60, 3, 31), strict=True):
        if output_value is None:
            assert a.keys() == b.keys()
            pooled = cosine_distance(a["sentence_embedding"], b["sentence_embedding"])
            assert pooled <= COSINE[torch.float32]
            a, b = (item["token_embeddings"][item["attention_mask"].bool()] for item in (a, b))
        else:
            assert a.shape == b.shape
            a, b = (x[-length:] if padding_side == "left" else x for x in (a, b))
        assert len(a) == length
        assert cosine_distance(a, b) <= COSINE[torch.float32]


def test_no_more_than_a_chunk_goes_through_the_model(checkpoint):
    model = embedder(checkpoint("mamba2"))
    in_chunks(model, texts_of([3]), 64)  # The first time, a model may be asked whether it is exact.
    widths = []
    model.transformers_model.register_forward_pre_hook(
        lambda _, __, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    in_chunks(model, texts_of([1000, 400]), 64)
    assert max(widths) == 64
    assert len(widths) == -(-1000 // 64)
