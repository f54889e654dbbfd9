"""One random case: a tokenizer of some kind, changed at random, and a text; do the ids agree?"""

from __future__ import annotations

import functools
import json
from random import Random
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer

from ci.fuzz.charsmap import RULES, charsmap
from ci.fuzz.kinds import described
from ci.fuzz.texts import pieces, text
from compat.errors import UnsupportedTokenizerError
from compat.stream.tokenizer import StreamingTokenizer

# tokenizers cannot tokenize the whole text either.
PANIC = "panicked"
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
_CONTENTS = [
    "<sep>",
    "ab",
    "x",
    "▁the",
    "é",
    "e\u0301",
    "İ",
    "= =",
    "the of",
    "\n\n",
    "Mask",
    "=",
    "..",
]
_CONTENTS += ["1", "-->", "中文", " a", "a ", "ﬁ", "I'll", "abc", "bca"]
_SIMPLE = ["NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "Precompiled"]


class Difference(NamedTuple):
    """A case in which streamed tokens are not those of the whole text."""

    kind: str
    seed: int
    what: str


@functools.cache
def _normalizers() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"type": name} for name in _SIMPLE[:-1]]
    found += [{"type": name} for name in _SIMPLE[:4]]  # They compose: the hardest ones.
    found.append({"type": "Precompiled", "precompiled_charsmap": charsmap(RULES)})
    found += [{"type": "Prepend", "prepend": mark} for mark in ("▁", "x", "=")]
    found += [
        {"type": "Strip", "strip_left": left, "strip_right": right}
        for left, right in ((True, True), (True, False), (False, True))
    ]
    swaps = {" ": "▁", "x": "=", "ab": "é", "'": "", "\n": " ", ".": "\u0301", "the": " "}
    found += [
        {"type": "Replace", "pattern": {"String": old}, "content": new}
        for old, new in swaps.items()
    ]
    patterns = {
        r"\s+": " ",
        " {2,}": "▁",
        r"\d(?=\p{L})": "#",
        "[aeiou]": "e\u0301",
        "(?:a|b)c?": "x",
    }
    found += [
        {"type": "Replace", "pattern": {"Regex": old}, "content": new}
        for old, new in patterns.items()
    ]
    bert = ("clean_text", "handle_chinese_chars", "strip_accents", "lowercase")
    found.append({"type": "BertNormalizer"} | dict.fromkeys(bert, True))
    return found


_BEHAVIORS = ["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]
_PATTERNS = [r"\s+(?!\S)|\s+", "[aeiou]{2}", r"(?>\s*)\n|\w", "a++b?|x", "(?i:the|s)"]
_PATTERNS += [r"\p{Lu}?\p{Ll}+$", "[^a-m ]", r"=+|\.(?=\s)", r"\d{1,2}+", "(?:ab|b)c?(?!d)"]


def _pre_tokenizer(draw: Random) -> dict[str, Any]:
    """A random pre-tokenizer, to come before a tokenizer's own."""
    behavior = draw.choice(_BEHAVIORS)
    text = (
        {"Regex": draw.choice(_PATTERNS)}
        if draw.random() < 0.7
        else {"String": draw.choice(" xe=")}
    )
    invert = behavior in ("Removed", "Isolated") and draw.random() < 0.3
    return draw.choice(
        [
            {"type": "Split", "pattern": text, "behavior": behavior, "invert": invert},
            {"type": "Punctuation", "behavior": behavior},
            {"type": "Digits", "individual_digits": draw.random() < 0.5},
            {"type": "CharDelimiterSplit", "delimiter": draw.choice(" x=")},
            {"type": draw.choice(["Whitespace", "WhitespaceSplit", "BertPreTokenizer"])},
        ]
    )


def tokenizer_of(kind: str, draw: Random) -> tuple[Tokenizer, list[str]]:
    """A tokenizer of a kind, with other parts and added tokens at random; the added tokens."""
    config = json.loads(described(kind))
    if draw.random() < 0.5:
        own = [config["normalizer"]] if config["normalizer"] else []
        more = draw.sample(_normalizers(), draw.randrange(3))
        steps = [*own, *more] if draw.random() < 0.5 else [*more, *own]
        config["normalizer"] = {"type": "Sequence", "normalizers": steps} if steps else None
    if draw.random() < 0.25:
        own = [config["pre_tokenizer"]] if config["pre_tokenizer"] else []
        parts = [_pre_tokenizer(draw), *own]
        config["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    tokenizer = Tokenizer.from_str(json.dumps(config))
    if draw.random() < 0.6:
        normal = tokenizer.normalizer.normalize_str if tokenizer.normalizer else str
        for content in draw.sample(_CONTENTS, draw.randrange(1, 4)):
            flags = {name: draw.random() < 0.4 for name in _FLAGS}
            if flags["normalized"] and not normal(content):
                continue  # tokenizers 0.23.3 takes gigabytes for it.
            tokenizer.add_tokens([AddedToken(content, **flags)])
    if draw.random() < 0.1:
        tokenizer.encode_special_tokens = True
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    return tokenizer, added


def _misplaced(tokenizer: Tokenizer, whole: str) -> bool:
    """Return whether tokenizers 0.23.3 may have the offsets of the whole text wrong.

    Where a charsmap makes nothing of the first character behind an added token, all offsets until
    the next one are too small.
    """
    vanishing = any(source in whole for source, target in RULES.items() if not target)
    return vanishing and "Precompiled" in repr(tokenizer.normalizer)


def compare(tokenizer: Tokenizer, whole: str, draw: Random) -> str | None:
    """Say how the streamed tokens differ from the whole text's; None if they do not."""
    streaming = StreamingTokenizer(tokenizer, window=draw.choice([1, 3, 8, 20, 60]))
    special = draw.random() < 0.7
    try:
        right = tokenizer.encode(whole, add_special_tokens=special)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        return PANIC
    ids, offsets = right.ids, right.offsets
    limit = None
    if draw.random() < 0.2:
        limit = sum(map(len, streaming.special_tokens)) + draw.randrange(40)
        tokenizer.enable_truncation(limit)
        cut = tokenizer.encode(whole, add_special_tokens=special)
        tokenizer.no_truncation()
        ids, offsets = cut.ids, cut.offsets
    if draw.random() < 0.5:
        found = [i for part in streaming(pieces(draw, whole), special, limit) for i in part]
        places = offsets
    else:
        parts = list(streaming.offsets(pieces(draw, whole), special, limit))
        found = [i for part, _ in parts for i in part]
        places = [place for _, part in parts for place in part]
    if found != ids:
        at = next(
            (at for at, (a, b) in enumerate(zip(found, ids, strict=False)) if a != b),
            min(len(found), len(ids)),
        )
        where = right.offsets[at : at + 1] or [(len(whole), len(whole))]
        near = whole[max(where[0][0] - 8, 0) : where[0][0] + 12]
        return f"ids differ from token {at} on, near {near!r}"
    if places != offsets and not _misplaced(tokenizer, whole):
        at = next(at for at, (a, b) in enumerate(zip(places, offsets, strict=True)) if a != b)
        return f"offsets differ: token {at} has {places[at]}, not {offsets[at]}"
    return None


def case(kind: str, seed: int) -> Difference | str:
    """Run one case: a difference, or "same", "refused", or `PANIC`."""
    draw = Random(f"{kind} {seed}")
    tokenizer, added = tokenizer_of(kind, draw)
    whole = text(draw, added, draw.choice([0, 5, 40, 200, 600]))
    try:
        what = compare(tokenizer, whole, draw)
    except UnsupportedTokenizerError as error:
        if "please report it" not in str(error):
            return "refused"
        what = str(error)
    if what in (None, PANIC):
        return what or "same"
    return Difference(kind, seed, what)
