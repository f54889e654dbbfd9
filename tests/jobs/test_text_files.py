"""Text files of any length: read in pieces to know them, and again as the model reads them."""

import bz2
import gzip
import hashlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sentence_transformers import SentenceTransformer
from support.embedders import embedder, save_checkpoint, text
from support.stack import FORKS
from support.tolerances import COSINE
from tokenizers import Regex, normalizers
from typer.testing import CliRunner

from compat.__main__ import app
from compat.hooks import streamed_texts
from compat.jobs import text_files
from compat.jobs.text_files import ChangedError, NotTextError, TextFile, scan
from compat.stream.tokenizer import StreamingTokenizer


def write(name, content):
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(name)


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_what_is_known_of_a_text_does_not_depend_on_pieces(monkeypatch, piece, mark):
    monkeypatch.setattr(text_files, "PIECE", piece)
    whole = "a\r\né中👩\u200d🚀\rb\n"
    path = write("a.txt", mark + whole.encode())
    size, sha256 = len(whole.encode()), hashlib.sha256(whole.encode()).hexdigest()
    assert scan(path) == (whole, False, size, sha256)
    assert "".join(TextFile(path, sha256)()) == whole
    monkeypatch.setattr(text_files, "LONG", 5)
    assert scan(path) == (None, False, size, sha256)
    assert scan(write("b.txt", " \n\u3000")).blank


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("content", "line", "byte"),
    [
        (b"one\ntwo \xff\n", 2, 0xFF),
        (b"\xef\xbb\xbfone\n\n\xe4\xb8 x", 3, 0xE4),
        (b"one\n\xe4\xb8", 2, 0xE4),
        (b"\xffone\n\ntwo\n\0x\0", 4, 0),  # What has bytes of zero is no text at all.
    ],
)
def test_a_broken_byte_is_found_on_its_line(monkeypatch, piece, content, line, byte):
    monkeypatch.setattr(text_files, "PIECE", piece)
    with pytest.raises(NotTextError) as error:
        scan(write("a.txt", content))
    assert (error.value.line, error.value.byte) == (line, byte)


@pytest.mark.parametrize("now", [b"another", b"text and more", b"tex", b"\xff"])
def test_a_file_that_has_changed(now):
    path = write("a.txt", "text")
    file = TextFile(path, scan(path).sha256)
    assert "".join(file()) == "text"
    write("a.txt", now)
    with pytest.raises(ChangedError):
        list(file())


# The command.


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedder")
    embedder(save_checkpoint(folder / "checkpoint")).save(str(folder / "it"))
    return str(folder / "it")


@pytest.fixture
def streamed(monkeypatch):
    """How often each text was tokenized; texts of more than 40 characters are long."""
    if FORKS:
        pytest.skip("the forks read texts whole")
    monkeypatch.setattr(streamed_texts, "LONG", 40)
    monkeypatch.setattr(text_files, "LONG", 40)
    calls = []

    class Spy(StreamingTokenizer):
        def __init__(self, tokenizer):
            super().__init__(tokenizer, 16)

        def _windows(self, pieces, with_offsets):
            calls.append("")
            for piece in pieces:
                calls[-1] += piece
                yield from super()._windows([piece], with_offsets)

    monkeypatch.setattr(streamed_texts, "StreamingTokenizer", Spy)
    return lambda texts: [calls.count(one) for one in texts]


def embed(*args, status=0):
    args = ["embed", *map(str, args), "--output", "out.parquet"]
    result = CliRunner().invoke(app, args, env={"COLUMNS": "200"})
    assert result.exit_code == status, result.output
    return [line for line in result.stderr.splitlines() if ": " in line and "%|" not in line]


def rows():
    return pq.ParquetFile("out.parquet").read().to_pylist()


def same(found, texts, model):
    reference = SentenceTransformer(model, device="cpu")
    wanted = np.stack([reference.encode_document([one])[0] for one in texts]).astype(np.float64)
    found = np.array([row["embedding"] for row in found])
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
    assert (1 - (found * wanted).sum(1) / lengths).max() <= COSINE[torch.float32]


def test_long_files_are_tokenized_once_as_they_are_read(model, streamed):
    texts = [text(100, 1), text(200, 2), text(20, 3), text(90, 4)]
    write("a.txt", texts[0])
    write("b.txt.gz", gzip.compress(b"\xef\xbb\xbf" + texts[1].encode()))
    write("c.txt", texts[2])
    write("d.txt.bz2", bz2.compress(texts[3].encode()))
    embed(".", "--model", model, "--vertical-chunk-size", 9)
    same(rows(), texts, model)
    assert [row["num_tokens"] for row in rows()] == [100, 200, 20, 90]
    assert [row["sha256"] for row in rows()] == [
        hashlib.sha256(one.encode()).hexdigest() for one in texts
    ]
    assert streamed(texts) == [1, 1, 0, 1]
    # And nothing of it again.
    embed(".", "--model", model)
    assert streamed(texts) == [1, 1, 0, 1]


def test_long_records_are_streamed_too(model, streamed):
    texts = [text(100, 1), text(20, 3)]
    write("a.jsonl", "".join(f'{{"text": "{one}"}}\n' for one in texts))
    embed("a.jsonl", "--model", model)
    same(rows(), texts, model)
    assert [row["num_tokens"] for row in rows()] == [100, 20]
    assert streamed(texts) == [1, 0]


def test_a_file_that_changes_under_the_command_is_a_problem_of_its_own(
    model, streamed, monkeypatch
):
    write("a.txt", text(100))
    write("b.txt", text(60))
    original = SentenceTransformer.encode_document

    def encode_document(self, texts, **kwargs):
        if len(texts) == 2:  # A model is tried with one, before files are read.
            write("a.txt", text(99))
        return original(self, texts, **kwargs)

    monkeypatch.setattr(SentenceTransformer, "encode_document", encode_document)
    said = embed("a.txt", "b.txt", "--model", model, status=1)
    assert said[0] == (
        "a.txt: found that it has changed since this command began, needed a file at rest"
    )
    assert [row["id"] for row in rows()] == ["b.txt"]


@pytest.mark.parametrize("truncate", [False, True])
def test_long_files_and_a_limit(model, streamed, truncate):
    texts = [text(100), text(60), text(50)]
    for name, one in zip("abc", texts, strict=True):
        write(f"{name}.txt", one)
    args = ["a.txt", "b.txt", "c.txt", "--model", model, "--max-seq-length", 60]
    if truncate:
        assert "Cut to 60 tokens, as --truncate says: 1." in embed(*args, "--truncate")
        same(rows(), [texts[0][:60], *texts[1:]], model)
        assert [row["num_tokens"] for row in rows()] == [60, 60, 50]
    else:
        said = embed(*args, status=1)
        assert said[0].startswith("a.txt: found 100 tokens, needed at most 60: ")
        assert [row["num_tokens"] for row in rows()] == [60, 50]
    assert streamed(texts) == [1, 1, 1]


def test_num_tokens_is_without_the_prompt(model, streamed, tmp_path):
    prompted = SentenceTransformer(model, device="cpu", prompts={"document": "read: "})
    prompted.save(str(tmp_path / "prompted"))
    write("a.txt", text(100))
    embed("a.txt", "--model", tmp_path / "prompted")
    assert [row["num_tokens"] for row in rows()] == [100]
    same(rows(), [text(100)], str(tmp_path / "prompted"))


def test_a_long_file_of_which_no_token_is_made(model, streamed, tmp_path):
    it = SentenceTransformer(model, device="cpu")
    it.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    it.save(str(tmp_path / "it"))
    write("a.txt", "x" * 100)
    write("b.txt", "b" * 100)
    said = embed("a.txt", "b.txt", "--model", tmp_path / "it", status=1)
    what = "a.txt: found a text of which the tokenizer makes no token, needed at least one"
    assert said[0] == what
    assert [row["id"] for row in rows()] == ["b.txt"]


def test_a_tokenizer_that_cannot_be_streamed_is_used_whole(model, tmp_path, streamed):
    it = SentenceTransformer(model, device="cpu")
    it.tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("^x"), "y")
    it.save(str(tmp_path / "it"))
    streamed_texts._warn_of_whole_texts.cache_clear()
    write("a.txt", text(100))
    with pytest.warns(UserWarning, match="tokenized as a whole"):
        embed("a.txt", "--model", tmp_path / "it")
    assert [row["num_tokens"] for row in rows()] == [100]
    same(rows(), [text(100)], model)
    assert streamed([text(100)]) == [0]
