"""Worker processes chunk too, in any pool; one that cannot raises in the parent."""

import os

import numpy as np
import pytest
import torch
from support.embedders import embedder, save_checkpoint, text
from support.stack import ASKED, FORKS, released_only
from support.tolerances import CHUNKED

import compat

# A worker is a new Python that imports torch, so the module shares one pool where it can.

TEXTS = [text(n) for n in (40, 3, 17, 25, 1)]


class WidthLog:
    """A hook on the embedding layer that notes which process reads how many tokens at a time.

    It is pickled with the model, so that a worker's copy writes to the same file.
    """

    def __init__(self, path):
        self.path = path

    def __call__(self, layer, args):
        with open(self.path, "a") as file:  # noqa: PTH123 (one write call: lines stay whole)
            file.write(f"{os.getpid()} {args[0].shape[1]}\n")

    def read(self):
        """Return the processes and the widths that they read since the last call, in order."""
        pairs = [tuple(map(int, line.split())) for line in self.path.read_text().splitlines()]
        self.path.write_text("")
        return [process for process, _ in pairs], sorted(width for _, width in pairs)


def logged_model(folder):
    """Make a tiny embedder, and the log of what it reads in whatever process."""
    model = embedder(save_checkpoint(folder / "checkpoint"))
    log = WidthLog(folder / "widths.txt")
    log.path.touch()
    model.transformers_model.get_input_embeddings().register_forward_pre_hook(log)
    return model, log


def assert_close(chunked, full):
    np.testing.assert_allclose(chunked, full, rtol=0, atol=CHUNKED[torch.float32])


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    model, log = logged_model(tmp_path_factory.mktemp("workers"))
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    yield model, log, pool
    model.stop_multi_process_pool(pool)


@pytest.fixture
def started(shared):
    """Return a model, its empty log, and a pool of two that was started without hooks."""
    shared[1].read()
    return shared


@pytest.fixture
def whole(started):
    """Return the embeddings of whole texts, by the released library in this process."""
    model, log, _ = started
    embeddings = model.encode(TEXTS)
    log.read()
    return embeddings


def test_a_pool_from_before_the_hooks_reads_chunks(started, whole):
    model, log, pool = started
    compat.enable_vertical_chunking()
    assert_close(model.encode(TEXTS, pool=pool, vertical_chunk_size=8, chunk_size=1), whole)
    readers, widths = log.read()
    assert set(readers) <= {process.pid for process in pool["processes"]}
    # A last chunk of one token, of 17 and 25, joins the chunk before it.
    if not FORKS:
        assert widths == sorted([8] * 5 + [3] + [8, 9] + [8, 8, 9] + [1])
    assert max(widths) == max(9, ASKED)


def test_a_pool_reads_whole_texts_again_when_no_chunks_are_asked_for(started, whole):
    model, log, pool = started
    compat.enable_vertical_chunking()
    model.encode(TEXTS, pool=pool, vertical_chunk_size=8, chunk_size=1)
    log.read()
    assert_close(model.encode(TEXTS, pool=pool, chunk_size=1), whole)
    assert log.read()[1] == sorted(map(len, TEXTS))
    compat.disable_vertical_chunking()
    assert_close(model.encode(TEXTS, pool=pool, chunk_size=1), whole)
    assert log.read()[1] == sorted(map(len, TEXTS))


@released_only
def test_the_models_own_size_reaches_a_pool_that_is_older(started, whole, monkeypatch):
    model, log, pool = started
    compat.enable_vertical_chunking()
    monkeypatch.setattr(model, "vertical_chunk_size", 10)
    assert_close(model.encode(TEXTS, pool=pool, chunk_size=len(TEXTS)), whole)
    assert log.read()[1] == [10, 10, 10, 10]


@pytest.mark.parametrize("method", ["encode_query", "encode_document"])
def test_queries_and_documents_are_chunked_by_the_workers(started, whole, method):
    model, log, pool = started
    compat.enable_vertical_chunking()
    assert_close(getattr(model, method)(TEXTS, pool=pool, vertical_chunk_size=8), whole)
    assert max(log.read()[1]) <= max(9, ASKED)


@released_only
def test_token_embeddings_come_back_in_order(started):
    model, _, pool = started
    compat.enable_vertical_chunking()
    arguments = {"output_value": "token_embeddings"}
    chunked = model.encode(TEXTS, pool=pool, vertical_chunk_size=8, **arguments)
    for one, other in zip(chunked, model.encode(TEXTS, **arguments), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("size", [0, "8"])
def test_a_bad_size_is_refused_before_a_worker_sees_it(started, size):
    model, log, pool = started
    compat.enable_vertical_chunking()
    with pytest.raises((TypeError, ValueError), match="vertical_chunk_size must be"):
        model.encode(TEXTS, pool=pool, vertical_chunk_size=size)
    assert log.read() == ([], [])


@released_only
def test_a_text_without_a_token_is_named_by_its_place_in_the_whole_list(started):
    model, _, pool = started
    compat.enable_vertical_chunking()
    with pytest.raises(ValueError, match="Text 3 is ''"):
        model.encode(["a", "b", "c", "", "d"], pool=pool, vertical_chunk_size=8, chunk_size=2)


def test_after_an_error_the_pool_goes_on(started, whole):
    model, _, pool = started
    compat.enable_vertical_chunking()
    with pytest.raises(ValueError, match="no token"):
        model.encode([""], pool=pool, vertical_chunk_size=8)
    assert_close(model.encode(TEXTS, pool=pool, vertical_chunk_size=8), whole)


def test_a_list_of_devices_starts_workers_that_chunk(tmp_path):
    model, log = logged_model(tmp_path)
    whole = model.encode(TEXTS)
    log.read()
    compat.enable_vertical_chunking()
    chunked = model.encode(TEXTS, device=["cpu", "cpu"], vertical_chunk_size=8)
    assert_close(chunked, whole)
    readers, widths = log.read()
    assert os.getpid() not in readers
    assert max(widths) == max(9, ASKED)


@released_only
def test_what_a_worker_refuses_is_raised_as_it_is(tmp_path):
    model, log = logged_model(tmp_path)
    model.transformers_model.config.output_hidden_states = True
    compat.enable_vertical_chunking()
    with pytest.raises(compat.UnsupportedPipelineError) as here:
        model.encode(TEXTS, vertical_chunk_size=8)
    with pytest.raises(compat.UnsupportedPipelineError) as there:
        model.encode(TEXTS, device=["cpu"], vertical_chunk_size=8)
    assert str(there.value) == str(here.value)
    assert log.read() == ([], [])


@released_only
def test_a_worker_that_cannot_import_compat_raises_here(tmp_path, monkeypatch, capfd):
    # The log is left out, because it is defined in this module, which imports compat.
    model = embedder(save_checkpoint(tmp_path / "checkpoint"))
    compat.enable_vertical_chunking()
    (tmp_path / "compat.py").write_text("raise ImportError('not for this worker')")
    # A worker takes over this process's path; compat is imported here already.
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match=r"worker.*died"):
        model.encode(TEXTS, device=["cpu"], vertical_chunk_size=8)
    assert "ImportError: not for this worker" in capfd.readouterr().err
