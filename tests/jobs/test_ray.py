"""Corpora on Ray: the rows of the command, and nothing lost, doubled or stale whoever is killed."""

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.embedders import text
from typer.testing import CliRunner

import compat
from compat.__main__ import app

ray = pytest.importorskip("ray", reason="ray: `nox -s test-ray`")
psutil = pytest.importorskip("psutil")

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]
ROOT = Path(compat.__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def _cluster():
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


def embed(source, model, **options):
    from compat.jobs.ray import embed

    return embed(source, "out", model=model, workers=2, batch_size=1, **options)


def table(folder="out"):
    read = [pq.ParquetFile(path).read() for path in sorted(Path(folder).glob("*.parquet"))]
    return pa.concat_tables(read).sort_by([("id", "ascending")])


def command(*arguments, status=0):
    result = CliRunner().invoke(app, ["embed", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == status, result.output
    return result


def of_command(*arguments, status=0):
    command(*arguments, "--batch-size", 1, "--output", "one.parquet", status=status)
    return pq.ParquetFile("one.parquet").read().sort_by([("id", "ascending")])


def write_texts(count, length=40):
    Path("docs").mkdir(exist_ok=True)
    for i in range(count):
        Path(f"docs/{i:03}.txt").write_text(text(length + i, seed=i))


def test_the_command_has_the_same_rows_and_problems_on_ray(model):
    write_texts(9)
    Path("docs/book.txt").write_text(text(200_000, seed=1))
    Path("docs/empty.txt").write_text(" ")
    Path("lines.jsonl").write_text('{"text": "a line"}\n{"text": null}\n{"text": "another"}\n')
    arguments = ["docs", "lines.jsonl", "nothing", "--model", model]
    wanted = of_command(*arguments, status=1)
    more = ["--batch-size", 1, "--output", "out", "--engine", "ray", "--workers", 2]
    result = command(*arguments, *more, status=1)
    assert table().equals(wanted)
    assert table().schema.metadata == wanted.schema.metadata
    for line in [
        "docs/empty.txt: found an empty text, needed at least one character",
        "lines.jsonl:2: found null in column 'text', needed a string",
        "nothing: found nothing there, needed a file or a folder",
        "Not embedded: 3, named above.",
    ]:
        assert result.stderr.count(line) == 1
    assert "12 rows in out" in result.stdout

    # Anything reads the folder.
    datasets, duckdb = pytest.importorskip("datasets"), pytest.importorskip("duckdb")
    files = [str(path) for path in Path("out").glob("*.parquet")]
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir="cache")
    assert sorted(loaded["id"]) == wanted["id"].to_pylist()
    (counted,) = duckdb.sql("SELECT count(*), count(DISTINCT id) FROM 'out/*.parquet'").fetchall()
    assert counted == (12, 12)
    assert len(pq.read_table("out")) == 12
    lancedb = pytest.importorskip("lancedb")
    copied = lancedb.connect("lance").create_table("out", pq.read_table("out"))
    (nearest,) = copied.search(wanted["embedding"][3].as_py()).limit(1).to_list()
    assert nearest["id"] == wanted["id"][3].as_py()


def test_a_dataset_has_the_commands_rows_and_its_doubled_ids_are_named(model, capfd):
    rows = pa.table(
        {"id": [f"{i}" for i in range(8)], "text": [text(30, seed=i) for i in range(8)]}
    )
    pq.write_table(rows, "in.parquet")
    wanted = of_command("in.parquet", "--id-column", "id", "--model", model)
    bad = pa.table({"id": ["x", "x", None, "y"], "text": ["a", "b", "c", None]})
    dataset = ray.data.from_arrow([rows, bad])
    assert embed(dataset, model, id_column="id", block_rows=3) == 4
    assert table().equals(wanted)
    told = capfd.readouterr().err
    assert told.count("x: found the id more than once") == 2
    assert "a row without an id: found null" in told
    assert "y: found null in column 'text'" in told


def test_of_a_million_rows_only_those_that_are_missing_are_embedded(model):
    """Let a stand-in for the model have written the million: one vector for all."""
    count, of_a_file = 1_000_000, 10_000
    assert (
        embed(ray.data.from_arrow(pa.table({"id": ["a"], "text": ["b"]})), model, id_column="id")
        == 0
    )
    (path,) = Path("out").glob("part-*")
    one = pq.ParquetFile(path).read()
    Path("in").mkdir()
    for start in range(0, count, of_a_file):
        ids = [f"{i:07}" for i in range(start, start + of_a_file)]
        given = pa.table({"id": ids, "text": ids})
        pq.write_table(given, f"in/{start:07}.parquet")
        made = one.take([0] * (of_a_file - 1))  # The last one of each file is missing.
        hashes = [hashlib.sha256(name.encode()).hexdigest() for name in ids]
        for name, column in (("id", ids), ("sha256", hashes)):
            place = one.schema.get_field_index(name)
            made = made.set_column(place, one.schema.field(name), pa.array(column[:-1]))
        pq.write_table(made, f"out/part-000002-{start:032}.parquet")
    missing = [f"{i:07}" for i in range(of_a_file - 1, count, of_a_file)]
    assert embed(ray.data.read_parquet(f"{Path('in').absolute()}"), model, id_column="id") == 0
    third = [pq.ParquetFile(path).read() for path in Path("out").glob("part-000003-*")]
    assert sorted(pa.concat_tables(third)["id"].to_pylist()) == missing
    assert len(table()) == len(set(table()["id"].to_pylist())) == count + 1


def test_what_has_changed_is_anew_and_what_failed_is_tried_again(model):
    write_texts(6)
    Path("docs/bad.txt").write_text(" ")
    assert embed(["docs"], model, block_rows=3) == 1
    Path("docs/bad.txt").write_text("good now")
    Path("docs/001.txt").write_text("another text")
    assert embed(["docs"], model, block_rows=3) == 0
    assert table().equals(of_command("docs", "--model", model))
    (second,) = Path("out").glob("part-000002-*")
    assert sorted(pq.ParquetFile(second).read()["id"].to_pylist()) == [
        "docs/001.txt",
        "docs/bad.txt",
    ]
    with pytest.raises(compat.VerticalChunkingError, match=r"spans None.*spans every=9,overlap=0"):
        embed(["docs"], model, every=(9, 0))


def test_passages_are_those_of_the_command(model):
    write_texts(3)
    order = [("id", "ascending"), ("start", "ascending")]
    wanted = of_command("docs", "--model", model, "--spans", "every=9,overlap=2").sort_by(order)
    assert embed(["docs"], model, every=(9, 2)) == 0
    assert table().sort_by(order).equals(wanted)


def first_part(folder="out"):
    while not list(Path(folder).glob("*.parquet")):
        time.sleep(0.02)


def test_a_killed_actor_loses_and_doubles_nothing(model):
    write_texts(60, length=3000)

    def kill():
        first_part()
        children = psutil.Process().children(recursive=True)
        actors = [child for child in children if "_Worker" in " ".join(child.cmdline())]
        killed.append(actors[0].pid)
        actors[0].send_signal(signal.SIGKILL)

    killed = []
    thread = threading.Thread(target=kill)
    thread.start()
    assert embed(["docs"], model, block_rows=2) == 0
    thread.join()
    assert killed
    assert table().equals(of_command("docs", "--model", model))


def test_a_killed_driver_is_carried_on_with(model):
    write_texts(60, length=3000)
    code = (
        "from compat.jobs.ray import embed; "
        f"embed(['docs'], 'out', model={model!r}, workers=2, batch_size=1, block_rows=2)"
    )
    address = ray.get_runtime_context().gcs_address
    env = os.environ | {"RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", code], env=env, **quiet) as driver:
        first_part()
        driver.send_signal(signal.SIGKILL)
    before = len(table())
    assert 0 < before < 60
    Path("docs/000.txt").write_text("another text")
    assert embed(["docs"], model, block_rows=2) == 0
    assert table().equals(of_command("docs", "--model", model))
    # Whatever the first run finished was not done again.
    again = sum(pq.ParquetFile(path).metadata.num_rows for path in Path("out").glob("*-000002-*"))
    assert again < 60


def test_a_long_text_begins_first_and_holds_nobody_up(model):
    from compat.jobs import parts
    from compat.jobs import ray as on_ray
    from compat.jobs.documents import Columns

    Path("notes.jsonl").write_text('{"text": "a note"}\n' * 200 + f'{{"text": "{"book " * 20}"}}\n')
    Path("longer.txt").write_text("book " * 30_000)
    Path("longest.txt").write_text("book " * 40_000)
    parts.build_index(Path.cwd(), {})
    columns = Columns("text", None, None)
    inputs = ["notes.jsonl", "longer.txt", "longest.txt"]
    blocks = on_ray._blocks_of_inputs(inputs, Path.cwd(), columns, 50, 200, False).take_all()
    ids = [[doc.id for doc in pickle.loads(row["block"])] for row in blocks]
    assert ids[:3] == [["notes.jsonl:201"], ["longest.txt"], ["longer.txt"]]
    assert [name for block in ids[3:] for name in block] == [
        f"notes.jsonl:{i}" for i in range(1, 201)
    ]
    assert {len(block) for block in ids[3:-1]} == {200 // len("a note")}


def test_what_fails_far_away_is_one_line_and_ends_with_2(model, monkeypatch):
    from compat.jobs import ray as on_ray

    write_texts(2)
    more = ["--output", "out", "--engine", "ray", "--workers", 1]
    result = command("docs", "--model", "nowhere", *more, status=2)
    here = command("docs", "--model", "nowhere", "--output", "one.parquet", status=2)
    assert result.stderr.splitlines()[-1] == here.stderr.splitlines()[-1]

    class Full(on_ray._Worker):
        def _embed(self, block):
            raise OSError(28, "No space left on device", "out/a")

    monkeypatch.setattr(on_ray, "_Worker", Full)
    result = command("docs", "--model", model, *more, status=2)
    assert "out/a cannot be written (No space left on device)" in result.stderr.splitlines()[-1]
    assert list(Path("out").glob("*.parquet")) == []


def test_more_workers_than_there_is_room_for_are_refused(model):
    write_texts(1)
    more = ["--output", "out", "--engine", "ray", "--workers", 4]
    result = command("docs", "--model", model, *more, status=2)
    assert "room for 3 workers beside a CPU that reads" in result.stderr.splitlines()[-1]
