"""A Reader gives at any time what encode gives for all text so far, however it came."""

import json
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.embedders import (
    PIPELINES,
    character_tokenizer,
    embedder,
    record_widths,
    text,
    word_tokenizer,
)
from support.families import tiny_model, tokens
from support.stack import FORKS
from support.tolerances import CHUNKED, COSINE

import compat
from compat.families.lookup import FAMILIES, backbone_of
from compat.families.states import copied, leaves, mapped
from compat.hooks import saved_reader
from compat.hooks.cut_texts import CutTextWarning
from compat.stream.growing_text import GrowingText
from compat.stream.pooling import POOLING_MODES
from compat.stream.tokenizer import StreamingTokenizer
from tests.families.test_instances import with_rope
from tests.laws.test_spans import TEXTS, checkpoint, distance

pytestmark = pytest.mark.skipif(FORKS, reason="the forks' checkpoints are those of the releases")

CHUNKS = st.integers(1, 20)


def exact(reader, model, whole, prompt=None, dtype=torch.float32):
    """What encode gives for the text so far; and encode gives what one pass does."""
    (expected,) = model.encode([whole], prompt=prompt)
    found = reader.embedding()
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert distance(found, expected) <= COSINE[dtype]


def random_acts(data, model, reader, whole, path, prompt=None):
    """Append a text in random pieces; ask, fork, save and load at random times between."""
    others = []
    at = 0
    while at < len(whole):
        end = data.draw(st.integers(at + 1, len(whole)), "end")
        reader.append(whole[at:end])
        at = end
        act = data.draw(st.sampled_from(["ask", "fork", "save", "go on", "state"]), "act")
        if act == "ask" and (whole[:at].strip() or prompt):
            exact(reader, model, whole[:at], prompt)
        elif act == "fork":
            others.append((reader, whole[:at]))
            reader = reader.fork()
        elif act == "save":
            reader.save(path)
            reader = compat.Reader.load(path, model)
        elif act == "state":
            reader.state()
    exact(reader, model, whole, prompt)
    for other, before in others[:2]:
        other.append("xyz")
        exact(other, model, before + "xyz", prompt)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@settings(max_examples=2)
@given(data=st.data(), length=st.integers(1, 60), mode=st.sampled_from(POOLING_MODES))
def test_every_family(tmp_path_factory, model_type, data, length, mode):
    model = embedder(checkpoint(tmp_path_factory, model_type, words=False), pooling=mode)
    reader = compat.Reader(model, vertical_chunk_size=data.draw(CHUNKS))
    path = tmp_path_factory.getbasetemp() / "reader.safetensors"
    random_acts(data, model, reader, text(length), path)


@pytest.mark.parametrize("end_of_text", [False, True])
@settings(max_examples=12)
@given(
    data=st.data(),
    whole=TEXTS.filter(str.strip),
    modes=st.lists(st.sampled_from(POOLING_MODES), min_size=1, unique=True),
    prompt=st.sampled_from(["", "query: ", "ab", "p" * 40]),
    include_prompt=st.booleans(),
)
def test_every_pooling_and_prompt(
    tmp_path_factory, end_of_text, data, whole, modes, prompt, include_prompt
):
    path = checkpoint(tmp_path_factory, end_of_text=end_of_text)
    model = embedder(path, pooling=tuple(modes), include_prompt=include_prompt)
    reader = compat.Reader(model, vertical_chunk_size=data.draw(CHUNKS), prompt=prompt)
    saved = tmp_path_factory.getbasetemp() / "reader.safetensors"
    random_acts(data, model, reader, whole, saved, prompt)


@pytest.mark.parametrize("modules", PIPELINES)
@pytest.mark.parametrize("hooks", [False, True])
def test_modules_around_the_pooling(mamba2_checkpoint, modules, hooks):
    model = embedder(mamba2_checkpoint, *PIPELINES[modules]())
    model.truncate_dim = 6
    if hooks:
        compat.enable_vertical_chunking()
    reader = compat.Reader(model, 9)
    reader.append(text(50))
    exact(reader, model, text(50))


def test_bfloat16(tmp_path_factory, tmp_path):
    path = checkpoint(tmp_path_factory, words=False, dtype=torch.bfloat16)
    model = embedder(path)
    reader = compat.Reader(model, 9)
    reader.append(text(40))
    reader.save(tmp_path / "reader")
    reader = compat.Reader.load(tmp_path / "reader", model)
    reader.append(text(30, 1))
    exact(reader, model, text(40) + text(30, 1), dtype=torch.bfloat16)


def test_the_default_prompt_is_taken(model):
    model.prompts, model.default_prompt_name = {"own": "own: "}, "own"
    reader = compat.Reader(model, 4)
    exact(reader, model, "")
    reader.append(text(20))
    exact(reader, model, text(20))


def test_inference_mode_comes_and_goes(model):
    with torch.inference_mode():
        reader = compat.Reader(model, 4)
        reader.append(text(20))
        fork = reader.fork()
    for each in (reader, fork):
        each.append("abc")
        exact(each, model, text(20) + "abc")


@settings(max_examples=60)
@given(whole=TEXTS, data=st.data(), window=st.integers(1, 20))
def test_a_growing_text_has_the_ids_of_the_whole(whole, data, window):
    tokenizer = word_tokenizer()
    growing, found, at = GrowingText(StreamingTokenizer(tokenizer, window)), [], 0
    while at < len(whole):
        end = data.draw(st.integers(at + 1, len(whole)))
        found += [token for ids in growing.append(whole[at:end]) for token in ids]
        at = end
        expected = tokenizer(whole[:at])["input_ids"]
        assert found + growing.copy().tail() == expected


def test_a_growing_text_holds_its_end_alone():
    growing = GrowingText(StreamingTokenizer(word_tokenizer()))
    for word in ["abcd ", "the ", "."] * 500:
        list(growing.append(word))
        assert len(growing.held) <= 15


# Work.


def test_an_embedding_costs_what_has_come_since(model):
    reader = compat.Reader(model, 16)
    reader.append(text(400))
    reader.embedding()
    widths = record_widths(model)
    reader.append("abc")
    reader.embedding()
    assert sum(widths) <= 3 + 3  # The character tokenizer's seams leave two characters behind.
    assert reader.num_tokens == 403


def test_a_prompt_is_read_once(model):
    base = compat.Reader(model, 16, prompt=text(300))
    base.fork()
    widths = record_widths(model)
    for query in ("abc", "de"):
        fork = base.fork()
        fork.append(query)
        fork.embedding()
    assert sum(widths) <= 2 * 8


def test_a_text_cut_at_the_models_limit(tmp_path_factory, tmp_path):
    model = embedder(checkpoint(tmp_path_factory, words=False, end_of_text=True))
    model.max_seq_length = 30
    reader = compat.Reader(model, 8)
    reader.append(text(29))
    exact(reader, model, text(29))
    reader.append("abc")
    reader.save(tmp_path / "reader")
    with pytest.warns(CutTextWarning, match="30 tokens.*the longest has 33 tokens"):
        found = reader.embedding()
    assert reader.num_tokens == 30
    assert distance(found, model.encode([text(29) + "abc"])[0]) <= COSINE[torch.float32]
    model.max_seq_length = 31
    with pytest.raises(compat.VerticalChunkingError, match=r"max_seq_length \(30, now 31\)"):
        compat.Reader.load(tmp_path / "reader", model)


def test_no_token(model):
    reader = compat.Reader(model)
    assert reader.num_tokens == 0
    assert reader.state() == {}
    with pytest.raises(ValueError, match=r"The text so far .* makes no token"):
        reader.embedding()


def test_what_is_no_text(model):
    with pytest.raises(TypeError, match="must be a str; found bytes"):
        compat.Reader(model).append(b"text")
    with pytest.raises(TypeError, match="must be a SentenceTransformer; found Mamba2Model"):
        compat.Reader(model.transformers_model)


def test_a_call_that_fails_halfway_is_not_gone_on_from(model):
    reader = compat.Reader(model, 8)
    reader.append(text(20))
    fork = reader.fork()
    layer = model.transformers_model.layers[1]
    handle = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reader.append(text(20))
    handle.remove()
    with pytest.raises(compat.VerticalChunkingError, match="failed halfway"):
        reader.embedding()
    exact(fork, model, text(20))


def test_positions_that_need_the_length_of_the_text_are_refused(tmp_path):
    with_rope("bamba", "dynamic", limit=16).save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(compat.UnsupportedModelError, match="depend on the length"):
        compat.Reader(embedder(str(tmp_path)))


# States.


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_copied_state_goes_on_by_itself(model_type):
    """Going on from a state changes nothing in a copy, and a copy gives what the state gives."""
    backbone, family = backbone_of(tiny_model(model_type))
    ids = tokens(1, 30)
    with torch.no_grad():
        _, state = family.forward(backbone, ids[:, :13], 0, None)
        copy = copied(state)
        before = {name: tensor.clone() for name, tensor in leaves(copy)[0].items()}
        assert before
        expected, _ = family.forward(backbone, ids[:, 13:], 13, state)
        after = leaves(copy)[0]
        assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
        found, _ = family.forward(backbone, ids[:, 13:], 13, copy)
    assert (found - expected).abs().max() <= CHUNKED[torch.float32]


def test_the_state_has_names(model):
    reader = compat.Reader(model, 8)
    reader.append(text(30))
    state = reader.state()
    config = model.transformers_model.config
    recurrent = [t for name, t in state.items() if "recurrent_states" in name]
    assert len(recurrent) == config.num_hidden_layers
    shape = (1, config.num_heads, config.head_dim, config.state_size)
    assert all(t.shape == shape and t.dtype == torch.float32 for t in recurrent)
    for tensor in state.values():
        tensor.zero_()
    exact(reader, model, text(30))


def test_a_state_of_unknown_parts_is_refused():
    with pytest.raises(compat.VerticalChunkingError, match=r"a\.0 is a Linear"):
        mapped({"a": [torch.nn.Linear(1, 1)]}, lambda _, leaf: leaf)


# Files.


@pytest.fixture
def saved(model, tmp_path):
    reader = compat.Reader(model, 8, prompt="prompt: ")
    reader.append(text(40))
    reader.save(tmp_path / "reader.safetensors")
    return tmp_path / "reader.safetensors"


def test_a_file_is_one_of_safetensors_and_nothing_lies_beside_it(saved):
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert all(name.startswith(("state.", "pooling.")) for name in load_file(saved))
    with safe_open(saved, "pt") as file:
        assert json.loads(file.metadata()["reader"])["prompt"] == "prompt: "


def test_the_card_of_a_file_lists_its_tensors(saved):
    with safe_open(saved, "pt") as file:
        card = file.metadata()["card"]
    for name, tensor in load_file(saved).items():
        shape = " x ".join(map(str, tensor.shape))
        assert f"| {name} | {shape} | {str(tensor.dtype).removeprefix('torch.')} |" in card
    assert card.startswith("# The state of a model behind ")
    assert f"| torch | {torch.__version__.partition('+')[0]}" in card


def test_a_file_without_a_card_is_read(saved, model, monkeypatch, tmp_path):
    reader = compat.Reader.load(saved, model)
    monkeypatch.setattr(saved_reader, "_card", lambda *_: "")
    original = saved_reader.save
    monkeypatch.setattr(
        saved_reader, "save", lambda plain, metadata: original(plain, _without_card(metadata))
    )
    reader.save(tmp_path / "old")
    exact(compat.Reader.load(tmp_path / "old", model), model, text(40), "prompt: ")


def _without_card(metadata):
    return {name: value for name, value in metadata.items() if name != "card"}


@settings(max_examples=30)
@given(data=st.data())
def test_a_torn_file_is_an_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("torn")
    model = embedder(checkpoint(tmp_path_factory))
    reader = compat.Reader(model, 8)
    reader.append("abcd the abth " * 3)
    reader.save(folder / "reader")
    whole = (folder / "reader").read_bytes()
    if data.draw(st.booleans()):
        torn = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        at = data.draw(st.integers(8, len(whole) - 1))
        torn = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    (folder / "reader").write_bytes(torn)
    with pytest.raises(compat.VerticalChunkingError):
        compat.Reader.load(folder / "reader", model)


def test_a_write_that_fails_leaves_the_old_file(saved, model, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr(saved_reader.os, "fsync", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compat.Reader(model).save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_file_that_is_not_there(model, tmp_path):
    with pytest.raises(FileNotFoundError):
        compat.Reader.load(tmp_path / "none", model)


def test_another_file_of_safetensors(model, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(compat.VerticalChunkingError, match=r"a file that Reader.save wrote"):
        compat.Reader.load(tmp_path / "other", model)


def _weight(model):
    next(model.transformers_model.parameters()).data[0, 0] += 1e-3


def _config(model):
    model.transformers_model.config.layer_norm_epsilon = 1e-3


def _pooling(model):
    model[1].pooling_mode = "max"


def _tokenizer(model):
    model.tokenizer.add_tokens(["abc"])


def _dtype(model):
    model.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_weight, "weights"),
        (_config, "configuration"),
        (_pooling, "configuration"),
        (_tokenizer, "tokenizer"),
        (_dtype, "dtype (float32, now bfloat16)"),
    ],
)
def test_another_model_is_refused_and_what_differs_is_named(saved, model, change, named):
    change(model)
    with pytest.raises(compat.VerticalChunkingError) as caught:
        compat.Reader.load(saved, model)
    assert named in caught.value.found
    assert change is _dtype or caught.value.found.count("now") == 1


def test_another_release_is_refused(saved, model, monkeypatch):
    release = saved_reader._release
    monkeypatch.setattr(
        saved_reader, "_release", lambda name: "0.1" if name == "torch" else release(name)
    )
    with pytest.raises(compat.VerticalChunkingError, match=r"torch \(.*, now 0\.1\)"):
        compat.Reader.load(saved, model)


def test_a_model_loaded_anew_goes_on(saved, mamba2_checkpoint):
    model = embedder(mamba2_checkpoint)
    reader = compat.Reader.load(saved, model)
    reader.append("abc")
    exact(reader, model, text(40) + "abc", "prompt: ")


# Threads.


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "minimax", "recurrent_gemma", "rwkv"])
def test_readers_in_threads_do_not_meet(tmp_path_factory, model_type):
    model = embedder(checkpoint(tmp_path_factory, model_type, words=False))
    texts = [text(120, seed) for seed in range(4)]
    found, raised = {}, []

    def run(seed):
        try:
            reader = compat.Reader(model, 5)
            for at in range(0, 120, 10):
                reader.append(texts[seed][at : at + 10])
                found[seed] = reader.embedding()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not raised
    expected = np.stack([model.encode([one])[0] for one in texts])
    assert distance(np.stack([found[seed] for seed in range(4)]), expected) <= COSINE[torch.float32]
