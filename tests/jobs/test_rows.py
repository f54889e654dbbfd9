"""`compat.jobs.RowEmbedder`: its rows are those of the command, and it needs no engine."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sentence_transformers import SentenceTransformer
from support.embedders import text
from typer.testing import CliRunner

import compat
from compat.__main__ import app
from compat.jobs import RowEmbedder

ROOT = Path(compat.__file__).parents[1]
LENGTHS = [20 + 31 * (i % 4) for i in range(11)]
TEXTS = pa.table(
    {
        "id": [f"{i}" for i in range(11)],
        "text": [text(length, seed=i) for i, length in enumerate(LENGTHS)],
    }
)


def of_command(table, tmp_path, *options):
    pq.write_table(table, tmp_path / "in.parquet")
    arguments = ["embed", "in.parquet", "--id-column", "id", "--output", "out.parquet", *options]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return pq.read_table(tmp_path / "out.parquet")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_rows_are_those_of_the_command_to_the_last_bit(model, tmp_path, batch_size):
    options = ["--model", model, "--vertical-chunk-size", "7", "--batch-size", f"{batch_size}"]
    wanted = of_command(TEXTS, tmp_path, *options)
    found = RowEmbedder(model, 7, batch_size)(TEXTS)
    assert found["problem"].null_count == len(found) == len(TEXTS)
    assert found.drop_columns("problem").equals(wanted)


def test_passages_are_those_of_the_command(model, tmp_path):
    options = ["--model", model, "--vertical-chunk-size", "7", "--spans", "every=30,overlap=5"]
    wanted = of_command(TEXTS, tmp_path, *options)
    found = RowEmbedder(model, 7, every=(30, 5))(TEXTS)
    assert len(found) > len(TEXTS)
    assert found.drop_columns("problem").equals(wanted)


def test_a_bad_row_stands_among_good_ones_which_are_what_they_are_alone(model):
    rows = [("a", text(50, seed=1)), ("b", None), (None, "c"), ("d", "  "), ("a", text(9, seed=2))]
    names, texts = zip(*rows, strict=True)
    found = RowEmbedder(model, 7, 8)(pa.table({"id": names, "text": texts})).to_pylist()
    assert [row["id"] for row in found] == list(names)
    assert [row["problem"] for row in found] == [
        None,
        "found null in column 'text', needed a string",
        "found null in column 'id', needed a string or integer",
        "found an empty text, needed at least one character",
        None,
    ]
    for row in found[1:4]:
        assert row["embedding"] is row["num_tokens"] is row["sha256"] is None
    # An id that comes twice gets its own text's row each time.
    for row, alone in [(found[0], texts[0]), (found[4], texts[4])]:
        assert row["sha256"] == hashlib.sha256(alone.encode()).hexdigest()
        assert row["num_tokens"] == len(alone)


def test_a_row_that_fails_inside_its_batch_is_named_alone(model, monkeypatch):
    original = SentenceTransformer.encode_document

    def encode_document(self, inputs, **options):
        if any("#" in one for one in inputs):
            raise RuntimeError("a bad text")
        return original(self, inputs, **options)

    row_embedder = RowEmbedder(model, 7, 4)
    monkeypatch.setattr(SentenceTransformer, "encode_document", encode_document)
    table = pa.table({"id": [1, 2, 3], "text": ["one", "#", "three"]})
    found = row_embedder(table)
    assert found["id"].to_pylist() == ["1", "2", "3"]
    assert [bool(problem) for problem in found["problem"].to_pylist()] == [False, True, False]
    assert "a bad text" in found["problem"][1].as_py()


def test_it_loads_the_model_once_and_keeps_the_hooks_on(model, monkeypatch):
    row_embedder = RowEmbedder(model, 7)
    assert "patched" in str(compat.status()) or "native" in str(compat.status())
    monkeypatch.setattr("compat.jobs.embedder.load_model", lambda *args: pytest.fail("again"))
    first, again = row_embedder(TEXTS), row_embedder(TEXTS)
    assert first.equals(again)
    assert row_embedder(TEXTS.slice(0, 0)).schema == first.schema
    assert np.isfinite(first["embedding"].combine_chunks().values).all()


def test_a_table_without_the_column_is_refused_by_its_names(model):
    with pytest.raises(compat.VerticalChunkingError, match=r"'body'.*one column 'text'"):
        RowEmbedder(model)(pa.table({"id": [1], "body": ["a"]}))


def test_it_imports_no_engine():
    code = "import sys, compat.jobs; compat.jobs.RowEmbedder; print('ray' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout == "False\n", run.stderr
