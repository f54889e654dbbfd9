"""Streamed token ids are those of the whole text, or the tokenizer is refused by name."""

import re

import pytest
from tokenizers import AddedToken, NormalizedString, Regex, Tokenizer, models
from tokenizers import normalizers as norm
from tokenizers import pre_tokenizers as pre
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import compat
from ci.fuzz.cases import Difference, case
from ci.fuzz.kinds import KINDS, described
from compat import StreamingTokenizer, UnsupportedTokenizerError
from compat.stream import normalizers, pre_tokenizers, seams
from compat.stream import tokenizer as streaming
from compat.stream.characters import NO
from compat.stream.patterns import Pattern

TEXT = "The state is carried from chunk to chunk, and nothing else; see 2,048 tokens.\n" * 40


def of_kind(kind):
    return Tokenizer.from_str(described(kind))


def streamed(tokenizer, text, window=16, **options):
    ids = StreamingTokenizer(tokenizer, window)([text], **options)
    return [i for part in ids for i in part]


def word_level(*words, **parts):
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["?", *words])}, "?"))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def bpe(merges, normalizer=None, pre_tokenizer=None, **model):
    """A BPE whose vocabulary are the characters of its merges and what they make."""
    vocabulary = ["?", *dict.fromkeys("".join(a + b for a, b in merges))]
    vocabulary += [a + b for a, b in merges]
    numbered = {token: at for at, token in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(models.BPE(numbered, merges, unk_token="?", **model))
    for name, part in {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}.items():
        if part is not None:
            setattr(tokenizer, name, part)
    return tokenizer


def everywhere(tokenizer, text):
    """The text's ids, after they were found to be the same in windows of all sizes."""
    right = tokenizer.encode(text, add_special_tokens=False)
    cuts = [(text[:at], text[at:]) for at in range(1, len(text))]
    ids = [[i for half in cut for i in tokenizer.encode(half).ids] for cut in cuts]
    assert any(found != right.ids for found in ids), (
        "a text that may be cut anywhere proves nothing"
    )
    for window in range(1, len(text) + 2):
        parts = list(StreamingTokenizer(tokenizer, window).offsets([text], False))
        assert [i for ids, _ in parts for i in ids] == right.ids, f"window {window}"
        assert [place for _, places in parts for place in places] == right.offsets, (
            f"window {window}"
        )
    return right.ids


# Random tokenizers of all kinds, and nasty texts.


@pytest.mark.parametrize("kind", KINDS)
def test_random_cases(kind):
    results = [case(kind, seed) for seed in range(60)]
    assert [result for result in results if isinstance(result, Difference)] == []
    assert results.count("same") > 40


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_text_is_cut_into_windows(kind):
    """It is read little farther than its tokens are given out, and not held until its end."""
    read = 0

    def pieces():
        nonlocal read
        for at in range(0, len(TEXT), 10):
            read += 10
            yield TEXT[at : at + 10]

    tokenizer, farthest = of_kind(kind), 0
    for _, places in StreamingTokenizer(tokenizer, window=100).offsets(pieces()):
        farthest = max([farthest, *(end for _, end in places)])
        assert read - farthest < 160
    assert streamed(tokenizer, TEXT, 100) == tokenizer.encode(TEXT).ids


# What breaks a cut that only looks right.


def test_a_word_too_long_for_wordpiece():
    """Both windows [:100] and [62:] agree on 17 tokens in a row, and the whole has [UNK]."""
    tokenizer = of_kind("bert")
    text = "x " + "a" * 150 + " y"
    assert tokenizer.token_to_id("[UNK]") in everywhere(tokenizer, text)
    assert tokenizer.token_to_id("[UNK]") not in tokenizer.encode(text[:100]).ids


def test_white_space_that_a_far_line_feed_moves():
    """In Llama-3's expression the words of `a  \\n   ` change when `\\nb` comes behind it."""
    tokenizer = of_kind("llama-3")
    words = [[w for w, _ in tokenizer.pre_tokenizer.pre_tokenize_str(t)] for t in TWO_ENDS]
    assert words[0] != words[1][: len(words[0])]
    for text in TWO_ENDS:
        everywhere(tokenizer, text)


TWO_ENDS = ["a  \n   ", "a  \n   \nb"]


def test_unigram_without_words_is_refused():
    """It adds up scores from the beginning on, and rounds: not even far away is all the same."""
    model = models.Unigram([("?", 0.0), ("a", -1.0), ("b", -2.0), ("ab", -2.5)], 0)
    with pytest.raises(UnsupportedTokenizerError, match="Unigram"):
        StreamingTokenizer(Tokenizer(model))


def test_an_added_token_that_strips_to_the_right():
    tokenizer = word_level("a", " ", pre_tokenizer=pre.Split(" ", "isolated"))
    tokenizer.add_tokens([AddedToken("<x>", rstrip=True)])
    everywhere(tokenizer, "a <x>    a <x> a")


def test_an_added_token_of_one_word():
    tokenizer = word_level("a", pre_tokenizer=pre.Punctuation())
    tokenizer.add_tokens([AddedToken("ab", single_word=True)])
    everywhere(tokenizer, "a.ab.abc.ab.c.xab")


def test_a_mark_behind_what_comes_after_a_cut():
    """NFC makes one character of `=` and U+0338, which are the beginning of the next window."""
    tokenizer = word_level(
        "a", "=", "\u2260", normalizer=norm.NFC(), pre_tokenizer=pre.Punctuation()
    )
    everywhere(tokenizer, "a=\u0338a=a=\u0338")


def test_a_vocabulary_that_knows_whole_words_is_refused():
    """With ignore_merges `foo` alone is a token, and in `foo▁foo` it is not."""
    tokenizer = known_by_heart("foo", *"fo▁aZ")
    assert tokenizer.encode("foo").ids == [0]
    assert 0 not in tokenizer.encode("foo▁foo").ids
    with pytest.raises(UnsupportedTokenizerError, match="BPE, which needs all of a word"):
        StreamingTokenizer(tokenizer)


def test_a_prefix_at_the_beginning_only():
    """Each window begins with a space of Metaspace, which the text has once."""
    mark = pre.Metaspace(prepend_scheme="first", split=False)
    everywhere(bpe([("a", "b"), ("▁", "a")], pre_tokenizer=mark), "abbaabb bab ab")


def test_unknown_characters_that_become_one_token():
    tokenizer = bpe([("a", "b")], fuse_unk=True)
    assert everywhere(tokenizer, "abxyzab,.ab") == [3, 0, 3, 0, 3]


# What is refused, and named.


class Upper:
    def normalize(self, normalized: NormalizedString):
        normalized.uppercase()


@pytest.mark.parametrize(
    ("named", "parts"),
    [
        ("written in Python", {"normalizer": norm.Normalizer.custom(Upper())}),
        ("UnicodeScripts", {"pre_tokenizer": pre.UnicodeScripts()}),
        ("FixedLength", {"pre_tokenizer": pre.FixedLength(4)}),
        (r"\(\?<=", {"pre_tokenizer": pre.Split(Regex("(?<=a)b"), "isolated")}),
        (r"\\\\b", {"pre_tokenizer": pre.Split(Regex(r"\ba"), "isolated")}),
        (r"\^", {"normalizer": norm.Replace(Regex("^a"), "b")}),
        (r"\[\[", {"pre_tokenizer": pre.Split(Regex("[a[bc]]"), "isolated")}),
        ("repeat of a repeat", {"pre_tokenizer": pre.Split(Regex("a{2}**"), "isolated")}),
        ("in any case", {"pre_tokenizer": pre.Split(Regex(r"(?i:[\w])"), "isolated")}),
        ("nothing", {"pre_tokenizer": pre.Split(Regex("a*"), "isolated")}),
        ("exactly once", {"post_processor": TemplateProcessing("$A $A", special_tokens=[])}),
    ],
)
def test_parts_that_may_look_far(named, parts):
    with pytest.raises(UnsupportedTokenizerError, match=named):
        StreamingTokenizer(word_level("a", **{"pre_tokenizer": pre.Whitespace(), **parts}))


def test_dropout_is_refused():
    with pytest.raises(UnsupportedTokenizerError, match="at random"):
        StreamingTokenizer(bpe([("a", "b")], dropout=0.1))


def test_an_added_token_of_which_nothing_is_left_is_refused():
    tokenizer = word_level("a", normalizer=norm.StripAccents(), pre_tokenizer=pre.Whitespace())
    tokenizer.add_tokens([AddedToken("\u0301", normalized=True)])
    with pytest.raises(UnsupportedTokenizerError, match="to nothing"):
        StreamingTokenizer(tokenizer)


def test_what_is_no_fast_tokenizer_is_refused():
    with pytest.raises(UnsupportedTokenizerError, match="class str"):
        StreamingTokenizer("gpt2")


def test_a_million_characters_without_a_seam():
    tokenizer = of_kind("bert")
    assert len(streamed(tokenizer, "bb " + "a" * 999_000 + " c", 16_384)) == 6
    with pytest.raises(UnsupportedTokenizerError, match="1,000,000 characters from position 2 of"):
        streamed(tokenizer, "bb " + "a" * 1_100_000 + " c", 16_384)


# What is asked for.


def test_truncation_reads_no_farther():
    tokenizer = of_kind("gpt2")

    def pieces():
        yield TEXT
        raise AssertionError("read beyond what max_length needs")

    ids = [i for part in StreamingTokenizer(tokenizer, 64)(pieces(), max_length=20) for i in part]
    assert ids == tokenizer.encode(TEXT).ids[:20]


def test_truncation_leaves_room_for_special_tokens():
    tokenizer = of_kind("bert")
    ends = [tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")]
    assert streamed(tokenizer, TEXT, max_length=2) == ends
    with pytest.raises(ValueError, match="at least 2, the number of special tokens; found 1"):
        streamed(tokenizer, TEXT, max_length=1)


def test_tokenizers_of_transformers():
    folder = f"{compat.__path__[0]}/default_model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert streamed(tokenizer, TEXT) == tokenizer(TEXT, verbose=False)["input_ids"]
    tokenizer.truncation_side = "left"
    assert streamed(tokenizer, TEXT) == tokenizer(TEXT, verbose=False)["input_ids"]
    with pytest.raises(UnsupportedTokenizerError, match="left"):
        streamed(tokenizer, TEXT, max_length=5)


@pytest.mark.parametrize("split", [False, True])
def test_special_tokens_may_be_text(split):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=of_kind("gpt2"), eos_token="<|endoftext|>", split_special_tokens=split
    )
    text = "a <|endoftext|> b"
    ids = streamed(tokenizer, text, 3)
    assert ids == tokenizer(text)["input_ids"]
    assert (tokenizer.eos_token_id in ids) is not split


def test_padding_truncation_and_later_changes_of_the_original_play_no_part():
    tokenizer = of_kind("gpt2")
    right = tokenizer.encode(TEXT).ids
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=100_000)
    stream = StreamingTokenizer(tokenizer)
    tokenizer.add_tokens(["state"])
    assert [i for part in stream([TEXT]) for i in part] == right


def test_a_window_has_a_character():
    with pytest.raises(ValueError, match="window must be at least 1"):
        StreamingTokenizer(of_kind("gpt2"), 0)


def test_one_str_is_a_text_too():
    tokenizer = of_kind("bert")
    parts = StreamingTokenizer(tokenizer, 50)(TEXT)
    assert [i for part in parts for i in part] == tokenizer.encode(TEXT).ids


def test_a_text_without_a_character():
    tokenizer = of_kind("bert")
    for pieces in ([], [""], ["", ""]):
        ids = [i for part in StreamingTokenizer(tokenizer)(pieces) for i in part]
        assert ids == tokenizer.encode("").ids


# Each rule is needed: without it, some random case is wrong.


def always(answer):
    return lambda *args: answer


def without_plain(patch):
    patch.setattr(normalizers, "plain", always(True))
    patch.setattr(seams, "plain", always(True))


def without_neighbours(patch):
    patch.setattr(seams.Seams, "_keeps_apart", always(True))


def without_spaces_on_the_left(patch):
    patch.setattr(seams, "space", always(NO))


def without_added_tokens(patch):
    patch.setattr(seams._AddedTokens, "cross", always(False))


def without_flags_of_added_tokens(patch):
    cross = seams._AddedTokens.cross

    def careless(self, sides):
        self._lasts = self._firsts = set()
        return cross(self, sides)

    patch.setattr(seams._AddedTokens, "cross", careless)


def without_joins(patch):
    patch.setattr(Pattern, "joins", always(False))


def without_lookaheads(patch):
    init = Pattern.__init__
    ahead = re.compile(r"\(\?[=!][^()]*\)")
    patch.setattr(Pattern, "__init__", lambda self, text: init(self, ahead.sub("", text)))


def without_doubts_of_matches(patch):
    patch.setattr(Pattern, "covers", lambda self, char: self.may_start(char) or self.may_end(char))


def without_marks_of_expressions(patch):
    """As if a lookahead or something atomic took nothing from what stands beside it."""
    covers = Pattern.covers

    def careless(self, char):
        self._lone = self._first & self._last
        return covers(self, char)

    patch.setattr(Pattern, "covers", careless)


def without_replacements(patch):
    patch.setattr(normalizers, "_replace", lambda *args: lambda sides: sides)


def without_composition_after_replacements(patch):
    replace = normalizers._replace
    patch.setattr(normalizers, "_replace", lambda config, later: replace(config, False))


def without_parts_that_come_together(patch):
    one_by_one = normalizers._one_by_one
    patch.setattr(normalizers, "_one_by_one", lambda config, later: one_by_one(config, False))


def without_vanishing(patch):
    one_by_one = normalizers._one_by_one

    def careless(config, later):
        step, alone = one_by_one(config, later), normalizers._alone(config)
        empty = lambda sides: any(not alone(char) for side in sides for char in side)  # noqa: E731
        return lambda sides: sides if empty(sides) else step(sides)

    patch.setattr(normalizers, "_one_by_one", careless)


def without_merges(patch):
    patch.setattr(seams, "_merges", lambda model: always(model["type"] == "BPE"))


def without_whole_words(patch):
    merges, names = seams._merges, ("ignore_merges", "end_of_word_suffix")
    patch.setattr(seams, "_merges", lambda model: merges(model | dict.fromkeys(names)))


def without_marks_of_metaspace(patch):
    metaspace, cut = pre_tokenizers._metaspace, pre_tokenizers.Verdict.CUT

    def careless(config):
        decide = metaspace(config)
        return lambda sides: (cut if "▁" in sides.left else decide(sides)[0], decide(sides)[1])

    patch.setattr(pre_tokenizers, "_metaspace", careless)


def without_merged_words(patch):
    matches = pre_tokenizers._matches
    patch.setattr(
        pre_tokenizers, "_matches", lambda pattern, behavior: matches(pattern, "Isolated")
    )


def without_bytes(patch):
    patch.setattr(pre_tokenizers, "bytes_of", lambda sides: sides)


def without_context(patch):
    patch.setattr(streaming.StreamingTokenizer, "context", lambda self, text, seam: (seam, []))


def without_stripping(patch):
    step = normalizers._step
    patch.setattr(
        normalizers,
        "_step",
        lambda config, later: (
            (lambda sides: sides) if config["type"] == "Strip" else step(config, later)
        ),
    )


# A kind of tokenizer, and the seed of a case that is wrong without the rule.
CASES = {
    without_plain: ("gpt-neox", 12),
    without_neighbours: ("metaspace-bpe", 68),
    without_spaces_on_the_left: ("metaspace-bpe", 35),
    without_added_tokens: ("gpt-neox", 0),
    without_flags_of_added_tokens: ("gpt-neox", 22),
    without_joins: ("llama-3", 0),
    without_lookaheads: ("deepseek", 117),
    without_doubts_of_matches: ("gpt2", 99),
    without_marks_of_expressions: ("llama-2", 93),
    without_replacements: ("cl100k", 247),
}


@pytest.mark.parametrize("control", CASES, ids=lambda control: control.__name__)
def test_the_fuzzer_finds_a_rule_that_is_missing(monkeypatch, control):
    kind, seed = CASES[control]
    assert not isinstance(case(kind, seed), Difference)
    control(monkeypatch)
    # Another release of tokenizers may train the kinds otherwise: then it is another case.
    assert any(isinstance(case(kind, at), Difference) for at in (seed, *range(2000)))


def replacing(pattern, content, *more):
    return norm.Sequence([norm.Replace(pattern, content), *more])


def known_by_heart(*tokens):
    """A BPE that knows words which its merges would not make."""
    vocabulary = {token: at for at, token in enumerate(tokens)}
    return Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))


EQUALS = replacing(Regex("xy?"), "=", norm.NFC())
APART = norm.Sequence([norm.NFD(), norm.NFC()])
SPACE, BEHIND_X = pre.Split(" ", "isolated"), pre.Split("x", "merged_with_previous")
BYTES = pre.ByteLevel(add_prefix_space=False, use_regex=False)

# A tokenizer and a text that is wrong without the rule.
TEXTS = {
    without_composition_after_replacements: (
        lambda: word_level(
            "a=",
            normalizer=replacing(Regex("xy?"), "=", norm.NFC()),
            pre_tokenizer=pre.Punctuation(),
        ),
        "axy\u0338a axy\u0338a axya",
    ),
    without_parts_that_come_together: (
        lambda: bpe(
            [("a", "\xef"), ("n", "i")], normalizer=norm.Sequence([norm.NFD(), norm.NFC()])
        ),
        "na\xefina\xefnin",
    ),
    without_vanishing: (
        lambda: bpe(
            [("n", "i"), ("a", "\u0301")], normalizer=replacing("x", "\u0301", norm.StripAccents())
        ),
        "nxianxiaxnn",
    ),
    without_merges: (lambda: bpe([("n", "i"), ("a", "ni")]), "naniannani"),
    without_whole_words: (lambda: known_by_heart("foo", *"fo▁aZ"), "foo▁foo"),
    without_marks_of_metaspace: (
        lambda: bpe([("▁", "a"), ("a", "b")], pre_tokenizer=pre.Metaspace()),
        "ab▁ab a▁ab",
    ),
    without_merged_words: (
        lambda: word_level("a", "ax", pre_tokenizer=pre.Sequence([SPACE, BEHIND_X])),
        "aaxaaxxax",
    ),
    without_bytes: (
        lambda: bpe([("ª", "b"), ("ê", "x"), ("a", "c"), ("1", "2")], pre_tokenizer=BYTES),
        "xêbxbêxêb",
    ),
    without_context: (
        lambda: bpe([("a", "b"), ("▁", "a")], pre_tokenizer=pre.Metaspace("▁", "first", False)),
        "abbaabb bab ab",
    ),
    without_stripping: (
        lambda: bpe([("a", " "), ("b", "1")], normalizer=replacing("x", " ", norm.Strip())),
        "axbxaxaxb",
    ),
}


@pytest.mark.parametrize("control", TEXTS, ids=lambda control: control.__name__)
def test_a_text_that_is_wrong_where_a_rule_is_missing(monkeypatch, control):
    make, text = TEXTS[control]
    try:
        everywhere(make(), text)
    except UnsupportedTokenizerError:
        assert control in (without_whole_words, without_merges)
    control(monkeypatch)
    with pytest.raises((AssertionError, UnsupportedTokenizerError), match=r"window|look|report"):
        everywhere(make(), text)


def test_every_rule_has_its_case():
    rules = {value for name, value in globals().items() if name.startswith("without_")}
    assert rules == {*CASES, *TEXTS}
