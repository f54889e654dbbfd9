"""The benchmark runs and counts correctly; no test looks at a time."""

import json
import math
import re

import pytest
import torch
import transformers

from ci.bench import __main__ as bench
from ci.bench import chunk_sizes, contenders, plots, short_texts, training
from ci.bench.contenders import (
    BATCH,
    FLOOR,
    FULL,
    NORMS,
    RELEASED,
    SMOKE,
    TRANSFORMER,
    Contender,
    Sizes,
    Timing,
)
from ci.bench.measure import Measurement
from ci.tables import markers
from compat import ops

MB = 10**6


def timings(comparison):
    """Yield the timings of a comparison whose contenders are equally fast and large."""
    for process in bench.comparisons(SMOKE)[comparison]:
        for contender in process:
            found = [1.0] * contender.rounds
            yield Timing(contender.name, contender.tokens, found, MB if len(process) == 1 else None)


def here(setup, work):
    """Stand in for `measure`, without a process."""
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    try:
        return Measurement(1.0, MB, True, work(setup()))
    finally:
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity(verbosity)


@pytest.fixture
def measured(monkeypatch):
    """Replace the measuring: nothing runs, requests are noted, and the peaks can be set."""
    asked = []

    def compete(contenders, sizes, threads):
        asked.extend(contender.name for contender in contenders)
        peak = compete.peaks[len(asked) % len(compete.peaks)] if len(contenders) == 1 else None
        return [Timing(c.name, c.tokens, [1e6] * c.rounds, peak) for c in contenders]

    compete.peaks, compete.asked = [50 * MB], asked
    monkeypatch.setattr(bench, "compete", compete)
    monkeypatch.setattr(plots, "draw", lambda runs, folder: None)
    return compete


def test_the_smoke_size_runs_every_row_and_writes_every_file(tmp_path, monkeypatch):
    from matplotlib.image import imread

    # In a process for each it would take four times as long; test_measure has the processes.
    monkeypatch.setattr(contenders, "measure", here)
    assert bench.main(["--smoke", "--threads", "1", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "bench.json").read_text())
    ran = bench.comparisons(SMOKE)  # RWKV-7 is read where fla is installed.
    titles = [row.title for row in bench.ROWS if row.comparison in ran]
    titles += [bench.PEAK, bench.SPREAD]
    assert [row[""] for row in report["rows"]] == titles
    best = ops.backend()
    for row in report["rows"]:
        assert math.isfinite(float(re.match(r"[\d.]+", row[best])[0]))
    assert set(report["runs"]) == set(ran) == set(report["dates"])
    for run in report["runs"].values():
        for timing in run:
            assert timing["seconds"]
            assert all(0 < seconds < math.inf for seconds in timing["seconds"])
    for plot in ("time.png", "memory.png", "floor.png"):
        assert imread(tmp_path / plot).std() > 0
    assert all(title in (tmp_path / "README.md").read_text() for title in titles)


def test_contenders_take_turns_and_each_runs_its_own_number_of_rounds():
    calls = []

    def read_by(name):
        return lambda tokens: calls.append(name) or 2 * tokens

    ready = [(Contender(name, 8, rounds), read_by(name)) for name, rounds in [("a", 3), ("b", 2)]]
    found = contenders._alternate(ready)
    assert calls == ["a", "b", "a", "b", "a"]
    assert [(t.contender, t.tokens, len(t.seconds)) for t in found] == [("a", 16, 3), ("b", 16, 2)]


def test_nothing_of_the_size_of_a_chunk_is_kept_from_before_memory_is_measured(monkeypatch):
    read = []
    monkeypatch.setattr(contenders, "reader", lambda contender, sizes: read.append)
    for names in (["a"], ["a", "b"]):
        contenders._prepare([Contender(name, 8192, 1) for name in names], Sizes(), 1)
    assert read == [16, 1024, 1024]


def test_readers_run_on_what_their_names_say(monkeypatch):
    calls = []

    def last_hidden_state(model, *, input_ids, attention_mask, vertical_chunk_size):
        rows, tokens = attention_mask.sum(1).tolist(), input_ids.shape[1]
        calls.append((ops.backend(), rows, tokens, vertical_chunk_size))

    monkeypatch.setattr(contenders.compat, "last_hidden_state", last_hidden_state)
    backend = ops.backend()
    read = {
        name: contenders.reader(Contender(name, 256, 1), SMOKE)
        for name in ("torch", backend, backend + FULL, backend + BATCH)
    }
    assert [read[name](256) for name in read] == [256] * (len(read) - 1) + [510]
    halves = [256, 128, 64, 32, 16, 8, 4, 2]
    wanted = [(name, [256], 256, 64) for name in dict.fromkeys(["torch", backend])]
    assert calls == [*wanted, (backend, [256], 256, 256), (backend, halves, 256, 64)]


def test_the_floor_is_the_two_products_of_every_layer_and_chunk(monkeypatch):
    shapes = []

    def linear(inputs, weight):
        shapes.append((tuple(inputs.shape), tuple(weight.shape)))

    monkeypatch.setattr(contenders, "linear", linear)
    assert contenders.reader(Contender(FLOOR, 96, 1), SMOKE)(96) == 96
    hidden, inner = 128, 256
    projected = 2 * inner + 2 * 16 + inner // 64
    layer = [((1, 64, hidden), (projected, hidden)), ((1, 64, inner), (hidden, inner))]
    last = [((1, 32, *shape[2:]), weight) for shape, weight in layer]
    assert shapes == layer * SMOKE.layers + last * SMOKE.layers


def test_the_models_are_of_the_size_that_the_table_names():
    sizes = Sizes()
    wanted = {"mamba2": 130e6, "mamba": 130e6, "rwkv": 169e6, "gpt_neox": 124e6}
    published = 50_280 * sizes.hidden_size  # The embeddings, which the benchmark makes small.
    for model_type, parameters in wanted.items():
        with torch.device("meta"):
            model = contenders.make_model.__wrapped__(model_type, sizes, "float32")
        own = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n)
        heads = 2 if model_type == "rwkv" else 1  # RWKV does not tie its embeddings in and out.
        assert own + heads * published == pytest.approx(parameters, rel=0.03), model_type


def test_a_ratio_is_of_times_per_token_in_the_same_round():
    row = bench.Row("", "", "", "floor")
    run = [Timing("floor", 100, [1.0, 2.0, 4.0]), Timing("native", 100, [3.0, 4.0])]
    assert bench.ratios(run, row, "native") == ([3.0, 2.0], "")
    assert bench.ratios(run, row, "torch") is None
    faster = bench.Row("", "", "", "floor", faster=True)
    assert bench.ratios(run, faster, "native") == ([1 / 3, 1 / 2], "")


def test_a_reader_of_fewer_tokens_says_so_and_of_more_lengths_the_same_one_is_taken():
    row = bench.Row("", "", "", TRANSFORMER, faster=True)
    run = [Timing(name, n, [n / 10]) for name in ("native", TRANSFORMER) for n in (10, 100)]
    run += [Timing("native", 1000, [1e9]), Timing(RELEASED, 20, [1.0])]
    assert bench.ratios(run, row, "native") == ([1.0], "")
    assert bench.ratios(run, row, RELEASED) == ([2.0], ", on 20 tokens")


def test_the_rows_cover_every_comparison_and_each_has_a_number_for_the_best_reader(monkeypatch):
    for library in (object(), None):
        monkeypatch.setattr(bench.compiled, "library", lambda found=library: found)
        best = "native" if library else "torch"
        runs = {name: list(timings(name)) for name in bench.comparisons(SMOKE)}
        assert all(re.match("[0-9]", row[best]) for row in bench.table(runs))
        rows = [row for row in bench.ROWS if row.comparison in runs]
        assert len(bench.table(runs)) == len(rows) + 2
        assert {row.comparison for row in rows} == set(runs)
        if library is None:
            assert not any("native" in row for row in bench.table(runs))


def test_nothing_is_compared_with_itself_and_peaks_are_compared_with_each_other():
    run = [Timing(name, 10, [1.0], 7 * MB) for name in ("native", RELEASED)]
    run.append(Timing("native", 20, [1.0], 9 * MB))
    rows = {row[""]: row for row in bench.table({"mamba": run, "lengths": run})}
    assert [RELEASED in row for row in rows.values()] == [False, True, True]
    assert [rows[title]["native"] for title in (bench.PEAK, bench.SPREAD)] == ["9 MB", "2 MB"]


def test_parts_add_up_to_the_whole():
    run = [Timing(FLOOR, 10, [2.0]), Timing(NORMS, 10, [0.5]), Timing("native", 5, [2.0])]
    parts = plots.over_floor(run, "native")
    assert list(parts.values()) == [1.0, 0.25, 0.75]
    assert plots.over_floor(run, "torch") is None


def test_memory_that_is_not_flat_is_exit_status_1_and_times_never_are(tmp_path, measured, capsys):
    arguments = ["--smoke", "--output", str(tmp_path), "--only", "lengths"]
    assert bench.main(arguments) == 0
    measured.peaks = [50 * MB, 50 * MB + int(bench.ALLOWED_SPREAD) + MB]
    assert bench.main(arguments) == 1
    assert "apart" in capsys.readouterr().out


def test_only_merges_with_what_is_there(tmp_path, measured, capsys):
    def run(*names, threads=1):
        options = ["--smoke", "--threads", str(threads), "--output", str(tmp_path), "--only"]
        assert bench.main([*options, *names]) == 0
        return set(json.loads((tmp_path / "bench.json").read_text())["runs"])

    assert run("mamba") == {"mamba"}
    assert run("rwkv", "xlstm") == {"mamba", "rwkv", "xlstm"}
    before = len(measured.asked)
    assert run() == {"mamba", "rwkv", "xlstm"}
    assert len(measured.asked) == before
    assert "begun anew" not in capsys.readouterr().out
    assert run("batch", threads=2) == {"batch"}
    assert "begun anew" in capsys.readouterr().out


def test_the_results_get_the_section_between_their_markers(tmp_path, measured, monkeypatch):
    path = tmp_path / "PROJECT.md"
    path.write_text("before\n\n<!-- bench -->\nold\n<!-- /bench -->\n\nafter\n")
    monkeypatch.setattr(markers, "BENCH", path)
    options = ["--smoke", "--readme", "--output", str(tmp_path), "--only", "batch"]
    assert bench.main(options) == bench.main(options) == 0
    section = (tmp_path / "README.md").read_text()
    assert path.read_text() == f"before\n\n<!-- bench -->\n{section}<!-- /bench -->\n\nafter\n"
    path.write_text("no markers")
    with pytest.raises(ValueError, match="needs the lines"):
        bench.main(options)


@pytest.fixture
def page(monkeypatch, tmp_path):
    """Return a page with markers, to be written in the place of RESULTS.md."""
    path = tmp_path / "RESULTS.md"
    names = ("chunk-sizes", "short-texts", "training")
    sections = (f"<!-- {name} -->\n<!-- /{name} -->" for name in names)
    path.write_text("\n".join(["before", *sections, "behind", ""]))
    monkeypatch.setattr(markers, "BENCH", path)
    return path


def test_sizes_of_chunks_are_compared_in_every_shape(page):
    chunk_sizes.main(["--smoke", "--readme"])
    text = page.read_text()
    assert "**Smoke sizes" in text
    assert text.count("| float32 |") == text.count("| bfloat16 |") == len(chunk_sizes.SHAPES)


def test_short_texts_are_measured_in_every_model(page):
    short_texts.main(["--smoke", "--readme"])
    text = page.read_text()
    assert "**Smoke sizes" in text
    assert all(text.count(f"| {name} |") == 2 for name in short_texts.MODELS)


def test_steps_of_training_are_measured_in_every_way(page, monkeypatch):
    monkeypatch.setattr(training, "measure", here)
    # Each process makes a model of its own, and may checkpoint its layers.
    monkeypatch.setattr(training, "make_model", contenders.make_model.__wrapped__)
    training.main(["--smoke", "--readme", "--layers", "1", "--width", "64"])
    text = page.read_text()
    assert "**Smoke sizes" in text
    ways = (training.PASS, training.LAYERS, TRANSFORMER, training.CHUNKS, training.AUTO)
    assert all(text.count(f"| {way} |") >= 2 for way in ways)
    assert text.count("MB |") >= 2 * len(ways)


def test_a_size_that_misses_its_goal_is_bold():
    found = {
        "512": [2.2, 2.0],
        "floor 512": [1.0, 1.0],
        "1024": [2.0, 2.0],
        "floor 1024": [1.0] * 2,
    }
    cells = chunk_sizes.row(
        "7B", "float32", found | {"256": [3.0] * 2, "floor 256": [1.0] * 2}, 1024, (256, 512)
    )
    assert cells == ["7B", "float32", "2.00", "1.50 (1.00)", "1.05 (1.00)"]
    found["floor 512"] = [1.5, 1.5]
    cells = chunk_sizes.row("7B", "float32", found | {"512": [2.4] * 2}, 1024, (512,))
    assert cells[3:] == ["1.20 (1.50)"]
    found["floor 512"] = [1.1, 1.1]
    cells = chunk_sizes.row("7B", "float32", found | {"512": [2.4] * 2}, 1024, (512,))
    assert cells[3:] == ["**1.20** (1.10)"]
