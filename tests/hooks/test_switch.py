"""Hooks go in all or none, come out without a trace, and say what they are."""

import inspect
import pickle
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import sentence_transformers
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from support.embedders import text
from support.tolerances import CHUNKED, COSINE
from transformers.cache_utils import Cache, LinearAttentionLayer

import compat
from compat import ops
from compat.hooks import encoder, modules
from compat.installed import recurrent_cache
from compat.installed.patches import Patches

HOOKED = (SentenceTransformer, BaseModel, Transformer, Pooling, Dense, Normalize)
INHERITED = ("get_model_kwargs", "preprocess")


def attributes():
    """Return every attribute of the classes that hooks may touch, by identity."""
    return {(owner, name): id(value) for owner in HOOKED for name, value in vars(owner).items()}


@contextmanager
def untouched():
    before = attributes()
    yield
    assert attributes() == before


def states(report):
    return {status.library: status.state for status in report.libraries}


def reason(report, library):
    return next(status.reason for status in report.libraries if status.library == library)


@pytest.fixture
def fresh_probe():
    """Let the probe look again in this test, and again after it."""
    recurrent_cache.probe.cache_clear()
    yield
    recurrent_cache.probe.cache_clear()


# In and out again.


def test_disable_puts_the_very_objects_back():
    with untouched():
        compat.enable_vertical_chunking()
        assert "vertical_chunk_size" in vars(SentenceTransformer)
        compat.disable_vertical_chunking()


@pytest.mark.parametrize("name", INHERITED)
def test_an_inherited_method_is_inherited_again_and_its_owner_is_left_alone(name):
    inherited = vars(BaseModel)[name]
    compat.enable_vertical_chunking()
    assert name in vars(SentenceTransformer)
    assert vars(BaseModel)[name] is inherited
    compat.disable_vertical_chunking()
    assert name not in vars(SentenceTransformer)
    assert getattr(SentenceTransformer, name) is inherited


def test_enabling_twice_is_enabling_once():
    with untouched():
        first = compat.enable_vertical_chunking()
        with untouched():
            assert compat.enable_vertical_chunking() == first
        compat.disable_vertical_chunking()


def test_disabling_without_hooks_does_nothing():
    with untouched():
        compat.disable_vertical_chunking()
        compat.enable_vertical_chunking()
        compat.disable_vertical_chunking()
        compat.disable_vertical_chunking()


def test_the_context_manager_has_the_hooks_on_inside_only():
    with untouched():
        with compat.vertical_chunking() as report:
            assert states(report)["sentence-transformers"] == "patched"
            assert "vertical_chunk_size" in vars(SentenceTransformer)
        assert states(compat.status())["sentence-transformers"] == "absent"


def test_the_context_manager_takes_the_hooks_out_after_an_error():
    with untouched(), pytest.raises(ZeroDivisionError), compat.vertical_chunking():
        raise ZeroDivisionError


def test_the_inner_context_manager_leaves_the_hooks_to_the_outer():
    with untouched(), compat.vertical_chunking(), untouched():
        with pytest.raises(ZeroDivisionError), compat.vertical_chunking():
            raise ZeroDivisionError
        with compat.vertical_chunking():
            pass


def test_the_context_manager_leaves_hooks_on_that_were_on():
    compat.enable_vertical_chunking()
    with untouched(), compat.vertical_chunking():
        pass


# The report.


@pytest.mark.parametrize("enabled", [False, True])
def test_status_changes_nothing(enabled):
    if enabled:
        compat.enable_vertical_chunking()
    with untouched():
        assert compat.status() == compat.status()


def test_the_report_follows_the_hooks():
    off = {"transformers": "native", "sentence-transformers": "absent"}
    on = {"transformers": "patched", "sentence-transformers": "patched"}
    assert states(compat.status()) == off
    assert "enable_vertical_chunking()" in reason(compat.status(), "sentence-transformers")
    enabled = compat.enable_vertical_chunking()
    assert states(enabled) == on
    assert "vertical_chunk_size" in reason(enabled, "sentence-transformers")
    assert compat.status() == enabled
    compat.disable_vertical_chunking()
    assert states(compat.status()) == off


def test_the_report_names_the_installed_versions():
    versions = {status.library: status.version for status in compat.status().libraries}
    assert versions["sentence-transformers"] == sentence_transformers.__version__


def test_the_report_as_a_string_is_a_table_and_two_lines():
    report = compat.enable_vertical_chunking()
    table, lines = str(report).split("\n\n")
    assert lines == f"fused path of Mamba2 on a GPU: {report.fused}\non a CPU: {report.cpu}"
    head, *rows = table.splitlines()
    assert head.split() == ["library", "version", "state", "reason"]
    assert len(rows) == len(report.libraries)
    for row, status in zip(rows, report.libraries, strict=True):
        assert row.split()[:3] == [status.library, status.version, status.state]
        assert row[head.index("reason") :] == status.reason


# The hooks as seen from outside.


def test_encode_shows_the_argument_only_with_hooks_on():
    released = inspect.signature(SentenceTransformer.encode)
    compat.enable_vertical_chunking()
    hooked = inspect.signature(SentenceTransformer.encode)
    added = hooked.parameters["vertical_chunk_size"]
    assert added.kind is inspect.Parameter.KEYWORD_ONLY
    assert added.default is None
    rest = [p for p in hooked.parameters.values() if p is not added]
    assert rest == list(released.parameters.values())
    assert "vertical_chunk_size" in SentenceTransformer.encode.__doc__
    compat.disable_vertical_chunking()
    assert inspect.signature(SentenceTransformer.encode) == released


def test_the_model_arguments_are_those_of_the_released_library(model):
    released = model.get_model_kwargs()
    compat.enable_vertical_chunking()
    assert model.get_model_kwargs() == released
    model.encode(["abc"], vertical_chunk_size=2)
    assert model.get_model_kwargs() == released


def same(a, b):
    """Return whether two outputs of any kind are equal, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return a == b


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"prompt": "query: ", "normalize_embeddings": True, "convert_to_tensor": True},
        {"truncate_dim": 8, "precision": "ubinary", "batch_size": 2},
        {"output_value": "token_embeddings"},
        {"output_value": None},
    ],
)
def test_without_a_chunk_size_encode_gives_bit_for_bit_what_it_gave(model, arguments):
    texts = [text(n) for n in (3, 40, 17)]
    released = model.encode(texts, **arguments)
    compat.enable_vertical_chunking()
    with ops.using("released"):
        assert same(model.encode(texts, **arguments), released)
        # A chunked call must not leave anything behind either.
        model.encode(texts, vertical_chunk_size=8)
        assert same(model.encode(texts, **arguments), released)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_without_a_chunk_size_encode_is_faster_but_gives_the_same(model, backend):
    texts = [text(n) for n in (3, 40, 17)]
    released = model.encode(texts, convert_to_tensor=True)
    compat.enable_vertical_chunking()
    if backend == "native" and ops.backend() != "native":
        pytest.skip(compat.status().cpu)
    with ops.using(backend):
        found = model.encode(texts, convert_to_tensor=True)
    assert not torch.equal(found, released)
    assert (1 - torch.cosine_similarity(found, released)).max() <= COSINE[torch.float32]
    compat.disable_vertical_chunking()
    assert torch.equal(model.encode(texts, convert_to_tensor=True), released)


def test_models_loaded_before_take_part(model):
    full = model.encode([text(30)])
    compat.enable_vertical_chunking()
    chunked = model.encode([text(30)], vertical_chunk_size=8)
    np.testing.assert_allclose(chunked, full, rtol=0, atol=CHUNKED[torch.float32])


def test_a_call_that_failed_leaves_the_next_one_whole(model, monkeypatch):
    compat.enable_vertical_chunking()
    full = model.encode([text(30)])
    with monkeypatch.context() as patch:
        patch.setattr(modules, "stream_sharing", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.encode([text(30)], vertical_chunk_size=8)
    assert same(model.encode([text(30)]), full)
    with pytest.raises(ValueError, match="vertical_chunk_size"):
        model.encode([text(30)], unknown=1, vertical_chunk_size=8)
    assert "vertical_chunk_size" not in model.get_model_kwargs()


# Libraries that are not what the hooks expect.


def _encode_without_keywords(self, inputs, batch_size=32):
    raise NotImplementedError


def _inference_without_output_value(self, inputs, *, show_progress_bar, **kwargs):
    raise NotImplementedError


MODULES = sentence_transformers.sentence_transformer.modules
UNEXPECTED = {
    "no get_model_kwargs": lambda patch: patch.delattr(BaseModel, "get_model_kwargs"),
    "no preprocess": lambda patch: patch.delattr(BaseModel, "preprocess"),
    "no _inference": lambda patch: patch.delattr(SentenceTransformer, "_inference"),
    "no Pooling": lambda patch: patch.delattr(MODULES, "Pooling"),
    "no Pooling.forward": lambda patch: patch.delattr(Pooling, "forward"),
    "Pooling.forward is no method": lambda patch: patch.setattr(Pooling, "forward", None),
    "encode without **kwargs": (
        lambda patch: patch.setattr(SentenceTransformer, "encode", _encode_without_keywords)
    ),
    "_inference without output_value": (
        lambda patch: patch.setattr(
            SentenceTransformer, "_inference", _inference_without_output_value
        )
    ),
}


@pytest.mark.parametrize("unexpected", UNEXPECTED)
def test_an_unexpected_sentence_transformers_is_refused_and_left_alone(monkeypatch, unexpected):
    UNEXPECTED[unexpected](monkeypatch)
    refused = pytest.raises(compat.UnsupportedVersionError)
    # The context manager: hooks that went in anyway are gone before the library is mended.
    with untouched(), refused as caught, compat.vertical_chunking():
        pass
    assert sentence_transformers.__version__ in caught.value.found
    assert "6.2" in caught.value.needed
    assert "pip install" in caught.value.remedy
    for part in (caught.value.found, caught.value.needed, caught.value.remedy):
        assert part in str(caught.value)
    assert states(compat.status())["sentence-transformers"] == "absent"


def test_enabling_works_once_the_library_is_right(monkeypatch):
    with untouched():
        with monkeypatch.context() as patch:
            patch.delattr(BaseModel, "preprocess")
            with pytest.raises(compat.UnsupportedVersionError):
                compat.enable_vertical_chunking()
        report = compat.enable_vertical_chunking()
        assert states(report)["sentence-transformers"] == "patched"
        compat.disable_vertical_chunking()


def _keep_the_newest_only(self, states, *args, **kwargs):
    return states


OLD = {
    "no linear attention cache": lambda patch: patch.delattr(
        "transformers.cache_utils.LinearAttentionLayer"
    ),
    "no reorder_cache": lambda patch: patch.delattr(Cache, "reorder_cache"),
    "the conv state is not put before the chunk": lambda patch: patch.setattr(
        LinearAttentionLayer, "update_conv_state", _keep_the_newest_only
    ),
}


@pytest.mark.usefixtures("fresh_probe")
@pytest.mark.parametrize("old", OLD)
def test_an_old_transformers_is_refused_with_and_without_hooks(monkeypatch, model, old):
    OLD[old](monkeypatch)
    backbone, ids = model.transformers_model, torch.arange(8)[None]
    calls = (
        compat.enable_vertical_chunking,
        lambda: compat.iter_chunks(backbone, input_ids=ids, vertical_chunk_size=4),
        lambda: compat.last_hidden_state(backbone, input_ids=ids, vertical_chunk_size=4),
    )
    with untouched():
        for call in calls:
            with pytest.raises(
                compat.UnsupportedVersionError, match=r"transformers 5.*pip install"
            ):
                call()
        assert set(states(compat.status()).values()) == {"absent"}


@pytest.mark.parametrize("nth", range(len(encoder.plan(nullcontext)) + 1))
def test_a_write_that_fails_in_the_middle_is_rolled_back(monkeypatch, nth):
    planned = encoder.plan(nullcontext)
    planned.insert(nth, (int, "vertical_chunk_size", None))  # int cannot be written to.
    with untouched():
        with monkeypatch.context() as patch:
            patch.setattr(encoder, "plan", lambda: planned)
            with pytest.raises(TypeError):
                compat.enable_vertical_chunking()
        assert states(compat.status())["sentence-transformers"] == "absent"
        compat.disable_vertical_chunking()


def test_a_refused_overwrite_does_not_stop_the_roll_back():
    class Owner:
        name = before = object()

    with pytest.raises(TypeError):
        Patches([(Owner, "name", None), (int, "bit_length", None)])
    assert Owner.name is Owner.before


# Nothing to hook.


def test_a_library_that_has_the_argument_itself_is_native(monkeypatch, model, tmp_path):
    sizes = []
    original = Transformer.forward

    def forward(self, features, vertical_chunk_size=None, **kwargs):
        sizes.append(vertical_chunk_size)
        return original(self, features, **kwargs)

    monkeypatch.setattr(Transformer, "forward", forward)
    monkeypatch.setattr(
        Transformer, "forward_kwargs", {*Transformer.forward_kwargs, "vertical_chunk_size"}
    )
    released = SentenceTransformer.encode
    with compat.vertical_chunking() as report:
        assert states(report)["sentence-transformers"] == "native"
        assert reason(report, "sentence-transformers")
        assert compat.status() == report
        # But for the default that is stored with a model, compat leaves such a library alone.
        assert Transformer.forward is forward
        model.vertical_chunk_size = 8
        model.save(str(tmp_path), create_model_card=False)
        for each in (model, SentenceTransformer(str(tmp_path), device="cpu")):
            each.encode("a text")
            each.encode_query("a text", vertical_chunk_size=4)
    assert sizes == [8, 4, 8, 4]
    assert SentenceTransformer.encode is released


def test_without_sentence_transformers_plain_models_still_work(monkeypatch, model):
    monkeypatch.setattr(encoder, "installed", lambda: False)
    with untouched():
        report = compat.enable_vertical_chunking()
        assert states(report) == {"transformers": "patched", "sentence-transformers": "absent"}
        assert reason(report, "sentence-transformers") == "not installed"
        assert "sentence-transformers  -" in str(report)
        backbone, ids = model.transformers_model, torch.arange(3, 12)[None]
        hidden = compat.last_hidden_state(backbone, input_ids=ids, vertical_chunk_size=4)
    with torch.no_grad():
        full = backbone(ids).last_hidden_state[:, -1]
    torch.testing.assert_close(hidden, full, rtol=0, atol=CHUNKED[torch.float32])


# Errors.

ERRORS = (
    compat.VerticalChunkingError,
    compat.UnsupportedVersionError,
    compat.UnsupportedModelError,
    compat.UnsupportedPipelineError,
)


@pytest.mark.parametrize("error_type", ERRORS)
def test_errors_say_found_needed_remedy_and_survive_pickle(error_type):
    error = error_type("this", "that", "do so")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is error_type
    assert isinstance(copy, compat.VerticalChunkingError)
    assert (copy.found, copy.needed, copy.remedy) == ("this", "that", "do so")
    assert str(copy) == str(error) == "Found: this. Needed: that. Remedy: do so."
