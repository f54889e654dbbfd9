"""`python -m compat embed --spans`: a row for each passage, in the context of its text."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from support.embedders import embedder, save_checkpoint, text
from support.stack import FORKS
from support.tolerances import COSINE

import compat
from compat.jobs import embed as _embed
from compat.jobs import journal, passages, text_files
from tests.jobs.test_command_line import (
    complaints,
    cosine_distance,
    embed,
    interrupt,
    limited,
    rows,
    run,
    write,
)

pytestmark = pytest.mark.skipif(FORKS, reason="encode_spans is compat's own")


@pytest.fixture
def embedded(monkeypatch):
    """Return the ids of the documents that went through the model, in their order."""
    seen = []
    original = passages._rows

    def spy(model, doc, *args):
        seen.append(doc.id)
        return original(model, doc, *args)

    monkeypatch.setattr(passages, "_rows", spy)
    return seen


def by_hand(model, whole, spans, prompt=""):
    """Embed with the last token, as the model does, every passage as the text up to its end."""
    reference = SentenceTransformer(str(model), device="cpu")
    return reference.encode([prompt + whole[:end] for _, end in spans])


def close(found, expected):
    assert (
        cosine_distance([row["embedding"] for row in found], expected).max()
        <= (COSINE[torch.float32])
    )


def places(found):
    return [(row["id"], row["start"], row["end"]) for row in found]


def test_every_so_many_tokens(model):
    whole = text(50)
    write("a.txt", whole)
    write("b.jsonl", json.dumps({"text": text(9, 1)}))
    result = embed("a.txt", "b.jsonl", "--model", model, "--spans", "every=20,overlap=5",
                   "--vertical-chunk-size", 7)  # fmt: skip
    found = rows()
    spans = [(0, 20), (15, 35), (30, 50)]
    assert places(found) == [*(("a.txt", *span) for span in spans), ("b.jsonl:1", 0, 9)]
    close(found[:3], by_hand(model, whole, spans))
    assert {row["sha256"] for row in found[:3]} == {hashlib.sha256(whole.encode()).hexdigest()}
    schema = pq.read_schema("out.parquet")
    assert schema.names == ["id", "start", "end", "embedding", "sha256"]
    numbers = [pa.int64(), pa.int64(), pa.list_(pa.float32(), 32)]
    assert schema.types == [pa.string(), *numbers, pa.string()]
    assert "2 documents, 4 passages in " in result.stdout
    assert "; 4 rows in out.parquet" in result.stdout
    assert complaints(result) == []


def test_without_an_overlap(model):
    write("a.txt", text(50))
    embed("a.txt", "--model", model, "--spans", "every=25")
    assert places(rows()) == [("a.txt", 0, 25), ("a.txt", 25, 50)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "make", [list, lambda span: dict(zip(("start", "end"), span, strict=True))]
)
def test_a_column_of_spans(model, kind, make):
    whole = text(60)
    spans = [(40, 60), (0, 9), (5, 45)]
    record = {"key": "a", "body": whole, "parts": [make(span) for span in spans]}
    if kind == "jsonl":
        write("in.jsonl", json.dumps(record))
    else:
        pq.write_table(pa.Table.from_pylist([record]), "in.parquet")
    embed(f"in.{kind}", "--model", model, "--text-column", "body", "--id-column", "key",
          "--spans-column", "parts")  # fmt: skip
    assert places(rows()) == [("a", *span) for span in spans]
    close(rows(), by_hand(model, whole, spans))


def lines(*records):
    return "\n".join(map(json.dumps, records))


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        (None, "found nothing in column 'spans', needed a list of pairs"),
        ([], "found nothing in column 'spans', needed a list of pairs"),
        ("0-5", "found a str in column 'spans', needed a list of pairs"),
        ([[0, 5, 7]], "found [0, 5, 7] in column 'spans', needed pairs [start, end]"),
        ([[0, True]], "found [0, true] in column 'spans', needed pairs [start, end]"),
        ([{"start": 1}], "found {\"start\": 1} in column 'spans', needed pairs [start, end]"),
        ([[0, 5], [3, 10]], "found the span [3, 10] in column 'spans', needed 0 <= start < end <="),
        ([[4, 4]], "found the span [4, 4] in column 'spans', needed 0 <= start < end <= 9"),
    ],
)
def test_spans_that_are_none_are_named_and_the_rest_is_embedded(model, spans, said):
    write("in.jsonl", lines({"text": text(9), "spans": spans}, {"text": "abc", "spans": [[0, 3]]}))
    result = embed("in.jsonl", "--model", model, "--spans-column", "spans", status=1)
    assert complaints(result)[0].startswith(f"in.jsonl:1: {said}")
    assert places(rows()) == [("in.jsonl:2", 0, 3)]


def test_inputs_without_the_column_are_named(model):
    write("a.txt", text(9))
    write("in.jsonl", lines({"text": text(9)}))
    result = embed("a.txt", "in.jsonl", "--model", model, "--spans-column", "spans", status=1)
    assert complaints(result)[:2] == [
        "a.txt: found a text file, needed a table or JSON lines with column 'spans'",
        "in.jsonl:1: found 'text', needed the column 'spans'",
    ]


def test_a_span_without_a_token_is_named(tmp_path):
    from support.embedders import word_tokenizer

    checkpoint = save_checkpoint(tmp_path / "checkpoint", tokenizer=word_tokenizer())
    embedder(checkpoint).save(str(tmp_path / "it"))
    write("in.jsonl", lines({"text": "abcd the", "spans": [[0, 4], [1, 4]]}))
    result = embed("in.jsonl", "--model", "it", "--spans-column", "spans", status=1)
    said = "in.jsonl:1: found that Span 1, (1, 4), has no token, needed a word in each span"
    assert complaints(result)[0] == said


# The same command again.


def test_it_carries_on_where_it_stopped(model, embedded, monkeypatch):
    for name, length in zip("abc", (50, 30, 40), strict=True):
        write(f"{name}.txt", text(length))
    args = ["a.txt", "b.txt", "c.txt", "--model", model, "--spans", "every=20",
            "--batch-size", 1]  # fmt: skip
    original = journal.append
    monkeypatch.setattr(
        _embed, "append", lambda *a: interrupt() if embedded[-1] == "c.txt" else original(*a)
    )
    embed(*args, status=130)
    monkeypatch.setattr(_embed, "append", original)
    del embedded[:]
    embed(*args)
    assert embedded == ["c.txt"]
    assert places(rows()) == [
        ("a.txt", 0, 20), ("a.txt", 20, 40), ("a.txt", 40, 50), ("b.txt", 0, 20),
        ("b.txt", 20, 30), ("c.txt", 0, 20), ("c.txt", 20, 40),
    ]  # fmt: skip
    before = rows()
    embed(*args)
    assert rows() == before


def test_a_changed_text_has_its_new_passages_alone(model, embedded):
    for name in "abc":
        write(f"{name}.txt", text(50))
    args = ["--model", model, "--spans", "every=20"]
    embed("a.txt", "b.txt", "c.txt", *args)
    write("b.txt", text(15, 1))
    del embedded[:]
    embed("c.txt", "b.txt", *args)
    assert embedded == ["b.txt"]
    thrice = [(0, 20), (20, 40), (40, 50)]
    assert places(rows()) == [
        *(("c.txt", *span) for span in thrice),
        ("b.txt", 0, 15),
        *(("a.txt", *span) for span in thrice),
    ]


def test_other_spans_of_the_same_text_are_embedded_anew(model):
    args = ["in.jsonl", "--model", model, "--spans-column", "spans"]
    for spans in ([[0, 9]], [[0, 5], [5, 9]], [[0, 9]]):
        write("in.jsonl", lines({"text": text(9), "spans": spans}))
        embed(*args)
        assert places(rows()) == [("in.jsonl:1", *span) for span in spans]


def test_an_interruption_between_output_and_journal_does_no_harm(model, monkeypatch):
    write("a.txt", text(50))
    args = ["a.txt", "--model", model, "--spans", "every=20"]
    monkeypatch.setattr(_embed, "merge", lambda *a: journal.merge(*a) and interrupt())
    embed(*args, status=130)
    assert len(rows()) == 3
    assert Path("out.parquet.partial").exists()
    monkeypatch.setattr(_embed, "merge", journal.merge)
    embed(*args)
    assert places(rows()) == [("a.txt", 0, 20), ("a.txt", 20, 40), ("a.txt", 40, 50)]


def test_passages_and_texts_are_not_mixed(model):
    write("a.txt", text(50))
    outputs = {"one": [], "two": ["--spans", "every=20"], "three": ["--spans", "every=30"]}
    for name, args in outputs.items():
        embed("a.txt", "--model", model, *args, output=name)
    for name in outputs:
        for other, args in outputs.items():
            result = embed(
                "a.txt", "--model", model, *args, output=name, status=0 if name == other else 2
            )
            assert name == other or f"Found: {name} with spans " in result.stderr


# Limits, prompts, long files, other pipelines.


def test_a_text_beyond_the_limit_is_named_or_cut(model, tmp_path):
    it = limited(model, tmp_path / "it", 30, document="read: ")
    whole = text(50)
    write("a.txt", whole)
    args = ["a.txt", "--model", it, "--spans", "every=10,overlap=2"]
    result = embed(*args, status=1)
    assert complaints(result)[0].startswith("a.txt: found 56 tokens, needed at most 30: --max-seq")
    assert complaints(embed(*args, "--truncate")) == ["Cut to 30 tokens, as --truncate says: 1."]
    spans = [(0, 10), (8, 18), (16, 24)]
    assert places(rows()) == [("a.txt", *span) for span in spans]
    close(rows(), by_hand(model, whole, spans, "read: "))


@pytest.mark.parametrize("limit", [None, 20_000])
def test_a_long_file_is_read_in_pieces(model, tmp_path, monkeypatch, limit):
    whole = text(30_000)
    write("long.txt", whole)
    monkeypatch.setattr(text_files, "LONG", 1000)
    args = [] if limit is None else ["--max-seq-length", limit, "--truncate"]
    embed("long.txt", "--model", model, "--spans", "every=8000", *args)
    ends = [8000, 16_000, *([24_000, 30_000] if limit is None else [20_000])]
    spans = list(zip([0, *ends], ends, strict=False))
    assert places(rows()) == [("long.txt", *span) for span in spans]
    with compat.vertical_chunking():
        reference = SentenceTransformer(model, device="cpu")
        expected = reference.encode([whole[:end] for end in ends], vertical_chunk_size=512)
    close(rows(), expected)


@pytest.mark.parametrize("cut", [False, True])
def test_a_file_that_changes_meanwhile_is_named(model, monkeypatch, cut):
    write("long.txt", text(3000))
    monkeypatch.setattr(text_files, "LONG", 1000)
    monkeypatch.setattr(text_files, "PIECE", 500)
    original = passages.encode_spans

    def change(*args, **kwargs):
        write("long.txt", text(2990) + "abcdefghij")
        return original(*args, **kwargs)

    monkeypatch.setattr(passages, "encode_spans", change)
    args = ["--max-seq-length", 100, "--truncate"] if cut else []
    result = embed("long.txt", "--model", model, "--spans", "every=800", *args, status=1)
    assert "long.txt: found that it has changed since" in result.stderr
    assert not Path("out.parquet").exists()


def test_documents_take_their_route(model, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "checkpoint")

    def route(mode):
        return [Transformer(checkpoint), Pooling(32, mode)]

    router = Router.for_query_document(route("mean"), route("lasttoken"))
    SentenceTransformer(modules=[router], device="cpu").save(str(tmp_path / "it"))
    whole = text(50)
    write("a.txt", whole)
    embed("a.txt", "--model", tmp_path / "it", "--spans", "every=20")
    reference = SentenceTransformer(str(tmp_path / "it"), device="cpu")
    close(rows(), reference.encode_document([whole[:20], whole[:40], whole]))


def test_a_number_that_is_none_is_named(model, tmp_path):
    it = SentenceTransformer(model, device="cpu")
    with torch.no_grad():
        it.transformers_model.get_input_embeddings().weight[5] = np.inf
    it.save(str(tmp_path / "it"))
    letter = it.tokenizer.decode([5])
    write("a.txt", f"xyz{letter}xyz")
    result = embed("a.txt", "--model", tmp_path / "it", "--spans", "every=20", status=1)
    assert complaints(result)[0].startswith("a.txt: found an embedding that is not finite")


@pytest.mark.parametrize(
    "args",
    [
        ["--spans", "256"],
        ["--spans", "every=0"],
        ["--spans", "every=8,overlap=8"],
        ["--spans", "every=8,overlap=-1"],
        ["--spans", "every=8", "--spans-column", "spans"],
    ],
    ids=" ".join,
)
def test_usage_errors_come_before_any_work(monkeypatch, args):
    write("in.txt", "text")
    monkeypatch.setattr(_embed, "embed", lambda *args, **kwargs: pytest.fail("work was begun"))
    result = run("embed", "in.txt", "--output", "out", *args, status=2)
    assert "Usage" in result.stderr
    assert "--spans" in result.stderr
