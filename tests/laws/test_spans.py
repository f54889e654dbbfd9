"""Spans: each is what the library's own Pooling makes of the full pass's tokens that lie in it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer.modules import Pooling
from support.embedders import PIPELINES, embedder, save_checkpoint, text, word_tokenizer
from support.stack import FORKS
from support.tolerances import COSINE

import compat
from compat import TextStream
from compat.families.lookup import FAMILIES
from compat.stream.pooling import POOLING_MODES
from compat.stream.spans import spans_of
from compat.stream.tokenizer import StreamingTokenizer
from tests.families.test_instances import with_rope

pytestmark = pytest.mark.skipif(FORKS, reason="the forks' checkpoints are those of the releases")

WORDS = ["abcd", "the", "xyz", "Ether", "\U0001f44b\U0001f3fd", ".", " ", "  ", "\n", "q", "abth"]
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=40).map("".join)


@pytest.fixture(autouse=True)
def _windows_of_16_characters(monkeypatch):
    from compat.hooks import streamed_texts

    monkeypatch.setattr(streamed_texts, "StreamingTokenizer", lambda t: StreamingTokenizer(t, 16))


SAVED = {}


def checkpoint(tmp_path_factory, model_type="mamba2", words=True, **kwargs):
    key = model_type, words, *kwargs.items()
    if key not in SAVED:
        tokenizer = word_tokenizer(kwargs.get("end_of_text", False)) if words else None
        folder = tmp_path_factory.mktemp("model")
        SAVED[key] = save_checkpoint(folder, model_type, tokenizer=tokenizer, **kwargs)
    return SAVED[key]


def pieces_of(whole, size=7):
    return TextStream([whole[at : at + size] for at in range(0, len(whole), size)])


def tokens_in(model, whole, span, prompt=""):
    """The places of the tokens whose first character lies in a span, in the whole's ids."""
    encoding = model.tokenizer(prompt + whole, return_offsets_mapping=True)
    starts = [
        -1 if a == b else a - len(prompt) for a, b in encoding["offset_mapping"]
    ]  # A special token has (0, 0).
    return [place for place, start in enumerate(starts) if span[0] <= start < span[1]]


@torch.no_grad()
def by_the_library(model, whole, spans, prompt=""):
    """Pool the released full pass's token embeddings, span by span, with the released modules."""
    (found,) = model.encode([whole], output_value=None, prompt=prompt)
    tokens = found["token_embeddings"]
    modules = list(model)[1:]
    at = next(i for i, module in enumerate(modules) if isinstance(module, Pooling))
    rows = []
    for span in spans:
        own = tokens[tokens_in(model, whole, span, prompt)].clone()
        features = {"token_embeddings": own[None], "attention_mask": torch.ones(1, len(own))}
        for module in modules[at:]:
            features = module(features)
        rows.append(features["sentence_embedding"][0, : model.truncate_dim])
    return torch.stack(rows).float().numpy()


def distance(a, b):
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(np.max(1 - (a * b).sum(-1) / norms))


def agree(model, whole, spans, size, prompt="", dtype=torch.float32):
    expected = by_the_library(model, whole, spans, prompt)
    for given_text in (whole, pieces_of(whole)):
        found = compat.encode_spans(
            model, given_text, spans, vertical_chunk_size=size, prompt=prompt
        )
        assert found.shape == expected.shape
        assert distance(found, expected) <= COSINE[dtype]


def drawn_spans(data, model, whole, prompt=""):
    """Draw spans with a token each, in any order and overlapping."""
    place = st.integers(0, len(whole))
    pairs = st.tuples(place, place).map(sorted).map(tuple)
    has_a_token = pairs.filter(lambda span: tokens_in(model, whole, span, prompt))
    return data.draw(st.lists(has_a_token, min_size=1, max_size=6))


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@settings(max_examples=3)
@given(
    data=st.data(),
    length=st.integers(1, 90),
    size=st.integers(1, 50),
    mode=st.sampled_from(POOLING_MODES),
)
def test_every_family(tmp_path_factory, model_type, data, length, size, mode):
    model = embedder(checkpoint(tmp_path_factory, model_type, words=False), pooling=mode)
    whole = text(length)
    agree(model, whole, drawn_spans(data, model, whole), size)


@pytest.mark.parametrize("end_of_text", [False, True])
@settings(max_examples=30)
@given(
    data=st.data(),
    whole=TEXTS.filter(str.strip),
    size=st.integers(1, 30),
    modes=st.lists(st.sampled_from(POOLING_MODES), min_size=1, unique=True),
    prompt=st.sampled_from(["", "query: ", "ab", "p" * 40]),
    include_prompt=st.booleans(),
)
def test_every_pooling_and_prompt(
    tmp_path_factory, end_of_text, data, whole, size, modes, prompt, include_prompt
):
    path = checkpoint(tmp_path_factory, end_of_text=end_of_text)
    model = embedder(path, pooling=tuple(modes), include_prompt=include_prompt)
    agree(model, whole, drawn_spans(data, model, whole, prompt), size, prompt)


def test_a_token_that_begins_in_the_prompt_is_in_no_span(tmp_path_factory):
    model = embedder(checkpoint(tmp_path_factory))
    agree(model, "cdthe", [(2, 5)], 3, prompt="ab")
    with pytest.raises(ValueError, match=r"Span 0, \(0, 2\), has no token"):
        compat.encode_spans(model, "cdthe", [(0, 2)], vertical_chunk_size=3, prompt="ab")


@pytest.mark.parametrize("modules", PIPELINES)
@pytest.mark.parametrize("hooks", [False, True])
def test_modules_around_the_pooling(mamba2_checkpoint, modules, hooks):
    model = embedder(mamba2_checkpoint, *PIPELINES[modules]())
    model.truncate_dim = 6
    expected = by_the_library(model, text(60), [(0, 60), (20, 31)])
    if hooks:
        compat.enable_vertical_chunking()
    found = compat.encode_spans(model, text(60), [(0, 60), (20, 31)], vertical_chunk_size=9)
    assert distance(found, expected) <= COSINE[torch.float32]


def test_bfloat16(tmp_path_factory):
    path = checkpoint(tmp_path_factory, words=False, dtype=torch.bfloat16)
    model = embedder(path)
    agree(model, text(80), [(0, 80), (11, 40), (79, 80)], 9, dtype=torch.bfloat16)


def test_a_models_default_prompt_is_taken(model):
    model.prompts, model.default_prompt_name = {"own": "own: "}, "own"
    whole = text(40)
    found = compat.encode_spans(model, whole, [(3, 20)], vertical_chunk_size=8)
    assert distance(found, by_the_library(model, whole, [(3, 20)], "own: ")) <= 1e-6


def test_the_last_token_is_the_text_so_far(mamba2_checkpoint):
    model = embedder(mamba2_checkpoint, pooling="lasttoken")
    whole = text(50)
    found = compat.encode_spans(model, whole, [(3, 20), (20, 21)], vertical_chunk_size=8)
    assert distance(found, model.encode([whole[:20], whole[:21]])) <= COSINE[torch.float32]


# What cannot be embedded is named.


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ([(0, 3), (4, 4)], r"Span 1, \(4, 4\), is empty"),
        ([(5, 2)], r"Span 0, \(5, 2\), is empty"),
        ([(-1, 2)], r"Span 0, \(-1, 2\), begins before the text"),
        ([(0, 3), (2, 10), (1, 12)], r"Span 1, \(2, 10\), ends beyond .* 9 .*and so do 1 more"),
        ([(20, 22)], r"Span 0, \(20, 22\), ends beyond the text, which has 9 characters"),
        ([(0, 9), (1, 4)], r"Span 1, \(1, 4\), has no token"),
        ([(4, 5)], r"Span 0, \(4, 5\), has no token"),
        ([(8, 9)], r"Span 0, \(8, 9\), has no token"),
    ],
)
@pytest.mark.parametrize("make", [str, pieces_of])
def test_spans_that_cannot_be_embedded(tmp_path_factory, spans, said, make):
    model = embedder(checkpoint(tmp_path_factory))
    with pytest.raises(ValueError, match=said):
        compat.encode_spans(model, make("abcd the "), spans, vertical_chunk_size=2)


@pytest.mark.parametrize("span", ["ab", (0,), (0, 1.5), 3, (0, 1, 2)])
def test_what_is_no_span(model, span):
    with pytest.raises(TypeError, match="Span 1 is"):
        compat.encode_spans(model, "text", [(0, 1), span], vertical_chunk_size=2)


@pytest.mark.parametrize("given_text", [b"text", ["text"], None])
def test_what_is_no_text(model, given_text):
    with pytest.raises(TypeError, match="must be a str or a TextStream"):
        compat.encode_spans(model, given_text, [(0, 1)], vertical_chunk_size=2)


def test_no_spans(model):
    assert compat.encode_spans(model, "text", [], vertical_chunk_size=2).shape == (0, 32)


@pytest.mark.parametrize("end_of_text", [False, True])
def test_spans_behind_the_limit_of_the_model(tmp_path_factory, end_of_text):
    model = embedder(checkpoint(tmp_path_factory, words=False, end_of_text=end_of_text))
    whole, room = text(60), 30 - end_of_text
    expected = by_the_library(model, whole, [(0, room), (9, 20)])
    model.max_seq_length = 30
    found = compat.encode_spans(model, whole, [(0, room), (9, 20)], vertical_chunk_size=7)
    assert distance(found, expected) <= COSINE[torch.float32]
    with pytest.raises(ValueError, match=r"Span 1, .*limit of 30 tokens.*model.max_seq_length"):
        compat.encode_spans(model, whole, [(0, room), (0, room + 1)], vertical_chunk_size=7)


def test_positions_that_need_the_length_of_the_text_are_refused(tmp_path):
    with_rope("bamba", "dynamic", limit=16).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(compat.UnsupportedModelError, match="depend on the length"):
        compat.encode_spans(embedder(str(tmp_path)), "abcd", [(0, 4)], vertical_chunk_size=7)


def test_nothing_is_read_behind_the_last_span(model):
    read = []

    def pieces():
        for at in range(0, 1000, 4):
            read.append(at)
            yield text(1000)[at : at + 4]

    compat.encode_spans(model, TextStream(pieces), [(10, 50)], vertical_chunk_size=8)
    assert len(read) * 4 <= 50 + 8 + 2 * 16


# Spans by tokens, and those of the usual splitters.


@settings(max_examples=100)
@given(whole=TEXTS, every=st.integers(1, 9), data=st.data())
def test_spans_by_tokens(whole, every, data):
    """They hold `every` tokens each, begin `every - overlap` tokens apart, and reach the end."""
    overlap = data.draw(st.integers(0, every - 1))
    tokenizer = StreamingTokenizer(word_tokenizer(), 16)
    spans = compat.spans_by_tokens(tokenizer, pieces_of(whole), every=every, overlap=overlap)
    starts = [a for a, _ in word_tokenizer()(whole, return_offsets_mapping=True)["offset_mapping"]]
    expected = []
    for first in range(0, len(starts), every - overlap):
        behind = first + every
        end = starts[behind] if behind < len(starts) else len(whole)
        expected.append((starts[first], end))
        if behind >= len(starts):
            break
    assert spans == expected


@pytest.mark.parametrize(("every", "overlap"), [(0, 0), (4, 4), (4, -1)])
def test_spans_by_tokens_of_no_size(every, overlap):
    with pytest.raises(ValueError, match="overlap from 0 to every - 1"):
        compat.spans_by_tokens(word_tokenizer(), "text", every=every, overlap=overlap)


def test_documents_and_nodes_are_taken_as_they_are():
    documents = [SimpleNamespace(page_content="abc", metadata={"start_index": 4})]
    nodes = [SimpleNamespace(start_char_idx=4, end_char_idx=9)]
    assert spans_of([*documents, *nodes, (1, np.int64(2))]) == [(4, 7), (4, 9), (1, 2)]


@pytest.mark.parametrize("metadata", [{}, {"start_index": -1}])
def test_a_document_without_its_place(metadata):
    with pytest.raises(ValueError, match=r"Document 0 .*add_start_index=True"):
        spans_of([SimpleNamespace(page_content="abc", metadata=metadata)])


def test_a_node_without_its_place():
    with pytest.raises(ValueError, match=r"Node 0 .*start_char_idx"):
        spans_of([SimpleNamespace(start_char_idx=None, end_char_idx=3)])
