"""The benchmarks of states and of files, and the demo of states, run; both ways give the same."""

import re
import sys

import numpy as np
import pytest

import compat
from ci import corpus, demo_states
from ci.bench import file_memory, states
from ci.bench.measure import Measurement
from ci.tables import markers
from compat.default_model import load_default_model
from compat.hooks import streamed_texts
from compat.jobs import text_files
from compat.stream import shared_prefix


def here(setup, work):
    """Stand in for `measure`, without a process."""
    return Measurement(1.0, 10**6, True, work(setup()))


def test_the_smoke_size_runs_every_row(monkeypatch, tmp_path):
    page = tmp_path / "RESULTS.md"
    page.write_text("before\n<!-- states -->\n<!-- /states -->\nbehind\n")
    monkeypatch.setattr(markers, "BENCH", page)
    monkeypatch.setattr(states, "measure", here)
    states.main(["--smoke", "--readme"])
    text = page.read_text()
    assert "**Smoke sizes" in text
    for title in ("| 60 queries of", "| 6 queries of", "| append 100", " passages of a book", "MB"):
        assert title in text


def test_ratios_are_those_of_the_rounds():
    row = states.timed("title", "goal", [(1.0, 2.0), (1.0, 4.0), (2.0, 6.0)])
    assert row == states.Row("title", "goal", "1 s", "4 s", "3.0 (2.0 to 4.0)")


def test_other_embeddings_are_an_error():
    states.require_same(np.ones((2, 3)), 2 * np.ones((2, 3)))
    with pytest.raises(RuntimeError, match="other embeddings"):
        states.require_same(np.ones(3), np.array([1.0, 1.0, 1.1]))
    with pytest.raises(RuntimeError, match="other embeddings"):
        states.require_same(np.ones(3), np.full(3, np.nan))


def test_without_sharing_means_so():
    found = states.without_sharing(lambda: shared_prefix.SPARED)
    assert found > 10**9 > shared_prefix.SPARED


def test_the_demo_finds_passages_and_watches_a_log():
    compat.enable_vertical_chunking()
    model = load_default_model(device="cpu")
    book = corpus.long_text()[:4000]
    ((score, place, words),) = demo_states.search_inside(model, book, ["assertions"])
    assert 0 < score < 1
    assert words.split()[0] in book[place:]
    seen = list(demo_states.watch(model, 20))
    assert [lines for lines, *_ in seen] == list(range(2, 21, 2))
    tokens = [count for _, count, _ in seen]
    assert tokens == sorted(tokens)


def test_the_memory_of_a_file_is_measured_in_each_way_and_written(monkeypatch, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- file-memory -->\n<!-- /file-memory -->\nbehind\n")
    monkeypatch.setattr(markers, "README", readme)
    monkeypatch.setattr(file_memory, "PLOT", tmp_path / "plot.png")
    monkeypatch.setattr(file_memory, "TOKENIZED", 50_000)
    for module in (streamed_texts, text_files):
        monkeypatch.setattr(module, "LONG", module.LONG)  # It is set in a process of its own.
    monkeypatch.setattr(file_memory, "measure", here)
    monkeypatch.setattr(
        sys, "argv", ["file_memory", "--megabytes", "0.04", "--readme", "--output", f"{tmp_path}"]
    )
    assert file_memory.main() == 0
    assert re.search(r"\| 0.04 MB \| 10,\d{3} \| 1 MB \| 1 MB \| 1 MB \|", readme.read_text())
    assert (tmp_path / "plot.png").stat().st_size > 10_000
