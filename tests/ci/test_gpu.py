"""What is kept of a GPU's stages, and what is said of them; the stages rehearse in test-kernels."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from support.families import tiny_model, tokens

from ci import forks
from ci.gpu import build, kernels, report, table, work
from ci.gpu.graph import GraphedStep, slots
from ci.gpu.place import ON_CPU, Place, sources
from ci.gpu.table import NOT_RUN, Record, SpoiledError, UnavailableError
from ci.gpu.tests import REQUESTS, SANITIZED
from ci.tables import markers
from compat.families.lookup import backbone_of

PAGE = "forks/causal-conv1d/pull_requests/01-short.md"
DEVICE = "A GPU"


def place(folder, device=DEVICE, contents="1"):
    machine = {"device": device, "date": "2026-11-30", "packed": contents}
    return SimpleNamespace(out=folder, also=folder / "also", machine=machine, title="")


def made(folder, makers, **of):
    """Return the rows that a stage makes, and those that it finds."""
    calls = []

    def counted(name, make):
        def call():
            calls.append(name)
            return make()

        return call

    record = Record(place(folder, **of), "stage", seconds=60)
    makers = {name: counted(name, make) for name, make in makers.items()}
    rows = record.table("table", ["value"], makers)
    return rows, calls, record


def test_a_stage_goes_on_from_its_rows(tmp_path, capsys):
    def fails():
        raise RuntimeError("no such kernel")

    rows, calls, record = made(
        tmp_path,
        {"good": lambda: {"value": 1}, "bad": fails, "wrong": lambda: {"value": 2, "fault": "two"}},
    )
    assert rows["bad"][NOT_RUN] == "RuntimeError: no such kernel"
    assert record.faults == ["bad: RuntimeError: no such kernel", "wrong: two"]
    assert "no such kernel" in capsys.readouterr().out
    rows, calls, record = made(tmp_path, dict.fromkeys(calls, lambda: {"value": 3}))
    assert (rows["good"]["value"], rows["bad"]["value"]) == (1, 3)
    assert calls == ["bad", "wrong"]
    assert (tmp_path / "also/stage.json").read_text() == (tmp_path / "stage.json").read_text()
    assert not record.faults


def test_what_a_machine_lacks_is_said_and_no_fault(tmp_path):
    def lacks():
        raise UnavailableError("there is no nvcc")

    rows, _, record = made(tmp_path, {"row": lacks})
    assert rows["row"] == {NOT_RUN: "there is no nvcc"}
    assert not record.faults


def test_rows_are_made_with_the_settings_of_the_stage(tmp_path):
    record = Record(place(tmp_path), "stage", seconds=60)
    with torch.no_grad():
        rows = record.table("table", [], {"row": lambda: {"gradient": torch.is_grad_enabled()}})
    assert not rows["row"]["gradient"]


def test_a_row_that_spoils_the_device_is_kept_and_not_tried_again(tmp_path, monkeypatch):
    def fails():
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(table, "is_spoiled", lambda: True)
    makers = {"before": lambda: {"value": 1}, "bad": fails, "after": lambda: {"value": 2}}
    with pytest.raises(SpoiledError):
        made(tmp_path, makers)
    rows, calls, _ = made(tmp_path, makers)
    assert calls == ["after"]
    assert "illegal" in rows["bad"][NOT_RUN]


@pytest.mark.parametrize("other", [{"device": "another"}, {"contents": "2"}])
def test_rows_of_another_machine_or_folder_are_made_again(tmp_path, other):
    made(tmp_path, {"row": lambda: {"value": 1}})
    assert made(tmp_path, {"row": lambda: {"value": 2}}, **other)[0]["row"]["value"] == 2


def test_no_row_is_begun_when_the_time_is_spent(tmp_path):
    record = Record(place(tmp_path), "stage", seconds=-1)
    assert NOT_RUN in record.table("table", ["value"], {"row": lambda: {"value": 1}})["row"]
    assert record.late


@pytest.fixture
def repository(tmp_path):
    """Make a repository of a README and a page, both with markers."""
    for library in ("causal-conv1d", "mamba-ssm"):
        toml = forks.ROOT / "forks" / library / "fork.toml"
        (tmp_path / "forks" / library / "pull_requests").mkdir(parents=True)
        (tmp_path / "forks" / library / "fork.toml").write_text(toml.read_text())
    for name in ("README.md", PAGE):
        (tmp_path / name).write_text("before\n<!-- gpu -->\n<!-- /gpu -->\n")
    return tmp_path


def results(folder, device):
    tables = {
        REQUESTS: {
            "columns": ["tests"],
            "rows": {
                "causal-conv1d: short": {
                    "tests": 1,
                    "fail on stock": "2 of 2",
                    "pass patched": "2 of 2",
                }
            },
        },
        "Over the length of a text": {
            "columns": ["full s", "full MB"],
            "rows": {
                f"m, {n}": {"full s": n / 1e3, "full MB": 1.0, "model": "m", "tokens": n}
                for n in (1024, 2048)
            },
        },
    }
    folder.mkdir()
    machine = place(folder, device).machine
    found = {"stage": "tests", "machine": machine, "tables": tables}
    (folder / "tests.json").write_text(json.dumps(found))
    return folder


def test_without_results_the_texts_say_that_nothing_was_run(repository):
    report.report([], repository, repository / "results")
    for name in ("README.md", PAGE):
        assert report.NOTHING in (repository / name).read_text()


def test_results_become_tables_plots_and_a_line_on_each_page(repository):
    report.report([results(repository / "out", DEVICE)], repository, repository / "results")
    (kept,) = (repository / "results").iterdir()
    assert {path.name for path in kept.iterdir()} == {
        *("README.md", "tests.json"),
        *("length-s.png", "length-MB.png"),
    }
    assert "| causal-conv1d: short | 1 |" in (kept / "README.md").read_text()
    assert f"results/{kept.name}/README.md" in (repository / "README.md").read_text()
    assert "2 of 2 cases fail on the release" in (repository / PAGE).read_text()


def test_a_rehearsal_is_no_result(repository):
    with pytest.raises(RuntimeError, match="rehearsal"):
        report.report([results(repository / "out", ON_CPU)], repository, repository / "results")


def test_the_committed_texts_are_what_report_writes(monkeypatch):
    written = {}
    monkeypatch.setattr(markers, "put", lambda _, text, path: written.update({path: text}))
    report.report([])
    for path, text in written.items():
        assert f"<!-- gpu -->\n{text}\n<!-- /gpu -->" in path.read_text(), path


def test_what_is_chosen_by_name_is_there():
    names = {
        page.stem.partition("-")[2]
        for library in ("causal-conv1d", "mamba-ssm")
        for page in forks.Fork.read(library).requests.glob("[0-9]*.md")
    }
    assert {name for _, name in SANITIZED} <= names


def test_a_packed_folder_has_its_sources_as_they_are(tmp_path):
    (tmp_path / forks.PACKED).write_text("{}")
    (tmp_path / "forks/causal-conv1d").mkdir(parents=True)
    toml = (forks.ROOT / "forks/causal-conv1d/fork.toml").read_text()
    (tmp_path / "forks/causal-conv1d/fork.toml").write_text(toml)
    assert forks.stock("causal-conv1d", tmp_path) == tmp_path / "forks/causal-conv1d/stock"
    assert forks.patched("causal-conv1d", tmp_path) == tmp_path / "forks/causal-conv1d/tree"


def test_each_op_is_measured_with_what_the_patches_add():
    for cases in (work.CASES, work.TINY):
        assert len({(case.op, case.name) for case in cases}) == len(cases)
        modes = {(case.op, mode) for case in cases for mode in case.modes}
        assert {(work.SSD, work.CONV_STATES), (work.SCAN, work.INITIAL)} <= modes
        assert {op for op, _ in modes} == {work.CONV, work.SSD, work.SCAN}


def test_a_captured_step_leaves_its_state_where_it_was_read():
    """What CUDA would capture is run as it is: a graph reads and writes the same tensors."""
    model = tiny_model("mamba2")
    backbone, family = backbone_of(model)
    step, state = GraphedStep(model, 1, 8), None
    with torch.no_grad():
        for start, ids in zip((0, 8, 16), tokens(1, 24).split(8, 1), strict=True):
            if start:
                before = [held[key].data_ptr() for held, key in slots(step._state)]
                step._ids.copy_(ids)
                found = step._step(8)
                assert [held[key].data_ptr() for held, key in slots(step._state)] == before
            else:
                found = step(ids)
            wanted, state = family.forward(backbone, ids, start, state)
            assert torch.equal(found, wanted)


def test_a_worker_that_ends_is_started_again(tmp_path, monkeypatch):
    worker = kernels.Worker(Place(tmp_path, None, rehearsed=True), "stock")
    code = "import sys; sys.stdin.readline(); print('{\"found\": 1}', flush=True)"
    monkeypatch.setattr(worker, "_command", [sys.executable, "-c", code])
    assert worker.ask("time") == 1
    with pytest.raises(RuntimeError, match="status 0"):
        worker.ask("time")
    assert worker.ask("time") == 1
    worker.end()


@pytest.mark.parametrize(
    ("patched", "said"), [(1.0, "same"), (1.2, "same"), (1.3, "slower"), (0.7, "faster")]
)
def test_patched_is_as_fast_as_stock_where_it_lies_within_its_rounds(patched, said):
    assert kernels.verdict([0.8, 1.0, 1.2], [patched, 0.1, 9.0]) == said


def test_ptxas_is_read_of_each_part_of_a_log(tmp_path):
    said = """
ptxas info    : Compiling entry function '{name}' for 'sm_90'
ptxas info    : Function properties for {name}
    0 bytes stack frame, {spilled} bytes spill stores, {spilled} bytes spill loads
ptxas info    : Used {registers} registers
"""
    kernel = "_Z6kernelILi128EfEvv"
    parts = [said.format(name=kernel, spilled=s, registers=r) for s, r in [(4, 40), (0, 32)]]
    (tmp_path / "build").mkdir()
    # A run that was interrupted, and the one that went on, which compiled the kernel again.
    for number, part in enumerate(parts):
        (tmp_path / "build" / f"stock-lib-{number}.log").write_text(f"[1/2] nvcc\n{part}")
    row = build._used(SimpleNamespace(out=tmp_path), "stock", "lib")
    assert row == {"kernels": 1, "registers": 32, "spilling": 0, "spilled": "0 B"}


def test_sources_are_those_of_the_forks(monkeypatch):
    monkeypatch.setattr(forks, "stock", lambda library: f"stock {library}")
    monkeypatch.setattr(forks, "patched", lambda library: f"patched {library}")
    assert sources("mamba-ssm", "stock") == "stock mamba-ssm"
    assert sources("mamba-ssm", "patched") == "patched mamba-ssm"
