"""encode streams long texts and TextStreams, and gives what the released full pass gives."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import Pooling
from support.embedders import character_tokenizer, embedder, save_checkpoint, text
from support.stack import FORKS
from support.tolerances import COSINE
from tokenizers import Regex, normalizers

import compat
from compat import TextStream
from compat.families.lookup import FAMILIES
from compat.hooks import progress, streamed_texts
from compat.stream.pooling import POOLING_MODES
from compat.stream.tokenizer import StreamingTokenizer
from tests.families.test_instances import with_rope

pytestmark = pytest.mark.skipif(FORKS, reason="the forks read texts whole")


@pytest.fixture(autouse=True)
def _texts_of_more_than_40_characters_are_long(monkeypatch):
    """And a window has 16, so that tiny models do."""
    monkeypatch.setattr(streamed_texts, "LONG", 40)
    monkeypatch.setattr(streamed_texts, "StreamingTokenizer", lambda t: StreamingTokenizer(t, 16))


@pytest.fixture
def streams(monkeypatch):
    """The texts that were streamed."""
    seen = []
    made = streamed_texts._ids
    monkeypatch.setattr(streamed_texts, "_ids", lambda *args: seen.append(args[1]) or made(*args))
    return seen


def pieces_of(whole):
    return TextStream([whole[at : at + 7] for at in range(0, len(whole), 7)], size=len(whole))


def distance(a, b):
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(np.max(1 - (a * b).sum(-1) / norms))


def agree(model, texts, size, **kwargs):
    """Streams, long texts and the released pass over each text alone give the same."""
    released = np.stack([model.encode([one], **kwargs)[0] for one in texts])
    with compat.vertical_chunking():
        for given_texts in (texts, [pieces_of(one) for one in texts]):
            found = model.encode(given_texts, vertical_chunk_size=size, **kwargs)
            assert distance(found, released) <= COSINE[torch.float32]


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@settings(max_examples=2)
@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=4),
    size=st.integers(1, 50),
    mode=st.sampled_from(POOLING_MODES),
)
def test_every_family(tmp_path_factory, model_type, lengths, size, mode):
    model = embedder(checkpoint(tmp_path_factory, model_type), pooling=mode)
    agree(model, [text(length, seed) for seed, length in enumerate(lengths)], size)


def test_positions_that_need_the_length_of_the_text(tmp_path):
    """Such a text is tokenized as a whole, also where it comes in pieces."""
    with_rope("bamba", "dynamic", limit=16).save_pretrained(tmp_path)
    character_tokenizer("right", False).save_pretrained(tmp_path)
    model = embedder(str(tmp_path))
    model.max_seq_length = 1000
    agree(model, [text(length) for length in (60, 90)], 7)


SAVED = {}


def checkpoint(tmp_path_factory, model_type="mamba2", **kwargs):
    key = model_type, *kwargs.items()
    if key not in SAVED:
        SAVED[key] = save_checkpoint(tmp_path_factory.mktemp("model"), model_type, **kwargs)
    return SAVED[key]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("end_of_text", [False, True])
@settings(max_examples=8)
@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=6),
    size=st.integers(1, 65),
    modes=st.lists(st.sampled_from(POOLING_MODES), min_size=1, unique=True),
    prompt=st.sampled_from([None, "query: ", "p" * 45]),
    include_prompt=st.booleans(),
    batch_size=st.integers(1, 6),
)
def test_every_pooling_prompt_and_batch(
    tmp_path_factory, padding_side, end_of_text, lengths, size, modes, prompt, include_prompt,
    batch_size,
):  # fmt: skip
    path = checkpoint(tmp_path_factory, padding_side=padding_side, end_of_text=end_of_text)
    model = embedder(path, pooling=tuple(modes), include_prompt=include_prompt)
    texts = [text(length, seed) for seed, length in enumerate(lengths)]
    agree(model, texts, size, prompt=prompt, batch_size=batch_size)


def test_only_long_texts_are_streamed(model, streams):
    texts = [text(10), text(41), pieces_of(text(5)), text(40)]
    with compat.vertical_chunking():
        model.encode(texts, vertical_chunk_size=8)
    assert set(streams) == {texts[1], texts[2]}


@pytest.mark.parametrize("split", [False, True])
def test_special_tokens_are_text_where_the_call_says_so(model, streams, split):
    texts = [text(30) + "<end>" * 5 + text(30)]
    agree(model, texts, 9, processing_kwargs={"text": {"split_special_tokens": split}})
    assert len(streams) == 2


def test_modules_on_the_way_to_pooling(mamba2_checkpoint):
    width = 32
    dense = Dense(
        width, 12, module_input_name="token_embeddings", module_output_name="token_embeddings"
    )
    model = embedder(mamba2_checkpoint, dense, Pooling(12, "mean"))
    agree(model, [text(100), text(3)], 9)


@pytest.mark.parametrize("end_of_text", [False, True])
def test_a_text_is_cut_and_counted_as_it_is_without_streams(tmp_path_factory, end_of_text):
    model = embedder(checkpoint(tmp_path_factory, end_of_text=end_of_text))
    model.max_seq_length = 30
    texts = [text(100), text(20), text(55)]
    agree(model, texts[1:2], 9)
    released = np.stack([model.encode([one])[0] for one in texts])
    said = f"2 of 3 texts are longer than the limit of 30 tokens.*{100 + end_of_text} tokens"
    with compat.vertical_chunking():
        for given_texts in (texts, list(map(pieces_of, texts))):
            with pytest.warns(UserWarning, match=said):
                found = model.encode(given_texts, vertical_chunk_size=7)
            assert distance(found, released) <= COSINE[torch.float32]


def test_a_query_and_a_document_may_be_streams(model):
    whole = text(100)
    with compat.vertical_chunking():
        for encode in (model.encode_query, model.encode_document):
            found = encode(pieces_of(whole), vertical_chunk_size=9)
            assert found.shape == (32,)
            assert distance(found, encode(whole)) <= COSINE[torch.float32]


def test_a_pool_gets_the_path(model, tmp_path):
    whole = text(100)
    path = tmp_path / "text.txt"
    path.write_text(whole)
    compat.enable_vertical_chunking()
    pool = model.start_multi_process_pool(["cpu"])
    try:
        found = model.encode([TextStream.open(path)], pool=pool, vertical_chunk_size=9)
        with pytest.raises(TypeError, match="cannot be sent to other processes"):
            model.encode([TextStream(lambda: [whole])], pool=pool, vertical_chunk_size=9)
    finally:
        model.stop_multi_process_pool(pool)
    assert distance(found, model.encode([whole])) <= COSINE[torch.float32]


@pytest.mark.parametrize("output_value", ["token_embeddings", None])
def test_a_stream_is_read_whole_where_all_tokens_are_kept(model, output_value):
    with compat.vertical_chunking():
        (found,) = model.encode(
            [pieces_of(text(50))], output_value=output_value, vertical_chunk_size=9
        )
    tokens = found if output_value else found["token_embeddings"]
    assert tokens.shape == (50, 32)


def test_without_a_chunk_size_a_stream_is_a_text(model):
    with compat.vertical_chunking():
        found = model.encode([pieces_of(text(50)), pieces_of(text(9))])
    assert distance(found, model.encode([text(50), text(9)])) <= COSINE[torch.float32]


@pytest.mark.parametrize("what", ["tokenizer", "pipeline", "side"])
def test_what_cannot_be_streamed_is_read_whole_and_said_once(model, streams, what):
    said = {"tokenizer": "'\\^'", "pipeline": "chat template", "side": "on the left"}[what]
    if what == "tokenizer":
        backend = model.tokenizer.backend_tokenizer
        backend.normalizer = normalizers.Replace(Regex("^x"), "y")
    elif what == "side":
        model.tokenizer.truncation_side = "left"
        model.max_seq_length = 1000
    else:
        released = model[0].preprocess
        model[0].preprocess = lambda texts, **kw: released([t.strip() for t in texts], **kw)
    streamed_texts._warn_of_whole_texts.cache_clear()
    texts = [text(100), pieces_of(text(100))]
    with compat.vertical_chunking():
        with pytest.warns(UserWarning, match=f"tokenized as a whole.*{said}"):
            found = model.encode(texts, vertical_chunk_size=9)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.encode(texts, vertical_chunk_size=9)
    assert streams == []
    assert distance(found, model.encode([text(100)] * 2)) <= COSINE[torch.float32]


def test_a_tokenizer_that_changes_is_asked_again(model, streams):
    with compat.vertical_chunking():
        model.encode([text(60)], vertical_chunk_size=9)
        model.tokenizer.add_tokens(["abc"])
        model.transformers_model.resize_token_embeddings(len(model.tokenizer))
        whole = "x" + text(50) + "abc" * 5
        found = model.encode([whole], vertical_chunk_size=9)
    assert len(streams) == 2
    assert distance(found, model.encode([whole])) <= COSINE[torch.float32]


@pytest.mark.parametrize("empty", [[], [""], ["", ""]])
def test_a_stream_without_a_token(model, empty):
    with compat.vertical_chunking(), pytest.raises(ValueError, match="makes no token"):
        model.encode(["text", TextStream(empty)], vertical_chunk_size=9)


def test_a_stream_is_read_as_the_model_goes_on(model):
    """Before a chunk goes through the model, a window or two more than its tokens were read."""
    read, widths = [0], []

    def pieces():
        for at in range(0, 1000, 4):
            read[0] += 4
            yield text(1000)[at : at + 4]

    def look(_, args):
        widths.append(args[0].shape[1])
        assert read[0] <= sum(widths) + 60

    model.transformers_model.get_input_embeddings().register_forward_pre_hook(look)
    with compat.vertical_chunking():
        model.encode([TextStream(pieces)], vertical_chunk_size=10)
    assert sum(widths) == 1000


def test_the_bar_moves_over_the_characters_of_a_stream(model):
    stood = []

    class Bar:
        n = 0

        def update(self, step):
            self.n += step
            stood.append(self.n)

    with compat.vertical_chunking(), progress.into(Bar()):
        model.encode([pieces_of(text(100)), text(60)], vertical_chunk_size=10, batch_size=1)
    assert stood == sorted(stood)
    assert stood[-1] == 160
    assert len(stood) > 12
