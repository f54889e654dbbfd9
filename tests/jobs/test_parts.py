"""A folder of Parquet files: whole or not at all, newest rows only, and what is finished."""

import os

import numpy as np
import pyarrow.parquet as pq
import pytest

from compat.errors import VerticalChunkingError
from compat.jobs import parts
from compat.jobs.documents import Document, Problem
from compat.jobs.journal import PassageRow, Row

SETTINGS = {"model": "a", "dtype": "float32"}


def document(name, digest="0", size=1):
    return Document(name, "text", size, digest, name)


def write(folder, run, *documents):
    rows = [Row(doc.id, run, np.ones(2, np.float32), doc.sha256) for doc in documents]
    parts.write_part(folder, run, documents, rows, SETTINGS)


def rows(folder):
    read = [pq.ParquetFile(path).read() for path in parts.parts(folder)]
    return sorted((row["id"], row["num_tokens"]) for table in read for row in table.to_pylist())


def test_the_same_work_done_again_replaces_its_file(tmp_path):
    for _ in range(2):
        write(tmp_path, 1, document("a"), document("b"))
    assert rows(tmp_path) == [("a", 1), ("b", 1)]
    assert [path.name for path in tmp_path.iterdir()] == [parts.parts(tmp_path)[0].name]


def test_only_the_newest_rows_of_an_id_stay(tmp_path):
    write(tmp_path, 1, document("a", "old"), document("b"))
    write(tmp_path, 1, document("c"))
    write(tmp_path, 2, document("a", "new"), document("c"))
    assert parts.build_index(tmp_path, SETTINGS) == 3
    assert rows(tmp_path) == [("a", 2), ("b", 1), ("c", 2)]
    finished = parts.Finished(tmp_path)
    assert finished.has(document("a", "new"))
    assert not finished.has(document("a", "old"))
    assert not finished.has(document("d"))


def test_passages_of_one_document_stay_together(tmp_path):
    doc = document("a")
    made = [PassageRow("a", i, i + 1, np.ones(2, np.float32), "0") for i in range(3)]
    parts.write_part(tmp_path, 1, [doc], made, SETTINGS)
    assert parts.build_index(tmp_path, SETTINGS) == 3


def test_doubled_ids_are_known(tmp_path):
    parts.build_index(tmp_path, SETTINGS)
    parts.note_ids(tmp_path, [["a", "b"], ["c", "b"]])
    doubled = [parts.Finished(tmp_path).is_doubled(document(name)) for name in "abc"]
    assert doubled == [False, True, False]


def test_other_settings_are_refused_with_what_differs(tmp_path):
    write(tmp_path, 1, document("a"))
    with pytest.raises(VerticalChunkingError, match=r"dtype float32.*dtype bfloat16"):
        parts.build_index(tmp_path, SETTINGS | {"dtype": "bfloat16"})
    (tmp_path / "b.parquet").write_bytes(b"of somebody else")
    with pytest.raises(VerticalChunkingError, match="did not write"):
        parts.build_index(tmp_path, SETTINGS)


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, 1, document("a"))
    assert list(tmp_path.iterdir()) == []


def test_a_run_removes_what_a_killed_one_was_writing_and_counts_on(tmp_path):
    assert parts.next_run(tmp_path) == 1
    write(tmp_path, 41, document("a"))
    (tmp_path / ".tmp-1").write_bytes(b"half of")
    assert parts.next_run(tmp_path) == 42
    assert parts.parts(tmp_path) == list(tmp_path.iterdir())


def test_blocks_are_limited_by_rows_and_by_bytes_and_a_longer_text_is_alone():
    sizes = [1, 1, 1, 1, 9, 30, 2, 2, 9]
    items = [document(f"{i}", size=size) for i, size in enumerate(sizes)]
    items.insert(1, Problem("here", "nothing"))
    blocks = list(parts.in_blocks(items, 3, 10))
    assert [item for block in blocks for item in block] == items
    assert [[getattr(item, "size", None) for item in block] for block in blocks] == [
        [1, None, 1], [1, 1], [9], [30], [2, 2], [9],
    ]  # fmt: skip
