"""`python -m compat`: its output and its refusals, and that no finished row is lost."""

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import tqdm
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import LayerNorm
from support.embedders import character_tokenizer, embedder, save_checkpoint, text
from support.stack import FORKS
from support.tolerances import COSINE
from tokenizers import normalizers
from transformers import BertConfig, BertModel
from typer.main import get_command
from typer.testing import CliRunner

import compat
from compat.__main__ import app
from compat.default_model import WEIGHTS_LABEL, load_default_model
from compat.jobs import documents as _documents
from compat.jobs import embed as _embed
from compat.jobs import embedder as embedder_of_documents
from compat.jobs import fingerprint, journal, loading

ROOT = Path(compat.__file__).parents[1]


def run(*args, status=0):
    """Run the command in this process; raise any exception that it does not handle."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result


def embed(*args, status=0, output="out.parquet"):
    return run("embed", *args, "--output", output, status=status)


def rows(path="out.parquet"):
    return pq.ParquetFile(path).read().to_pylist()


def ids(path="out.parquet"):
    return [row["id"] for row in rows(path)]


def plain(model, texts):
    """Embed each text on its own, unchunked, with the released library."""
    reference = SentenceTransformer(model, device="cpu")
    return np.stack([reference.encode(text) for text in texts])


def cosine_distance(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return 1 - (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def complaints(result):
    """Return the lines on stderr, without those of the libraries."""
    lines = result.stderr.replace("\r", "\n").splitlines()
    return [line for line in lines if line and not re.match(r"\[transformers\]|Loading ", line)]


def write(path, content):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        content = content.encode()
    Path(path).write_bytes(content)
    return path


def write_texts(*lengths):
    """Write text files 0.txt, 1.txt, ... of these lengths; return their names."""
    return [write(f"{i}.txt", text(length, seed=i)) for i, length in enumerate(lengths)]


def interrupt(*args):
    raise KeyboardInterrupt


@pytest.fixture
def embedded(monkeypatch):
    """Return the ids of the documents that went through the model, in their order."""
    seen = []
    original = embedder_of_documents._embed_texts

    def spy(embedder, batch, *args):
        seen.extend(doc.id for doc in batch)
        return original(embedder, batch, *args)

    monkeypatch.setattr(embedder_of_documents, "_embed_texts", spy)
    return seen


# The output.


def test_rows_of_all_kinds_of_input_are_those_of_a_plain_encode(model):
    texts = {name: text(30 + 9 * i, seed=i) for i, name in enumerate("abcdefgh")}
    write("single.log", texts["a"])
    write("docs/b.TXT", texts["b"])
    write("docs/a/z.md", b"\xef\xbb\xbf" + texts["c"].encode())
    write("docs/a/y.rst", texts["d"])
    write("docs/c.text", texts["e"])
    lines = [json.dumps({"text": texts["f"]}), "", json.dumps({"text": texts["g"]})]
    write("lines.jsonl", "\n".join(lines))
    pq.write_table(pa.table({"n": [1], "text": [texts["h"]]}), "table.parquet")

    result = embed(
        "single.log", "docs", "lines.jsonl", "table.parquet", "--model", model,
        "--vertical-chunk-size", 7, "--batch-size", 3,
    )  # fmt: skip

    got = rows()
    expected = {
        "single.log": "a", "docs/a/y.rst": "d", "docs/a/z.md": "c", "docs/b.TXT": "b",
        "docs/c.text": "e", "lines.jsonl:1": "f", "lines.jsonl:3": "g", "table.parquet:1": "h",
    }  # fmt: skip
    assert [row["id"] for row in got] == list(expected)
    chosen = [texts[name] for name in expected.values()]
    assert [row["num_tokens"] for row in got] == [len(text) for text in chosen]
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in chosen]
    assert [row["sha256"] for row in got] == hashes
    embeddings = [row["embedding"] for row in got]
    assert cosine_distance(embeddings, plain(model, chosen)).max() <= COSINE[torch.float32]
    schema = pq.read_schema("out.parquet")
    types = [pa.string(), pa.int64(), pa.list_(pa.float32(), 32), pa.string()]
    assert schema.names == ["id", "num_tokens", "embedding", "sha256"]
    assert schema.types == types
    tokens = sum(len(text) for text in chosen)
    line = rf"8 documents, {tokens} tokens in [\d.]+ s \(\d+ tokens/s\); 8 rows in out\.parquet\n"
    assert re.fullmatch(line, result.stdout)
    assert complaints(result) == []
    assert not Path("out.parquet.partial").exists()


def test_documents_get_their_prompt_and_num_tokens_is_of_the_text_itself(model, tmp_path):
    prompted = SentenceTransformer(model, device="cpu", prompts={"document": "read: "})
    prompted.max_seq_length = 20
    prompted.save(str(tmp_path / "prompted"))
    names = write_texts(5, 50)
    embed(*names, "--model", tmp_path / "prompted", "--batch-size", 2, "--truncate")
    assert [row["num_tokens"] for row in rows()] == [5, 20]
    wanted = prompted.encode_document([Path(name).read_text() for name in names])
    got = np.array([row["embedding"] for row in rows()])
    assert cosine_distance(got, wanted).max() <= COSINE[torch.float32]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_the_models_and_rows_stay_float32(model, dtype):
    names = write_texts(40, 20)
    embed(*names, "--model", model, "--dtype", dtype)
    settings = json.loads(pq.read_schema("out.parquet").metadata[journal.SETTINGS_KEY])
    assert settings["dtype"] == dtype
    got = np.array([row["embedding"] for row in rows()])
    distance = cosine_distance(got, plain(model, [Path(name).read_text() for name in names]))
    # The difference is half a number format from float32, but the text is the same.
    assert 0 < distance.max() < 1e-2


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_text_and_id_columns(model, kind):
    records = [{"body": text(9, seed=i), "key": key} for i, key in enumerate([7, "seven", 7])]
    if kind == "jsonl":
        write("in.jsonl", "\n".join(map(json.dumps, records)))
    else:
        records = [{**record, "key": str(record["key"])} for record in records]
        pq.write_table(pa.Table.from_pylist(records), "in.parquet")
    name = f"in.{kind}"
    result = embed(name, "--model", model, "--text-column", "body", "--id-column", "key", status=1)
    assert ids() == ["7", "seven"]
    what = f"{name}:3: found the id '7' of {name}:1 again, needed an id of its own"
    assert complaints(result) == [what, "Not embedded: 1, named above."]


def test_what_a_folder_has_that_is_not_read_is_said_once_and_is_no_problem(model):
    write("docs/a.txt", text(9))
    write("docs/b.png", "")
    result = embed("docs", "--model", model)
    assert ids() == ["docs/a.txt"]
    assert complaints(result) == ["docs: 1 file not read (.png 1)"]


@pytest.mark.skipif(FORKS, reason="the forks move no bar inside a text")
def test_progress_is_over_the_bytes_of_what_is_left_and_moves_inside_a_text(model, monkeypatch):
    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "disable": False, "file": io.StringIO()})
            self.positions = []
            bars.append(self)

        def update(self, n=1):
            super().update(n)
            self.positions.append(self.n)

    embed(*write_texts(30), "--model", model)
    monkeypatch.setattr(_embed, "tqdm", Bar)
    write("long.txt", "ä" * 100)
    write("short.txt", "abc")
    embed("0.txt", "long.txt", "short.txt", "--model", model, "--batch-size", 1,
          "--vertical-chunk-size", 10)  # fmt: skip
    (bar,) = bars
    assert bar.total == bar.n == 203
    inside = [n for n in bar.positions if n < 100]
    assert len(inside) > 5
    assert inside == sorted(inside)
    assert 200 in bar.positions


# Texts that are too long for max_seq_length.


def limited(model, folder, tokens, **prompts):
    """Save the model with a limit."""
    it = SentenceTransformer(str(model), device="cpu", prompts=prompts or None)
    it.max_seq_length = tokens
    it.save(str(folder))
    return folder


def two_that_differ_at_the_end():
    start = text(20)
    return [write("a.txt", start + "abcd"), write("b.txt", start + "wxyz"), write("c.txt", start)]


def test_no_text_is_cut_in_silence(model, tmp_path):
    names = two_that_differ_at_the_end()
    result = embed(*names, "--model", limited(model, tmp_path / "it", 20), status=1)
    assert ids() == ["c.txt"]
    what = "found 24 tokens, needed at most 20: --max-seq-length raises that, --truncate cuts"
    assert complaints(result) == [
        f"a.txt: {what}",
        f"b.txt: {what}",
        "Too long: 2, of up to 24 tokens. A recurrent model has no reason for its limit of 20; "
        "--max-seq-length 24 reads them whole.",
        "Not embedded: 2, named above.",
    ]


def test_a_higher_limit_reads_them_whole_and_carries_on(model, tmp_path, embedded):
    names = two_that_differ_at_the_end()
    args = [*names, "--model", limited(model, tmp_path / "it", 20)]
    embed(*args, status=1)
    del embedded[:]
    assert complaints(embed(*args, "--max-seq-length", 24)) == []
    assert embedded == names[:2]
    got = np.array([row["embedding"] for row in rows()])
    expected = plain(model, [Path(name).read_text() for name in names])
    assert cosine_distance(got, expected).max() <= COSINE[torch.float32]
    assert cosine_distance(got[0], got[1]) > 1e-4
    assert [row["num_tokens"] for row in rows()] == [24, 24, 20]


def test_a_limit_can_be_set_where_there_is_none(model):
    args = [*two_that_differ_at_the_end(), "--model", model, "--max-seq-length", 20]
    assert "Too long: 2" in embed(*args, status=1).stderr
    assert ids() == ["c.txt"]


def test_cutting_is_done_where_it_is_asked_for(model, tmp_path):
    names = two_that_differ_at_the_end()
    args = [*names, "--model", limited(model, tmp_path / "it", 20)]
    result = embed(*args, "--truncate")
    assert complaints(result) == ["Cut to 20 tokens, as --truncate says: 2."]
    a, b, c = rows()
    assert a["embedding"] == b["embedding"]
    assert cosine_distance(a["embedding"], c["embedding"]) <= COSINE[torch.float32]
    assert [row["num_tokens"] for row in (a, b, c)] == [20, 20, 20]
    # Rows that were cut are not mixed with others.
    for more in ([], ["--truncate", "--max-seq-length", 10]):
        result = embed(*args, *more, status=2)
        assert "Found: out.parquet with texts cut at 20 tokens. Needed: " in result.stderr


def test_a_prompt_and_special_tokens_count_too(tmp_path):
    checkpoint = save_checkpoint(tmp_path / "checkpoint", end_of_text=True)
    embedder(checkpoint).save(str(tmp_path / "plain"))
    it = limited(tmp_path / "plain", tmp_path / "it", 20, document="read: ")
    names = write_texts(13, 14)
    result = embed(*names, "--model", it, status=1)
    assert complaints(result)[0].startswith("1.txt: found 21 tokens, needed at most 20")
    assert [(row["id"], row["num_tokens"]) for row in rows()] == [("0.txt", 14)]


@pytest.mark.parametrize("place", ["document_length", "processing_kwargs"])
def test_every_limit_of_the_model_counts_and_is_raised(model, tmp_path, place):
    names = two_that_differ_at_the_end()
    it = SentenceTransformer(model, device="cpu")
    if place == "document_length":
        it[0].document_length = 20
    else:
        it[0].processing_kwargs = {"text": {"max_length": 20}}
    it.save(str(tmp_path / "it"))
    args = [*names, "--model", tmp_path / "it"]
    assert "b.txt: found 24 tokens, needed at most 20" in embed(*args, status=1).stderr
    embed(*args, "--max-seq-length", 24)
    a, b, _ = rows()
    assert cosine_distance(a["embedding"], b["embedding"]) > 1e-4


def test_a_hybrid_has_a_reason_for_its_limit(tmp_path):
    embedder(save_checkpoint(tmp_path / "checkpoint", "jamba")).save(str(tmp_path / "plain"))
    it = limited(tmp_path / "plain", tmp_path / "it", 20)
    result = embed(*write_texts(25), "--model", it, status=1)
    assert "The model's limit is 20: its attention may not be good beyond" in result.stderr
    assert "recurrent" not in result.stderr.split("Too long")[1]


# Carrying on.


def test_the_same_command_again_embeds_nothing(model, embedded):
    names = write_texts(20, 12, 33)
    embed(*names, "--model", model)
    before = rows()
    del embedded[:]
    # Neither size affects the numbers.
    result = embed(*names, "--model", model, "--batch-size", 1, "--vertical-chunk-size", 5)
    assert embedded == []
    assert rows() == before
    assert "0 documents, 0 tokens" in result.stdout
    assert "3 rows in out.parquet" in result.stdout


def test_changed_texts_are_embedded_anew_and_dropped_ones_kept_at_the_end(model, embedded):
    write_texts(20, 12, 33)
    embed("0.txt", "1.txt", "2.txt", "--model", model)
    before = {row["id"]: row for row in rows()}
    del embedded[:]
    new = text(25, seed=99)
    write("1.txt", new)
    write("3.txt", text(10))
    embed("3.txt", "2.txt", "1.txt", "--model", model)
    assert embedded == ["3.txt", "1.txt"]
    after = {row["id"]: row for row in rows()}
    assert list(after) == ["3.txt", "2.txt", "1.txt", "0.txt"]
    assert after["0.txt"] == before["0.txt"]
    assert after["2.txt"] == before["2.txt"]
    distance = cosine_distance(after["1.txt"]["embedding"], plain(model, [new])[0])
    assert distance <= COSINE[torch.float32]
    assert distance < cosine_distance(after["1.txt"]["embedding"], before["1.txt"]["embedding"])


KILL_AT_THE_SECOND_BATCH = """
import os, runpy, signal
sync, calls = os.fsync, []
def fsync(file):
    sync(file)
    calls.append(file)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = fsync
runpy.run_module("compat", run_name="__main__")
"""


def test_sigkill_loses_no_finished_row(model, embedded):
    names = write_texts(20, 12, 33, 8, 15)
    args = [*names, "--model", model, "--batch-size", "2"]
    killed = subprocess.run(
        [sys.executable, "-c", KILL_AT_THE_SECOND_BATCH, "embed", *args, "--output", "out.parquet"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not Path("out.parquet").exists()
    kept, _ = journal.read_journal(Path("out.parquet.partial"))
    assert kept["id"].to_pylist() == names[:4]
    result = embed(*args)
    assert embedded == names[4:]
    assert "1 documents, 15 tokens" in result.stdout
    assert ids() == names
    embed(*args, output="uninterrupted.parquet")
    got, expected = (
        np.array([row["embedding"] for row in rows(path)])
        for path in ("out.parquet", "uninterrupted.parquet")
    )
    assert cosine_distance(got, expected).max() <= COSINE[torch.float32]
    assert sorted(p.name for p in Path().glob("*.parquet*")) == [
        "out.parquet", "uninterrupted.parquet"
    ]  # fmt: skip


@pytest.mark.parametrize("sync", range(1, 5), ids=["batch 1", "batch 2", "batch 3", "output"])
def test_ctrl_c_loses_no_finished_row(model, embedded, monkeypatch, sync):
    names = write_texts(20, 12, 33, 8)
    # A row of an earlier run is in the output already.
    embed(names[0], "--model", model)
    args = [*names, "--model", model, "--batch-size", 1]
    original, calls = os.fsync, []

    def interrupted(file):
        original(file)
        calls.append(file)
        if len(calls) == sync:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    result = embed(*args, status=130)
    assert "carries on" in result.stderr
    assert ids() == names[:1]
    del embedded[:]
    monkeypatch.setattr(os, "fsync", original)
    embed(*args)
    assert embedded == names[1 + sync :]
    assert ids() == names
    assert not Path("out.parquet.partial").exists()


def test_an_interruption_between_output_and_journal_does_no_harm(model, embedded, monkeypatch):
    names = write_texts(20, 12)
    original = _embed.merge

    def interrupted(*args):
        original(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(_embed, "merge", interrupted)
    embed(*names, "--model", model, status=130)
    before = rows()
    assert Path("out.parquet.partial").exists()
    monkeypatch.setattr(_embed, "merge", original)
    del embedded[:]
    embed(*names, "--model", model)
    assert embedded == []
    assert rows() == before


def test_a_journal_torn_anywhere_keeps_its_whole_batches_and_goes_on(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # This saves time.
    path, settings = Path("journal"), {"model": "m"}
    batches = [
        [journal.Row(f"{n}-{i}", 1, np.full(3, n + i), "") for i in range(2)] for n in range(3)
    ]
    ends = []
    with path.open("ab") as file:
        for batch in batches[:2]:
            journal.append(file, batch, settings)
            ends.append(file.tell())
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends)
        with path.open("ab") as file:
            journal.drop_torn_batch(path, file)
            journal.append(file, batches[2], settings)
        table, end = journal.read_journal(path)
        expected = [row for batch in [*batches[:kept], batches[2]] for row in batch]
        assert table["id"].to_pylist() == [row.id for row in expected], cut
        assert table["embedding"].to_pylist() == [row.embedding.tolist() for row in expected]
        assert end == path.stat().st_size


# Outputs that it refuses to mix.


@pytest.fixture(scope="session")
def other_model(model, tmp_path_factory):
    """Save a model of the same architecture with other weights."""
    other = SentenceTransformer(model, device="cpu")
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.01)
    folder = str(tmp_path_factory.mktemp("other"))
    other.save(folder)
    return folder


@pytest.mark.parametrize("finished", [True, False], ids=["output", "journal"])
@pytest.mark.parametrize("changed", ["model", "weights", "dtype"])
def test_other_settings_than_the_rows_have_are_an_error(
    model, other_model, monkeypatch, tmp_path, finished, changed
):
    names = write_texts(20, 12)
    link = tmp_path / "model"
    link.symlink_to(model)
    path = Path("out.parquet" if finished else "out.parquet.partial")
    if not finished:
        monkeypatch.setattr(_embed, "merge", interrupt)
    embed(*names, "--model", link, "--batch-size", 1, status=0 if finished else 130)
    before = path.read_bytes()
    if changed == "model":
        args = ["--model", other_model]
    elif changed == "weights":
        original = fingerprint.fingerprint
        monkeypatch.setattr(fingerprint, "fingerprint", lambda model: original(model)[::-1])
        args = ["--model", link]
    else:
        args = ["--model", link, "--dtype", "bfloat16"]
    result = embed("0.txt", *args, status=2)
    assert f"Found: {path} with " in result.stderr
    key = {"model": "model", "weights": "fingerprint", "dtype": "dtype float32"}[changed]
    assert key in result.stderr.split("Needed: ")[0]
    assert f"Remedy: give another --output, or delete {path}." in result.stderr
    assert path.read_bytes() == before


def test_the_fingerprint_tells_models_apart_and_is_stable(model, other_model):
    def of(path, **attributes):
        loaded = SentenceTransformer(path, device="cpu")
        for name, value in attributes.items():
            setattr(loaded, name, value)
        return fingerprint.fingerprint(loaded)

    mean = SentenceTransformer(model, device="cpu")
    mean[1].pooling_mode = "mean"
    changed = [
        of(other_model),
        of(model, prompts={"query": "q: ", "document": ""}),
        fingerprint.fingerprint(mean),
    ]
    assert of(model) == of(model)
    assert len({of(model), *changed}) == 4
    # If no text is cut, the limit has no effect; if texts are cut, the settings contain it.
    assert of(model, max_seq_length=9) == of(model)


@pytest.mark.parametrize("name", ["out.parquet", "out.parquet.partial"])
@pytest.mark.parametrize("kind", ["junk", "parquet", "arrow"])
def test_somebody_elses_file_is_left_alone(model, name, kind):
    table = pa.table({"id": ["a"], "sha256": ["b"]})
    if kind == "junk":
        write(name, "my notes\n")
    elif kind == "parquet":
        pq.write_table(table, name)
    else:
        with pa.ipc.new_stream(name, table.schema) as stream:
            stream.write_table(table)
    before = Path(name).read_bytes()
    result = embed(*write_texts(9), "--model", model, status=2)
    assert f"Found: {name}, which this command did not write." in result.stderr
    assert Path(name).read_bytes() == before


def test_two_commands_do_not_write_one_output(model):
    names = write_texts(9)
    with Path("out.parquet.partial").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = embed(*names, "--model", model, status=2)
        assert "Found: another command that is writing out.parquet.partial." in result.stderr
    embed(*names, "--model", model)


def test_without_a_model_the_default_one_is_used_and_labelled(embedded):
    names = write_texts(30)
    result = embed(*names)
    assert complaints(result) == [f"Default model, {WEIGHTS_LABEL}"]
    expected = load_default_model(device="cpu").encode(Path(names[0]).read_text())
    assert cosine_distance(rows()[0]["embedding"], expected) <= COSINE[torch.float32]
    # Its weights are the same in every run.
    embed(*names)
    assert embedded == names


# Bad input.


def test_every_problem_is_one_line_and_the_rest_is_embedded(model):
    write("good.txt", text(20))
    write("empty.txt", "")
    write("blank.txt", " \n\t\n")
    write("latin.txt", "first line\nna\xefve\n".encode("latin-1"))
    write("folder/nothing.py", "")
    os.mkfifo("pipe")
    lines = [
        '{"text": "the first"}',
        '{"text": "broken',
        "[1, 2]",
        '{"body": "other column"}',
        '{"text": null}',
        '{"text": ""}',
        '{"text": "half \\ud83d a pair"}',
        b'{"text": "na\xefve"}',
        "[" * 100_000,
        '{"text": "the last"}',
    ]
    write("l.jsonl", b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    pq.write_table(pa.table({"text": ["from a table", None, ""]}), "t.parquet")
    pq.write_table(pa.table({"body": ["x"]}), "columns.parquet")
    pq.write_table(pa.table({"text": [1]}), "numbers.parquet")
    doubled = pa.table([["a"], ["b"]], names=["text", "text"])
    pq.write_table(doubled, "doubled.parquet")
    write("broken.parquet", Path("t.parquet").read_bytes()[:-9])
    inputs = (
        "missing.txt", "empty.txt", "blank.txt", "latin.txt", "folder", "pipe", "l.jsonl",
        "t.parquet", "columns.parquet", "numbers.parquet", "doubled.parquet",
        "broken.parquet", "good.txt", "good.txt",
    )  # fmt: skip

    result = embed(*inputs, "--model", model, "--batch-size", 2, status=1)

    assert ids() == ["l.jsonl:1", "l.jsonl:10", "t.parquet:1", "good.txt"]
    lines = complaints(result)
    expected = [
        "missing.txt: found nothing there, needed",
        "empty.txt: found an empty text, needed",
        "blank.txt: found an empty text, needed",
        "latin.txt:2: found the byte 0xef that is not UTF-8, needed",
        "folder: found no file for it (.py 1), needed one that ends in .txt .md .rst .text",
        "pipe: found a device or a pipe, needed",
        "l.jsonl:2: found broken JSON (Unterminated string starting at), needed",
        "l.jsonl:3: found list, needed a JSON object",
        "l.jsonl:4: found 'body', needed the column 'text'",
        "l.jsonl:5: found null in column 'text', needed",
        "l.jsonl:6: found an empty text, needed",
        "l.jsonl:7: found half a surrogate pair in the text or its id, needed",
        "l.jsonl:8: found the byte 0xef that is not UTF-8, needed",
        "l.jsonl:9: found broken JSON (",
        "t.parquet:2: found null in column 'text', needed",
        "t.parquet:3: found an empty text, needed",
        "columns.parquet: found 'body', needed the column 'text'",
        "numbers.parquet:1: found int in column 'text', needed",
        "doubled.parquet: found the column 'text' more than once, needed",
        "broken.parquet: found broken Parquet (",
        "good.txt: found the id 'good.txt' of good.txt again, needed",
        "Not embedded: 21, named above.",
    ]
    assert len(lines) == len(expected), result.stderr
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)
        assert "needed " in line or line == expected[-1]
    assert "4 documents" in result.stdout


def test_unreadable_files_and_folders_are_named(model, monkeypatch):
    write("docs/a.txt", "a")
    write("docs/denied.txt", "b")
    write("denied.txt", "named itself")
    write("docs/closed/c.txt", "c")

    def denying(original):
        # chmod would not stop root.
        def denied(path, *args, **kwargs):
            if Path(path).name in ("denied.txt", "closed"):
                raise PermissionError(13, "Permission denied", str(path))
            return original(path, *args, **kwargs)

        return denied

    monkeypatch.setattr(Path, "open", denying(Path.open))
    monkeypatch.setattr(os, "scandir", denying(os.scandir))
    monkeypatch.setattr(os, "access", lambda *args, **kwargs: False)
    result = embed("docs", "denied.txt", "--model", model, status=1)
    assert ids() == ["docs/a.txt"]
    reason = "found that it cannot be read (Permission denied), needed a readable file"
    expected = [
        f"docs/closed: {reason}",
        f"docs/denied.txt: {reason}",
        f"denied.txt: {reason}",
        "Not embedded: 3",
    ]
    for line, start in zip(complaints(result), expected, strict=True):
        assert line.startswith(start)


def test_an_id_that_is_no_id(model):
    keys = [True, None, 1.5, "fine"]
    write("in.jsonl", "\n".join(json.dumps({"text": "abc", "key": key}) for key in keys))
    result = embed("in.jsonl", "--model", model, "--id-column", "key", status=1)
    assert ids() == ["fine"]
    for number, kind in enumerate(["bool", "null", "float"], start=1):
        what = f"in.jsonl:{number}: found {kind} in column 'key', needed a string or integer"
        assert what in complaints(result)


def test_nothing_to_embed_writes_nothing(model):
    result = embed("missing.txt", "--model", model, status=1)
    assert result.stdout == ""
    assert list(Path().iterdir()) == []


def test_a_text_without_a_token_or_a_number_is_named(model, tmp_path):
    strange = SentenceTransformer(model, device="cpu")
    strange.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    token = strange.tokenizer.get_vocab()["Q"]
    with torch.no_grad():
        strange.transformers_model.get_input_embeddings().weight[token] = torch.inf
    strange.save(str(tmp_path / "strange"))
    write("good.txt", "good")
    write("none.txt", "~~~")
    write("inf.txt", "aQa")
    args = ["none.txt", "good.txt", "inf.txt", "--model", tmp_path / "strange"]
    for batch_size in (1, 3):
        result = embed(*args, "--batch-size", batch_size, status=1, output=f"{batch_size}.parquet")
        assert ids(f"{batch_size}.parquet") == ["good.txt"]
        none, infinite, count = complaints(result)
        assert none.startswith("none.txt: found a text of which the tokenizer makes no token")
        assert infinite.startswith("inf.txt: found an embedding that is not finite")
        assert count.startswith("Not embedded: 2")


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["in.txt"],
        ["--output", "out.parquet"],
        ["in.txt", "--output", "missing/out.parquet"],
        ["in.txt", "--output", "folder"],
        ["in.txt", "--output", "out.parquet", "--no-such-option"],
        *(
            ["in.txt", "--output", "out.parquet", "--vertical-chunk-size", size]
            for size in ("0", "-1", "1.5", "many")
        ),
        ["in.txt", "--output", "out.parquet", "--batch-size", "0"],
        ["in.txt", "--output", "out.parquet", "--max-seq-length", "0"],
        ["in.txt", "--output", "out.parquet", "--dtype", "int8"],
    ],
    ids=" ".join,
)
def test_usage_errors_come_before_any_work(monkeypatch, args):
    write("in.txt", "text")
    Path("folder").mkdir()
    monkeypatch.setattr(_embed, "embed", lambda *args, **kwargs: pytest.fail("work was begun"))
    result = run("embed", *args, status=2)
    assert "Usage" in result.stderr
    assert sorted(path.name for path in Path().iterdir()) == ["folder", "in.txt"]


# Errors that end the command: one line, and exit status 2.


def refusal(*args):
    """Return the one line of a command that could not be carried out, and that wrote nothing."""
    result = embed(*args, status=2)
    lines = [line for line in complaints(result) if line.startswith("Error: ")]
    assert len(lines) == 1, result.stderr
    assert re.fullmatch(r"Error: Found: .+\. Needed: .+\. Remedy: .+\.", lines[0])
    assert "Traceback" not in result.output
    assert not list(Path().glob("out*"))
    return lines[0]


@pytest.fixture
def copy(model, tmp_path):
    """Copy the model, so that it can be broken."""
    return shutil.copytree(model, tmp_path / "copy")


def test_a_model_that_is_none(tmp_path):
    write("a.txt", "text")
    (tmp_path / "folder").mkdir()
    args = ["a.txt", "--model"]
    assert "missing, which does not exist" in refusal(*args, "missing")
    assert "a.txt, which is not a folder" in refusal(*args, "a.txt")
    assert "a folder without config.json" in refusal(*args, "folder")


@pytest.mark.parametrize("length", [0, 100, -1])
def test_torn_weights(copy, length):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    assert "copy with broken weights (SafetensorError: " in refusal(
        *write_texts(9), "--model", copy
    )


def test_weights_that_a_file_lacks(copy):
    weights = load_file(copy / "model.safetensors")
    lost = next(name for name in weights if name.endswith("mixer.D"))
    del weights[lost]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    said = refusal(*write_texts(9), "--model", copy)
    assert f"whose files lack 1 of the model's weights ({lost})" in said


def test_files_that_a_model_lacks_or_that_are_broken(copy):
    args = [*write_texts(9), "--model", copy]
    (copy / "config.json").rename(copy / "kept")
    (copy / "config.json").write_text("{")
    assert "copy, which cannot be loaded (OSError: It looks like" in refusal(*args)
    config = json.loads((copy / "kept").read_text())
    wider = {**config, "hidden_size": 2 * config["hidden_size"], "expand": 1}
    (copy / "config.json").write_text(json.dumps(wider))
    assert "copy, where weights have other shapes" in refusal(*args)
    (copy / "kept").rename(copy / "config.json")
    for tokenizer in copy.glob("tokenizer*"):
        tokenizer.unlink()
    assert "with a tokenizer of special tokens alone" in refusal(*args)
    (copy / "model.safetensors").unlink()
    assert "no file named model.safetensors" in refusal(*args)


def test_a_model_without_a_recurrent_state_is_refused(tmp_path):
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "bert")
    character_tokenizer().save_pretrained(tmp_path / "bert")
    line = refusal(*write_texts(9), "--model", tmp_path / "bert")
    assert "bert, a model of type 'bert' (BertModel). Needed: a recurrent model" in line
    assert "vertical_chunk_size" not in line


def test_what_only_encode_could_do_is_no_remedy_of_the_command(model, tmp_path):
    transformer = SentenceTransformer(model, device="cpu")[0]
    other = SentenceTransformer(modules=[transformer, LayerNorm(32)], device="cpu")
    other.save(str(tmp_path / "other"))
    line = refusal(*write_texts(9), "--model", tmp_path / "other")
    assert "LayerNorm between Transformer and Pooling" in line
    assert "Remedy: give --model another model." in line


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "meta", "cuda:99"])
def test_a_device_that_is_not_there(model, device):
    line = refusal(*write_texts(9), "--model", model, "--device", device)
    assert f"Found: --device {device}" in line
    assert "Needed: a device that this machine has: cpu" in line


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't ..."),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", ["load", "word", "hash"])
def test_no_memory_at_all(model, monkeypatch, error, place):
    def fail(*args, **kwargs):
        raise error

    names = write_texts(9)
    if place == "load":
        monkeypatch.setattr(loading, "SentenceTransformer", fail)
    elif place == "word":
        monkeypatch.setattr(SentenceTransformer, "encode_document", fail)
    else:
        monkeypatch.setattr(fingerprint, "fingerprint", fail)
    line = refusal(*names, "--model", model)
    assert "Found: too little memory." in line
    assert "--vertical-chunk-size" in line


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_text_that_there_is_no_memory_for_is_named_and_the_rest_embedded(
    model, monkeypatch, embedded, error
):
    names = write_texts(20, 30, 10)
    original = SentenceTransformer.encode_document

    def encode_document(self, texts, **kwargs):
        if any(len(text) == 30 for text in texts):
            raise error
        return original(self, texts, **kwargs)

    monkeypatch.setattr(SentenceTransformer, "encode_document", encode_document)
    result = embed(*names, "--model", model, status=1)
    assert ids() == ["0.txt", "2.txt"]
    # They are tried side by side, then one by one.
    assert embedded == [*names, *names]
    what = "1.txt: found too little memory for it, needed room: try a smaller --vertical-chunk-size"
    assert complaints(result) == [what, "Not embedded: 1, named above."]


def test_an_input_that_there_is_no_memory_for_is_named_and_the_rest_embedded(model, monkeypatch):
    names = write_texts(20, 30)
    original = Path.open

    def opened(path, *args, **kwargs):
        if path.name == "0.txt":
            raise MemoryError
        return original(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    result = embed(*names, "--model", model, status=1)
    assert ids() == ["1.txt"]
    assert complaints(result)[0].startswith("0.txt: found too little memory for it, needed room")


@pytest.mark.parametrize("place", ["text", "input", "command"])
@pytest.mark.parametrize("shown", ["", "--traceback", "COMPAT_TRACEBACK"])
def test_a_fault_of_our_own_is_one_line_unless_the_traceback_is_asked_for(
    model, monkeypatch, place, shown
):
    names = write_texts(20, 30)
    owner, attribute, original = {
        "text": (SentenceTransformer, "encode_document", SentenceTransformer.encode_document),
        "input": (_documents, "_read_text", _documents._read_text),
        "command": (_embed, "merge", _embed.merge),
    }[place]

    def fail(*args, **kwargs):
        second = place == "text" and [len(text) for text in args[1]] in ([20, 30], [30])
        if second or place == "command" or (place == "input" and args[0].name == "1.txt"):
            raise KeyError("a fault")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, attribute, fail)
    args = [*names, "--model", model]
    if shown:
        monkeypatch.setenv("COMPAT_TRACEBACK", "1" if shown.isupper() else "0")
        with pytest.raises(KeyError, match="a fault"):
            embed(*args, *([] if shown.isupper() else [shown]))
    elif place == "command":
        result = embed(*args, status=2)
        assert "Error: Found: KeyError: 'a fault'. Needed: " in result.stderr
        assert "--traceback" in result.stderr
        assert Path("out.parquet.partial").exists()
    else:
        result = embed(*args, status=1)
        assert ids() == ["0.txt"]
        assert "1.txt: found an error (KeyError: 'a fault'), needed " in result.stderr


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOSPC, errno.EROFS])
def test_an_output_that_cannot_be_written(model, monkeypatch, code):
    names = write_texts(20)
    original = Path.open

    def denied(path, *args, **kwargs):
        # chmod would not stop root.
        if path.name == "out.parquet.partial":
            raise OSError(code, os.strerror(code), str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", denied)
    line = refusal(*names, "--model", model)
    assert f"Found: that out.parquet.partial cannot be written ({os.strerror(code)})" in line


def test_a_disk_that_becomes_full_at_the_end_keeps_the_rows_and_leaves_no_rest(model, monkeypatch):
    names = write_texts(20, 12)
    args = [*names, "--model", model, "--batch-size", 1]
    original, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(file)

    monkeypatch.setattr(os, "fsync", full)
    result = embed(*args, status=2)
    assert "Found: that out.parquet cannot be written (No space left on device)" in result.stderr
    assert [path.name for path in Path().glob("out*")] == ["out.parquet.partial"]
    monkeypatch.setattr(os, "fsync", original)
    assert "0 documents" in embed(*args).stdout
    assert ids() == names


def test_a_model_whose_folder_is_closed(model, monkeypatch):
    names = write_texts(9)
    original = Path.exists

    def exists(path, **kwargs):
        if path.name == "config.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, **kwargs)

    def load(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", model)

    monkeypatch.setattr(loading, "SentenceTransformer", load)
    monkeypatch.setattr(Path, "exists", exists)
    assert f"{model}, which cannot be read (Permission denied)" in refusal(*names, "--model", model)


def test_a_name_of_an_output_that_is_not_utf8():
    result = run("embed", "a.txt", "--output", os.fsdecode(b"o\xff.parquet"), status=2)
    assert "is not UTF-8" in " ".join(result.stderr.split())


def test_a_closed_stdout_does_not_matter(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        _embed._say("1 documents")
    # Python does not raise either when it closes it.


def test_an_output_whose_folder_cannot_be_looked_into(monkeypatch):
    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", denied)
    result = run("embed", "a.txt", "--output", "closed/out.parquet", status=2)
    assert "cannot be written (Permission denied)" in " ".join(result.stderr.split())


# A model without a padding token.


def without_padding(copy, **changes):
    config = json.loads((copy / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, **changes}))
    return copy


@pytest.mark.parametrize("changes", [{}, {"eos_token": None}], ids=["end", "unknown"])
def test_a_model_without_a_padding_token_embeds_what_each_text_alone_does(copy, model, changes):
    names = write_texts(40, 7, 23)
    embed(*names, "--model", without_padding(copy, **changes))
    got = np.array([row["embedding"] for row in rows()])
    expected = plain(model, [Path(name).read_text() for name in names])
    assert cosine_distance(got, expected).max() <= COSINE[torch.float32]
    assert [row["num_tokens"] for row in rows()] == [40, 7, 23]


def test_without_any_special_token_the_remedy_is_named(copy):
    without_padding(copy, eos_token=None, unk_token=None)
    assert "set tokenizer.pad_token" in refusal(*write_texts(9), "--model", copy)


def test_without_pyarrow_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    result = embed(*write_texts(9), status=2)
    assert 'pip install "vertical-chunking[embed]"' in result.stderr


# Help and status.


def plain_help(*args):
    return re.sub(r"\x1b\[[\d;]*m", "", run(*args, "--help").stdout)


def test_help_names_every_option():
    assert "embed" in plain_help()
    assert "--models" in plain_help("status")
    text = plain_help("embed")
    for option in (
        "--output", "--model", "--vertical-chunk-size", "--batch-size", "--dtype", "--device",
        "--text-column", "--id-column", "--max-seq-length", "--truncate", "--traceback",
        "--spans", "--spans-column", "--engine", "--address", "--workers",
    ):  # fmt: skip
        assert option in text
    for word in (
        ".txt", ".md", ".rst", ".text", ".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".jl",
        ".gz", ".bz2", ".zst", "kept", "FILE:LINE", "512", "float16",
    ):  # fmt: skip
        assert word in text


@pytest.mark.parametrize("name", ["embed", "status"])
def test_help_shows_all_that_was_written(name, monkeypatch):
    """Words in square brackets would be taken for colors."""
    monkeypatch.setenv("COLUMNS", "200")
    shown = plain_help(name).split()
    for parameter in get_command(app).commands[name].params:
        assert {*(parameter.help or "").split()} <= {*shown}


def test_libraries_that_cannot_be_imported(monkeypatch):
    for name in ("embed", "loading"):
        monkeypatch.setitem(sys.modules, f"compat.jobs.{name}", None)
    monkeypatch.delattr(compat.jobs, "embed")
    line = refusal(*write_texts(9))
    assert "Found: libraries that cannot be imported (ModuleNotFoundError: " in line


def test_without_typer_the_remedy_is_named():
    code = """
import runpy, sys
sys.modules["typer"] = None
runpy.run_module("compat", run_name="__main__", alter_sys=True)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert 'Remedy: pip install "vertical-chunking[embed]"' in line


def test_status_prints_the_tables():
    assert run("status").stdout == f"{compat.status()}\n"
    assert run("status", "--models").stdout == f"{compat.supported_models_table()}\n"


def test_the_engine_ray_needs_ray_and_a_folder(monkeypatch):
    there = find_spec
    monkeypatch.setattr(
        "compat.__main__.find_spec", lambda name: None if name == "ray" else there(name)
    )
    Path("folder").mkdir()
    result = embed("a.txt", "--engine", "ray", output="folder", status=2)
    (line,) = complaints(result)
    assert line.endswith('Remedy: pip install "vertical-chunking[embed,ray]".')
    write("file", "of mine")
    result = embed("a.txt", "--engine", "ray", output="file", status=2)
    assert "file is a file; with --engine ray it is a folder." in result.stderr
    result = embed("a.txt", "--workers", 2, status=2)
    assert "--address and --workers are for --engine ray." in result.stderr
