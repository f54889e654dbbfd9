"""Threads: every holder has the hooks until its end, and the last one takes them out."""

import pickle
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from support.embedders import embedder, record_widths, text
from support.families import tiny_model
from support.tolerances import CHUNKED

import compat
from compat.families.lookup import family_patches

TEXTS = [text(n) for n in (30, 17, 12)]
WIDTHS = [8, 8, 8, 6, 8, 9, 8, 4]  # For texts one by one; no chunk has a single token.
METHODS = ["encode", "encode_query", "encode_document"]


def attributes():
    """Return every attribute of the classes that hooks may touch, by identity."""
    owners = (SentenceTransformer, Transformer, Pooling, Dense, Normalize)
    return {(owner, name): id(value) for owner in owners for name, value in vars(owner).items()}


@contextmanager
def put_back():
    """Expect every attribute after the block to be the very object that it was."""
    before = attributes()
    yield
    assert attributes() == before
    assert not any(held.patched for held in family_patches())


def elsewhere(function):
    """Call a function in another thread, and wait for it."""
    raised = []

    def run():
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not raised


@contextmanager
def another_holder():
    """Hold a `with vertical_chunking()` block in another thread; calling the result ends it."""
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with compat.vertical_chunking():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait()

    def end():
        leave.set()
        thread.join()

    try:
        yield end
    finally:
        end()


class DisablingTexts(tuple):
    """Texts that let another thread disable the hooks when a call first looks at them."""

    def __iter__(self):
        elsewhere(compat.disable_vertical_chunking)
        return super().__iter__()


def before_chunk(model, number, function):
    """Call a function in another thread before the model reads its chunk of that number."""
    counted = iter(range(100))

    def hook(*_):
        if next(counted) == number:
            elsewhere(function)

    model.transformers_model.get_input_embeddings().register_forward_pre_hook(hook)


def assert_close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=CHUNKED[torch.float32])


# The size is given by the argument, or by the model's own default.
SIZES = {"argument": {"vertical_chunk_size": 8}, "default": {}}


@pytest.fixture(params=SIZES)
def size(request, model):
    """Return arguments of a call that reads in chunks of 8."""
    if request.param == "default":
        model.vertical_chunk_size = 8
    return {**SIZES[request.param], "batch_size": 1}


@pytest.mark.parametrize("method", METHODS)
def test_a_block_keeps_the_hooks_when_another_threads_block_ends(model, size, method):
    full = getattr(model, method)(TEXTS)
    widths = record_widths(model)
    with put_back(), another_holder() as end, compat.vertical_chunking():
        end()
        assert_close(getattr(model, method)(TEXTS, **size), full)
    assert widths == WIDTHS


def test_a_block_keeps_the_hooks_when_another_thread_disables_them(model, size):
    widths = record_widths(model)
    with put_back(), compat.vertical_chunking():
        elsewhere(compat.disable_vertical_chunking)
        model.encode(TEXTS, **size)
    assert widths == WIDTHS


@pytest.mark.parametrize("chunk", [0, 1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_a_running_call_keeps_the_hooks_when_another_thread_disables_them(
    model, size, method, chunk
):
    full = getattr(model, method)(TEXTS)
    widths = record_widths(model)
    with put_back():
        compat.enable_vertical_chunking()
        before_chunk(model, chunk, compat.disable_vertical_chunking)
        assert_close(getattr(model, method)(TEXTS, **size), full)
    assert widths == WIDTHS


@pytest.mark.parametrize("method", METHODS)
def test_a_call_that_has_only_begun_keeps_the_hooks(model, size, method):
    widths = record_widths(model)
    with put_back():
        compat.enable_vertical_chunking()
        getattr(model, method)(DisablingTexts(TEXTS), **size)
    assert widths == WIDTHS


def test_a_call_that_was_looked_up_with_hooks_on_has_them(model, size):
    widths = record_widths(model)
    with put_back():
        compat.enable_vertical_chunking()
        encode = model.encode
        elsewhere(compat.disable_vertical_chunking)
        encode(TEXTS, **size)
    assert widths == WIDTHS


def test_a_running_call_does_not_mind_hooks_that_come_in_and_go_out(model):
    full = model.encode(TEXTS, batch_size=1)
    widths = record_widths(model)

    def switch():
        with compat.vertical_chunking():
            pass

    with put_back():
        before_chunk(model, 1, switch)
        assert_close(model.encode(TEXTS, batch_size=1), full)
        before_chunk(model, 1, compat.enable_vertical_chunking)
        assert_close(model.encode(TEXTS, batch_size=1), full)
        compat.disable_vertical_chunking()
    assert widths == [len(text) for text in TEXTS] * 2


@pytest.mark.parametrize("method", ["encode", "encode_query"])
def test_a_call_with_a_pool_keeps_the_hooks_when_another_thread_disables_them(model, method):
    full = getattr(model, method)(TEXTS)
    with put_back():
        compat.enable_vertical_chunking()
        texts = DisablingTexts(TEXTS)
        found = getattr(model, method)(texts, device=["cpu"], vertical_chunk_size=8)
    assert_close(found, full)


def test_an_error_in_a_call_lets_the_hooks_go(model):
    with put_back():
        compat.enable_vertical_chunking()
        before_chunk(model, 1, compat.disable_vertical_chunking)
        before_chunk(model, 2, lambda: 1 / 0)
        with pytest.raises(AssertionError):
            model.encode(TEXTS, vertical_chunk_size=8)


def test_holders_are_counted_and_enabling_is_one_of_them():
    with put_back():
        compat.enable_vertical_chunking()
        compat.enable_vertical_chunking()
        with compat.vertical_chunking():
            with compat.vertical_chunking():
                compat.disable_vertical_chunking()
            assert "vertical_chunk_size" in vars(SentenceTransformer)
            compat.enable_vertical_chunking()
        assert "vertical_chunk_size" in vars(SentenceTransformer)
        compat.disable_vertical_chunking()
    with put_back():
        compat.disable_vertical_chunking()
        with compat.vertical_chunking():
            compat.disable_vertical_chunking()
            assert "vertical_chunk_size" in vars(SentenceTransformer)


def test_a_size_that_comes_back_to_its_own_call_does_not_outlive_it(model):
    """Do as a distributed evaluation, where the first rank sends its share to itself."""

    def distributed(inputs, **arguments):
        return model._inference(inputs, **pickle.loads(pickle.dumps(arguments)))

    model._distributed_inference = distributed
    widths = record_widths(model)
    with put_back(), compat.vertical_chunking():
        model.encode(TEXTS, vertical_chunk_size=8, batch_size=1)
    assert widths == WIDTHS


def test_many_threads_that_switch_and_read_at_once(mamba2_checkpoint):
    full = embedder(mamba2_checkpoint).encode(TEXTS)
    models = [embedder(mamba2_checkpoint) for _ in range(3)]
    widths = [record_widths(model) for model in models]
    models[0].vertical_chunk_size = 8
    found, done = [], threading.Event()

    def read(model, arguments):
        for _ in range(5):
            with compat.vertical_chunking():
                found.append(model.encode(TEXTS, batch_size=1, **arguments))

    def switch():
        while not done.wait(0.001):
            compat.enable_vertical_chunking()
            compat.disable_vertical_chunking()

    with put_back():
        switching = threading.Thread(target=switch)
        reading = [
            threading.Thread(target=read, args=(model, SIZES["argument" if place else "default"]))
            for place, model in enumerate(models)
        ]
        for thread in (switching, *reading):
            thread.start()
        for thread in reading:
            thread.join()
        done.set()
        switching.join()
    assert widths == [WIDTHS * 5] * 3
    assert len(found) == 15
    for embeddings in found:
        assert_close(embeddings, full)


@pytest.mark.parametrize(
    "model_type", ["falcon_mamba", "jamba", "mamba", "mamba2", "rwkv", "xlstm"]
)
def test_a_generator_of_chunks_does_not_mind_hooks_that_come_in_and_go_out(model_type):
    model = tiny_model(model_type)
    ids = torch.randint(3, 60, (1, 40))
    with torch.no_grad():
        full = model(ids).last_hidden_state
    pieces = []
    with put_back():
        for _, hidden in compat.iter_chunks(model, input_ids=ids, vertical_chunk_size=8):
            pieces.append(hidden)
            switch = (compat.enable_vertical_chunking, compat.disable_vertical_chunking)
            elsewhere(switch[len(pieces) % 2])
        compat.disable_vertical_chunking()
    assert len(pieces) == 5
    torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=0, atol=CHUNKED[torch.float32])
