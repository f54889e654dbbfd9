"""A TextStream gives the text again and again, as it is in the file."""

import pickle

import pytest

from compat import TextStream


@pytest.mark.parametrize("source", [["ab", "", "c"], ("ab", "c"), lambda: iter(["a", "bc"])])
def test_it_can_be_read_again(source):
    text = TextStream(source)
    assert text.read() == text.read() == "".join(text) == "abc"
    assert text.size is None


def test_a_file_keeps_its_line_ends_and_loses_its_byte_order_mark(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n\xc3\xa9")
    text = TextStream.open(path)
    assert text.read() == "one\r\ntwo\rthree\n\xe9"
    assert text.size == path.stat().st_size
    assert TextStream.open(str(path), encoding="latin-1").read().endswith("\xc3\xa9")


def test_pieces_of_a_file_are_small(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("x\xe9" * 200_000, encoding="utf-8")
    pieces = list(TextStream.open(path))
    assert "".join(pieces) == "x\xe9" * 200_000
    assert max(map(len, pieces)) < 100_000


def test_a_file_goes_to_other_processes_as_its_path(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("x" * 100_000)
    sent = pickle.dumps(TextStream.open(path))
    assert len(sent) < 1000
    assert pickle.loads(sent).read() == "x" * 100_000


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        TextStream.open(tmp_path / "none.txt")


@pytest.mark.parametrize("source", ["text", b"text", 3, None])
def test_what_is_no_source_of_pieces(source):
    with pytest.raises(TypeError, match="source must be an iterable of str"):
        TextStream(source)


def test_an_iterator_that_gives_its_pieces_once():
    with pytest.raises(TypeError, match="again and again; found generator"):
        TextStream(piece for piece in "abc")


def test_pieces_are_str():
    with pytest.raises(TypeError, match=r"must be a str; found b'ab'"):
        TextStream([b"ab"]).read()
