"""One bar over the whole job, in characters, that moves within a text."""

import re

import pytest
from support.embedders import embedder, text
from support.stack import FORKS
from tqdm.auto import tqdm

import compat
from compat.hooks import progress
from compat.hooks.cut_texts import CutTextWarning

pytestmark = pytest.mark.skipif(FORKS, reason="the forks show the library's own bar, over batches")

TEXTS = [text(n) for n in (30, 7, 100, 1, 55)]
TOTAL = sum(map(len, TEXTS))


@pytest.fixture
def model(mamba2_checkpoint, capsys):
    loaded = embedder(mamba2_checkpoint)
    compat.enable_vertical_chunking()
    loaded.encode(["a"], vertical_chunk_size=2)
    capsys.readouterr()  # Loading has bars of its own.
    return loaded


@pytest.fixture
def bars(monkeypatch):
    """Return the bars that encode opens; each keeps its positions after every move."""
    opened = []

    class Recorded(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.stood = []
            opened.append(self)

        def update(self, n=1):
            super().update(n)
            self.stood.append(self.n)

    monkeypatch.setattr(progress, "tqdm", Recorded)
    return opened


OUTPUTS = ["sentence_embedding", "token_embeddings", None]


@pytest.mark.parametrize("output_value", OUTPUTS)
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_one_bar_goes_from_nothing_to_all_characters(model, bars, batch_size, output_value):
    model.encode(
        TEXTS,
        vertical_chunk_size=8,
        batch_size=batch_size,
        output_value=output_value,
        show_progress_bar=True,
    )
    (bar,) = bars
    assert bar.total == TOTAL
    assert bar.stood == sorted(bar.stood)
    assert bar.stood[-1] == TOTAL


@pytest.mark.parametrize("output_value", OUTPUTS)
def test_it_moves_within_a_single_text(model, bars, output_value):
    model.encode(
        [text(100)], vertical_chunk_size=10, output_value=output_value, show_progress_bar=True
    )
    (bar,) = bars
    assert bar.stood == list(range(10, 101, 10))


def test_a_prompt_is_not_part_of_the_job(model, bars):
    model.encode(TEXTS, prompt="query: ", vertical_chunk_size=8, show_progress_bar=True)
    (bar,) = bars
    assert (bar.total, bar.n) == (TOTAL, TOTAL)


def test_a_text_that_is_cut_to_the_models_length_counts_whole(model, bars):
    model.max_seq_length = 16
    with pytest.warns(CutTextWarning):
        model.encode([text(100)], vertical_chunk_size=8, show_progress_bar=True)
    (bar,) = bars
    assert (bar.total, bar.n) == (100, 100)


def test_the_bar_stands_in_for_the_librarys_own(model, capsys):
    model.encode(TEXTS, vertical_chunk_size=8, batch_size=1, show_progress_bar=True)
    shown = capsys.readouterr().err
    assert set(re.findall(r"(\w+):\s+\d+%", shown)) == {"Chunks"}
    assert f"{TOTAL}/{TOTAL}" in shown


@pytest.mark.parametrize("arguments", [{}, {"show_progress_bar": False}])
def test_nothing_is_shown_where_none_is_asked_for(model, capsys, arguments):
    model.encode(TEXTS, vertical_chunk_size=8, **arguments)
    assert capsys.readouterr() == ("", "")


def test_without_a_chunk_size_the_librarys_own_bar_is_shown(model, bars, capsys):
    model.encode(TEXTS, show_progress_bar=True)
    assert not bars
    assert "Batches: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("show", [False, True])
def test_an_outer_bar_is_moved_over_several_calls_and_is_the_only_one(model, bars, show):
    with tqdm(total=2 * TOTAL, disable=False) as outer:
        with progress.into(outer):
            model.encode(TEXTS, vertical_chunk_size=8, show_progress_bar=show)
            assert outer.n == TOTAL
            model.encode(TEXTS, vertical_chunk_size=8, batch_size=2, show_progress_bar=show)
            assert outer.n == 2 * TOTAL
        assert not bars
        model.encode(TEXTS, vertical_chunk_size=8, show_progress_bar=True)
        assert outer.n == 2 * TOTAL
        assert len(bars) == 1


def test_the_bar_is_closed_when_a_call_fails(model, bars):
    def fail(*_):
        raise ZeroDivisionError

    model.transformers_model.norm_f.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model.encode(TEXTS, vertical_chunk_size=8, show_progress_bar=True)
    (bar,) = bars
    assert bar.disable  # Closing sets it.
