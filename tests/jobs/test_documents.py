"""Documents out of files and folders: every format, the refusals, and nothing unsaid."""

import bz2
import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from compat.jobs import formats
from compat.jobs.documents import Document, Note, Problem, read_documents

PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: pa.Codec("zstd").compress(data).to_pybytes(),
}


def write(path, content=""):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(*paths, text="text", name=None):
    return list(read_documents([Path(path) for path in paths], text, name))


def texts(*paths, **columns):
    """Return the texts by id, of inputs without a problem."""
    items = read(*paths, **columns)
    assert all(isinstance(item, Document) for item in items), items
    return {item.id: item.text for item in items}


def told(*paths, kind=Problem, **columns):
    return [str(item) for item in read(*paths, **columns) if isinstance(item, kind)]


def json_lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def test_documents_are_read_one_at_a_time():
    write("first.txt", "one")
    write("second.jsonl", json_lines("two"))
    documents = read_documents([Path("first.txt"), Path("second.jsonl")], "text", None)
    assert next(documents).text == "one"
    write("second.jsonl", json_lines("later"))
    assert next(documents).text == "later"


# Formats.


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".jl", ".JSONL"])
def test_json_lines_under_all_their_names(suffix, packed):
    name = write(f"a{suffix}{packed}", PACK[packed](json_lines("one", "two ä").encode()))
    assert texts(name) == {f"{name}:1": "one", f"{name}:2": "two ä"}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_tables_in_text(suffix, delimiter, packed):
    rows = ["id,text", '7,"one, of ""two"""', "", 'b,"a\r\nb"', "c,ä"]
    content = "\n".join(rows).replace(",", delimiter).replace(f"one{delimiter}", "one,")
    name = write(f"a{suffix}{packed}", PACK[packed](b"\xef\xbb\xbf" + content.encode()))
    assert texts(name) == {f"{name}:2": 'one, of "two"', f"{name}:4": "a\r\nb", f"{name}:6": "ä"}
    assert texts(name, name="id") == {"7": 'one, of "two"', "b": "a\r\nb", "c": "ä"}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("name", ["a.txt", "a.log", "a"])
def test_a_file_that_is_named_is_text_unless_its_suffix_says_something_else(name, packed):
    name = write(name + packed, PACK[packed](b"prose\r\nof two lines"))
    assert texts(name) == {name: "prose\r\nof two lines"}


def test_a_field_of_a_table_has_any_length():
    long = "a b " * 500_000
    write("a.csv", f"text\n{long}\n")
    assert texts("a.csv") == {"a.csv:2": long}


def test_what_is_compressed_in_parts_is_read_to_its_end():
    for packed, compress in list(PACK.items())[1:]:
        lines = [json_lines(f"{number} " * 1000).encode() for number in range(3)]
        name = write(f"a.jsonl{packed}", b"".join(map(compress, lines)))
        assert len(texts(name)) == 3, packed


@pytest.mark.parametrize("packed", list(PACK)[1:])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_what_is_compressed_is_read_as_it_streams(suffix, packed):
    lines = [os.urandom(50_000).hex() for _ in range(30)]
    content = json_lines(*lines) if suffix == ".jsonl" else "\n".join(["text", *lines])
    name = write(f"a{suffix}{packed}", PACK[packed](content.encode())[:-9])
    documents = read_documents([Path(name)], "text", None)
    # A reader finds out that the end is missing only when it unpacks it.
    assert next(documents).text == lines[0]
    assert isinstance(list(documents)[-1], Problem)


@pytest.mark.parametrize("packed", list(PACK)[1:])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt"])
def test_broken_compression_is_a_problem_of_that_file(suffix, packed):
    random = os.urandom(300_000).hex()
    content = {".jsonl": json_lines("first", random), ".csv": f"text\nfirst\n{random}\n"}
    whole = PACK[packed](content.get(suffix, random).encode())
    write(f"torn{suffix}{packed}", whole[: len(whole) // 2])
    write(f"none{suffix}{packed}", "not compressed at all")
    write("next.txt", "next")
    items = read(f"torn{suffix}{packed}", f"none{suffix}{packed}", "next.txt")
    assert [item.text for item in items if isinstance(item, Document)][-1] == "next"
    problems = [str(item) for item in items if isinstance(item, Problem)]
    assert len(problems) == 2
    for name, problem in zip(("torn", "none"), problems, strict=True):
        assert problem.startswith(f"{name}{suffix}{packed}: found broken {packed} (")
        assert problem.endswith("needed a whole file")
    assert not any(isinstance(item, Document) and len(item.text) > 5 for item in items)


@pytest.mark.parametrize("suffix", sorted(formats._NEEDED_FOR))
def test_formats_that_are_no_prose_are_refused_with_what_to_do(suffix):
    write(f"a{suffix.upper()}", json_lines("x"))
    write(f"a{suffix}.gz", gzip.compress(b"x"))
    for problem in told(f"a{suffix.upper()}", f"a{suffix}.gz"):
        assert f": found the format {suffix}, needed " in problem
    assert read(f"a{suffix.upper()}", f"a{suffix}.gz")


def test_parquet_is_not_unpacked():
    pq.write_table(pa.table({"text": ["x"]}), "a.parquet")
    write("a.parquet.gz", gzip.compress(Path("a.parquet").read_bytes()))
    (problem,) = told("a.parquet.gz")
    assert "found .parquet inside .gz, needed the .parquet itself: unpack it" in problem


def test_bytes_of_zero_are_no_text():
    write("a", b"one\ntw\0o")
    write("utf16.txt", "ab".encode("utf-16-le"))
    assert told("a", "utf16.txt") == [
        "a:2: found the byte 0x00, needed a text file in UTF-8",
        "utf16.txt:1: found the byte 0x00, needed a text file in UTF-8",
    ]


def test_a_broken_row_of_a_table_costs_no_other():
    rows = [b"text,n", b"one,1", b'"two"x,2', b"three", b"na\xefve,4", b",5", b"six,6", b'"seven,7']
    write("a.csv", b"\n".join(rows))
    items = read("a.csv")
    assert [item.id for item in items if isinstance(item, Document)] == ["a.csv:2", "a.csv:7"]
    assert told("a.csv") == [
        "a.csv:3: found a broken row (',' expected after '\"'), needed whole quoted fields",
        "a.csv:4: found 1 fields, needed 2, one for each column",
        "a.csv:5: found the byte 0xef that is not UTF-8, needed UTF-8 text",
        "a.csv:6: found an empty text, needed at least one character",
        "a.csv:8: found a broken row (unexpected end of data), needed whole quoted fields",
    ]


@pytest.mark.parametrize(
    ("header", "what"),
    [
        ("", "a.csv: found no line, needed one with the names of the columns"),
        ("id;text\n1;x", "a.csv: found 'id;text', needed the column 'text'"),
        ("text,text\nx,y", "a.csv: found the column 'text' more than once, needed one"),
        (b"te\xefxt\ntext\nx", "a.csv:1: found the byte 0xef that is not UTF-8, needed UTF-8"),
        ('"text\nx', "a.csv:1: found a broken row (unexpected end of data), needed"),
    ],
)
def test_a_table_without_the_names_of_its_columns(header, what):
    write("a.csv", header)
    (item,) = read("a.csv")
    assert str(item).startswith(what)


def test_a_column_of_parquet_that_is_there_twice():
    table = pa.table([["a"], ["b"], ["c"], ["d"]], names=["text", "id", "id", "other"])
    pq.write_table(table, "a.parquet")
    assert texts("a.parquet") == {"a.parquet:1": "a"}
    (problem,) = told("a.parquet", name="id")
    assert problem == "a.parquet: found the column 'id' more than once, needed one of that name"


# Folders.


def test_a_folder_is_searched_for_texts_and_what_else_it_has_is_counted():
    for number in range(10):
        write(f"docs/pictures/{number}.PNG")
    for name in ("a.pdf", "sub/b.pdf", "Makefile", "c.jsonl.gz", "d.jl"):
        write(f"docs/{name}")
    for name in ("a.txt", "sub/b.md", "sub/c.rst.zst"):
        packed = formats.suffixes(name)[1]
        write(f"docs/{name}", PACK[packed](b"prose"))
    found = [item.id for item in read("docs") if isinstance(item, Document)]
    assert found == ["docs/a.txt", "docs/sub/b.md", "docs/sub/c.rst.zst"]
    assert told("docs") == []
    assert told("docs", kind=Note) == [
        "docs: 15 files not read (.png 10, .pdf 2, .jl 1, .jsonl.gz 1, no suffix 1; "
        "to read tables and JSON lines, name them)"
    ]


def test_a_folder_without_a_text_says_what_it_has():
    write("docs/a.parquet")
    (problem,) = told("docs")
    assert problem.startswith("docs: found no file for it (.parquet 1; to read tables")
    assert problem.endswith("needed one that ends in .txt .md .rst .text")


def test_many_kinds_of_other_files_are_still_one_line():
    write("docs/a.txt", "a")
    for number in range(20):
        write(f"docs/a.x{number:02}")
    (note,) = told("docs", kind=Note)
    assert note.endswith("20 files not read (.x00 1, .x01 1, .x02 1, .x03 1, .x04 1, .x05 1, "
                         "others 14)")  # fmt: skip


def test_links_to_folders_are_followed_and_circles_noticed():
    write("elsewhere/sub/b.txt", "b")
    write("docs/a.txt", "a")
    write("docs/z/c.txt", "c")
    Path("docs/link").symlink_to(Path("elsewhere").resolve())
    Path("elsewhere/back").symlink_to(Path("docs").resolve())
    Path("docs/again").symlink_to("z")
    assert [item.id for item in read("docs") if isinstance(item, Document)] == [
        "docs/a.txt", "docs/link/sub/b.txt", "docs/z/c.txt"
    ]  # fmt: skip
    what = "docs: 2 links not followed (docs/again): that folder is read already"
    assert told("docs", kind=Note) == [what]
    assert told("docs") == []
    # The link is named itself.
    Path("named").symlink_to("docs/z")
    assert texts("named") == {"named/c.txt": "c"}


def test_a_link_to_nothing_is_a_problem_where_it_names_a_text():
    write("docs/a.txt", "a")
    Path("docs/b.txt").symlink_to("nowhere")
    Path("docs/c.txt").symlink_to("c.txt")
    assert told("docs") == [
        f"docs/{name}.txt: found nothing there, needed a file or a folder" for name in "bc"
    ]


def test_a_folder_behind_a_link_that_is_closed_is_named(monkeypatch):
    write("docs/a.txt", "a")
    write("closed/b.txt", "b")
    Path("docs/link").symlink_to(Path("closed").resolve())
    original = os.scandir

    def scandir(path):
        # chmod would not stop root.
        if Path(path).name == "link":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    reason = "found that it cannot be read (Permission denied), needed a readable file"
    assert told("docs") == [f"docs/link: {reason}"]
