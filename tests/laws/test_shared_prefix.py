"""What a batch's texts begin with is read once, and encode gives what it gives each text alone."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.embedders import (
    PIPELINES,
    character_tokenizer,
    embedder,
    record_sizes,
    save_checkpoint,
    text,
)
from support.stack import FORKS
from support.tolerances import CHUNKED, COSINE, error

import compat
from compat.errors import VerticalChunkingError
from compat.families.lookup import FAMILIES, backbone_of
from compat.hooks import streamed_texts
from compat.stream import loop, shared_prefix
from compat.stream.pooling import POOLING_MODES
from tests.families.test_instances import with_rope
from tests.laws.test_encode import cosine_distance, in_chunks, one_by_one

pytestmark = pytest.mark.skipif(FORKS, reason="the forks read each row from its beginning on")

SPARED = shared_prefix.SPARED
RESTS = st.lists(st.integers(1, 30), min_size=2, max_size=6)


@pytest.fixture(autouse=True)
def _it_pays_from_two_tokens_on(monkeypatch):
    monkeypatch.setattr(shared_prefix, "SPARED", 1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    @functools.cache
    def make(*args, **kwargs):
        return save_checkpoint(tmp_path_factory.mktemp("model"), *args, **kwargs)

    return make


def texts_behind(beginning, rests):
    return [beginning + text(length, seed) for seed, length in enumerate(rests)]


def agree(model, texts, size, dtype=torch.float32, **kwargs):
    found = in_chunks(model, texts, size, **kwargs)
    kwargs.pop("batch_size", None)
    assert cosine_distance(found, one_by_one(model, texts, **kwargs)) <= COSINE[dtype]


@torch.no_grad()
def rows_go_on(monkeypatch, model, rows, whole):
    """Compare rows of which the first 9 tokens of 12 are run once with each alone in one pass."""
    monkeypatch.setattr(shared_prefix, "SPARED", 1)
    lengths, column = torch.tensor([12] * len(rows)), 0
    chunks = shared_prefix.stream_sharing(*backbone_of(model), rows, lengths, 5)
    found = []
    for chunk in chunks:
        assert chunk.start == column
        column += chunk.hidden.shape[1]
        found.append(chunk.hidden)
    assert [part.shape[1] for part in found] == [5, 4, 3]
    expected = torch.cat([whole(row[None]) for row in rows])
    assert error(torch.cat(found, 1), expected) <= CHUNKED[torch.float32]


def tokens_read(model, texts, size, **kwargs):
    """Return how many tokens go through the model, padding counted."""
    in_chunks(model, texts[:1], size)  # Which asks the model whether it goes on from a state.
    sizes = record_sizes(model)
    in_chunks(model, texts, size, **kwargs)
    return sum(sizes)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@settings(max_examples=2)
@given(
    rests=RESTS,
    beginning=st.integers(4, 40),
    size=st.integers(1, 80),
    mode=st.sampled_from(POOLING_MODES),
)
def test_every_family(checkpoint, model_type, rests, beginning, size, mode):
    model = embedder(checkpoint(model_type), pooling=mode)
    handed = []
    copied = loop.copied
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "copied", lambda state: handed.append(state) or copied(state))
        agree(model, texts_behind(text(beginning, 99), rests), size)
    assert handed


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("end_of_text", [False, True])
@settings(max_examples=8)
@given(
    rests=RESTS,
    size=st.integers(1, 65),
    modes=st.lists(st.sampled_from(POOLING_MODES), min_size=1, unique=True),
    prompt=st.sampled_from(["p", "query: ", "p" * 45]),
    include_prompt=st.booleans(),
    batch_size=st.integers(1, 6),
    long=st.sampled_from([15, 30, 10_000]),
)
def test_every_pooling_prompt_and_batch(
    checkpoint, padding_side, end_of_text, rests, size, modes, prompt, include_prompt, batch_size,
    long,
):  # fmt: skip
    """Texts of more than `long` characters are streamed, and are rows of the batch all the same."""
    path = checkpoint("mamba2", padding_side=padding_side, end_of_text=end_of_text)
    model = embedder(path, pooling=tuple(modes), include_prompt=include_prompt)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed_texts, "LONG", long)
        agree(model, texts_behind("", rests), size, prompt=prompt, batch_size=batch_size)


@settings(max_examples=6)
@given(rests=RESTS, size=st.integers(1, 65), mode=st.sampled_from(["mean", "lasttoken"]))
def test_bfloat16(checkpoint, rests, size, mode):
    model = embedder(checkpoint("mamba2", dtype=torch.bfloat16), pooling=mode)
    agree(model, texts_behind(text(20, 99), rests), size, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", PIPELINES)
def test_modules_around_the_pooling(checkpoint, name):
    model = embedder(checkpoint("mamba2"), *PIPELINES[name]())
    agree(model, texts_behind("", [3, 30, 17]), 9, prompt=text(20, 99))


@pytest.mark.parametrize("size", [7, 16, 512])
def test_what_all_begin_with_is_read_once(model, size):
    texts = texts_behind(text(40, 99), [10] * 6)
    assert tokens_read(model, texts, size) == 40 + 6 * 10
    assert tokens_read(model, texts, size, batch_size=2) == 3 * (40 + 2 * 10)


def test_the_same_text_many_times_keeps_two_tokens_a_row(model):
    texts = [text(40)] * 5
    assert tokens_read(model, texts, 16) == 38 + 5 * 2
    agree(model, texts, 16)


def test_a_text_that_is_the_beginning_of_the_others(model):
    texts = [text(40) + rest for rest in ("", "a", "abc")]
    assert tokens_read(model, texts, 512) == 38 + 3 * 5
    agree(model, texts, 512)


def test_it_is_shared_where_that_spares_enough(model, monkeypatch):
    monkeypatch.setattr(shared_prefix, "SPARED", SPARED)
    many, few = texts_behind(text(60, 99), [10] * 6), texts_behind(text(60, 99), [10] * 5)
    assert tokens_read(model, many, 512) == 60 + 6 * 10
    assert tokens_read(model, few, 512) == 5 * 70
    assert tokens_read(model, many, 30) == 6 * 70  # Two runs more, for 5 * 60 tokens.


def test_the_state_that_is_handed_on_stays_as_it_is(checkpoint):
    """Rows of very different lengths are run apart on a CPU: the second group begins anew."""
    model = embedder(checkpoint("mamba2"))
    texts = texts_behind(text(40, 99), [300, 2, 2, 2])
    assert tokens_read(model, texts, 512) == 40 + 300 + 3 * 2
    found = in_chunks(model, texts, 512)
    assert error(found, one_by_one(model, texts)) <= CHUNKED[torch.float32]


def test_positions_that_depend_on_the_length_are_not_shared(tmp_path):
    with_rope("bamba", "dynamic", limit=16).save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    model = embedder(str(tmp_path))
    model.max_seq_length = 1000
    texts = texts_behind(text(40, 99), [10, 10, 10])
    assert tokens_read(model, texts, 512) == 3 * 50
    agree(model, texts, 16)


def test_a_state_that_cannot_be_copied_is_not_shared(model, monkeypatch):
    def refuse(reading):
        raise VerticalChunkingError("a state", "another", "none")

    monkeypatch.setattr(shared_prefix.Reading, "copy", refuse)
    texts = texts_behind(text(40, 99), [10, 10, 10])
    assert tokens_read(model, texts, 16) == 16 + 3 * 50
    agree(model, texts, 16)


def test_inference_mode_comes_and_goes(model):
    texts = texts_behind(text(40, 99), [10, 20])
    with torch.inference_mode(), compat.vertical_chunking():
        found = model.encode(texts, vertical_chunk_size=16, convert_to_tensor=True)
    assert cosine_distance(found, one_by_one(model, texts)) <= COSINE[torch.float32]
