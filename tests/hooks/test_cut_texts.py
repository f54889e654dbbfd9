"""A text that the model's limit cuts is reported once a call, with its length and the remedy."""

import warnings
from contextlib import contextmanager

import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from support.embedders import embedder, save_checkpoint, text

import compat
from compat.hooks.cut_texts import CutTextWarning
from tests.hooks.test_own_chunks import OwnTransformer

METHODS = ["encode", "encode_query", "encode_document"]
TEXTS = [text(n) for n in (40, 5, 90, 16, 17)]
CUT = "3 of 5 texts are longer than the limit of 16 tokens"


@pytest.fixture(autouse=True)
def _hooks_on():
    compat.enable_vertical_chunking()


@pytest.fixture(params=["right", "left"])
def limited(request, tmp_path):
    """Make a model with a limit of 16 tokens, padded on either side."""
    model = embedder(save_checkpoint(tmp_path, padding_side=request.param))
    model.max_seq_length = 16
    return model


@contextmanager
def told(*words):
    """Expect one warning with all of these words inside the block; without words, none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages = [str(w.message) for w in caught if issubclass(w.category, CutTextWarning)]
    assert len(messages) == bool(words), messages
    for word in words:
        assert word in messages[0]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
@pytest.mark.parametrize("method", METHODS)
def test_a_call_warns_once_of_all_texts_that_were_cut(limited, method, batch_size):
    with told(CUT, "the longest has 90 tokens", "model.max_seq_length = 90"):
        getattr(limited, method)(TEXTS, vertical_chunk_size=8, batch_size=batch_size)


def test_it_says_so_where_the_call_stands(limited):
    with pytest.warns(CutTextWarning) as caught:
        limited.encode(TEXTS, vertical_chunk_size=8)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("output_value", ["token_embeddings", None])
def test_token_embeddings_are_cut_too(limited, output_value):
    with told(CUT):
        limited.encode(TEXTS, vertical_chunk_size=8, output_value=output_value)


def test_the_models_own_size_warns_too(limited):
    limited.vertical_chunk_size = 8
    with told(CUT):
        limited.encode(TEXTS)


def test_the_remedy_is_one(limited):
    with told(CUT):
        limited.encode(TEXTS, vertical_chunk_size=8)
    limited.max_seq_length = 90
    with told():
        limited.encode(TEXTS, vertical_chunk_size=8)


def test_nothing_is_said_where_nothing_is_cut(limited, model):
    with told():
        limited.encode([text(16), text(3)], vertical_chunk_size=8)
        limited.encode([], vertical_chunk_size=8)
        limited.encode(TEXTS)  # Nothing changes without chunks.
        model.encode(TEXTS, vertical_chunk_size=8)


def test_what_stands_around_a_text_counts(tmp_path):
    """Count the prompt, and the end that the tokenizer puts after each text or part of one."""
    model = embedder(save_checkpoint(tmp_path, end_of_text=True))
    model.max_seq_length = 16
    with told("1 of 2", "limit of 16", "the longest has 44 tokens"):
        model.encode([text(40), text(12)], prompt="a: ", vertical_chunk_size=8)
    with told("2 of 2", "the longest has 20 tokens"):
        model.encode([text(16), text(13)], prompt="a: ", vertical_chunk_size=8)


def test_a_text_is_not_tokenized_twice(limited, monkeypatch):
    read = []
    tokenizer = type(limited.tokenizer)
    encode = tokenizer._encode_plus

    def counted(self, text, *args, **kwargs):
        read.append(text)
        return encode(self, text, *args, **kwargs)

    monkeypatch.setattr(tokenizer, "_encode_plus", counted)
    with told(CUT):
        limited.encode(TEXTS, vertical_chunk_size=8)
    assert len(read) == 1


def test_a_tokenizer_that_keeps_nothing_is_asked_again_for_what_fills_the_limit(limited):
    preprocess = type(limited[0]).preprocess
    limited[0].preprocess = lambda *args, **kwargs: dict(preprocess(limited[0], *args, **kwargs))
    with told(CUT, "the longest has 90 tokens"):
        limited.encode(TEXTS, vertical_chunk_size=8)
    with told("4 of 5", "the longest has 93 tokens"):
        limited.encode(TEXTS, prompt="a: ", vertical_chunk_size=8)


def test_a_call_that_sets_its_own_limit_knows_it(limited):
    with told():
        arguments = {"processing_kwargs": {"text": {"max_length": 10}}}
        limited.encode(TEXTS, vertical_chunk_size=8, **arguments)


def test_the_limit_that_is_named_is_the_one_that_cuts(limited):
    limited[0].query_length = 10
    with told("limit of 10 tokens", "set model[0].query_length = 90"):
        limited.encode_query(TEXTS, vertical_chunk_size=8)
    with told(CUT, "set model.max_seq_length = 90"):
        limited.encode_document(TEXTS, vertical_chunk_size=8)
    limited[0].processing_kwargs = {"text": {"max_length": 12}}
    with told("limit of 12 tokens", "set model[0].processing_kwargs['text']['max_length'] = 90"):
        limited.encode(TEXTS, vertical_chunk_size=8)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mamba2", "A mamba2 has no attention over the whole text, so it needs no limit"),
        ("zamba2", "A zamba2 has attention layers, and max_position_embeddings = 512"),
    ],
)
@pytest.mark.filterwarnings("ignore:zamba2 has attention layers")
def test_it_says_what_the_model_has_against_longer_texts(tmp_path, model_type, reason):
    model = embedder(save_checkpoint(tmp_path, model_type))
    model.max_seq_length = 16
    with told(reason):
        model.encode(TEXTS, vertical_chunk_size=8)


def test_the_limit_of_the_route_is_meant(mamba2_checkpoint):
    query, document = Transformer(mamba2_checkpoint), Transformer(mamba2_checkpoint)
    query.max_seq_length = 16
    router = Router.for_query_document([query], [document])
    pooling = Pooling(query.get_embedding_dimension())
    model = SentenceTransformer(modules=[router, pooling], device="cpu")
    with told(CUT):
        model.encode_query(TEXTS, vertical_chunk_size=8)
    with told():
        model.encode_document(TEXTS, vertical_chunk_size=8)


def test_a_model_that_reads_chunks_by_itself_is_cut_too(mamba2_checkpoint):
    model = SentenceTransformer(
        modules=[reader := OwnTransformer(mamba2_checkpoint), Pooling(32)], device="cpu"
    )
    reader.max_seq_length = 16
    with told(CUT):
        model.encode(TEXTS, vertical_chunk_size=8)


@pytest.mark.parametrize("method", METHODS)
def test_the_workers_of_a_pool_tell_the_call(shared_pool, method):
    model, pool = shared_pool
    with told(CUT, "the longest has 90 tokens"):
        getattr(model, method)(TEXTS, pool=pool, vertical_chunk_size=8, chunk_size=1)
    with told():
        getattr(model, method)(TEXTS[1:2], pool=pool, vertical_chunk_size=8)


@pytest.mark.parametrize("output_value", ["token_embeddings", None])
def test_the_outputs_of_workers_arrive_as_themselves(shared_pool, output_value):
    model, pool = shared_pool
    arguments = {"vertical_chunk_size": 8, "output_value": output_value}
    with told(CUT):
        found = model.encode(TEXTS, pool=pool, chunk_size=2, **arguments)
    with told(CUT):
        assert [type(one) for one in found] == [
            type(one) for one in model.encode(TEXTS, **arguments)
        ]


@pytest.fixture(scope="module")
def shared_pool(mamba2_checkpoint):
    model = embedder(mamba2_checkpoint)
    model.max_seq_length = 16
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    yield model, pool
    model.stop_multi_process_pool(pool)


def test_the_rank_of_a_distributed_evaluation_says_it_for_itself(limited):
    """Expect the warning although `encode` is not called."""
    arguments = {
        "prompt": None,
        "batch_size": 2,
        "save_to_cpu": True,
        "normalize_embeddings": False,
        "truncate_dim": None,
    }
    with told(CUT):
        limited._inference(TEXTS, vertical_chunk_size=8, **arguments)
