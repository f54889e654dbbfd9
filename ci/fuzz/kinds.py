"""The kinds of tokenizers that are met, each trained in a second on a few nasty texts."""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Callable
from random import Random
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, trainers
from tokenizers import normalizers as norm
from tokenizers import pre_tokenizers as pre
from tokenizers.processors import (
    BertProcessing,
    ByteLevel,
    RobertaProcessing,
    Sequence,
    TemplateProcessing,
)

from ci.fuzz.charsmap import RULES, charsmap
from ci.fuzz.texts import text

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CLIP = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


@functools.cache
def corpus() -> list[str]:
    """Texts to train on."""
    draw = Random(0)
    return [text(draw, (), 120) for _ in range(250)]


def _bpe(normalizer: Any, *pre_tokenizers: Any, size: int = 700, **model: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**model))
    special = ["<unk>"] if model.get("unk_token") else []
    if model.get("byte_fallback"):
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    alphabet = pre.ByteLevel.alphabet() if not special else []
    options: dict[str, Any] = {}
    if suffix := model.get("end_of_word_suffix"):
        options["end_of_word_suffix"] = suffix
    if special:
        options["limit_alphabet"] = 250
    trainer = trainers.BpeTrainer(
        vocab_size=size + len(special),
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
        **options,
    )
    return _trained(tokenizer, trainer, normalizer, pre_tokenizers)


def _trained(
    tokenizer: Tokenizer, trainer: Any, normalizer: Any, pre_tokenizers: tuple[Any, ...]
) -> Tokenizer:
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizers:
        one = len(pre_tokenizers) == 1
        tokenizer.pre_tokenizer = pre_tokenizers[0] if one else pre.Sequence(list(pre_tokenizers))
    tokenizer.train_from_iterator(corpus(), trainer)
    config = json.loads(tokenizer.to_str())
    config["added_tokens"] = []  # The unknown token and bytes are no tokens of a text.
    return Tokenizer.from_str(json.dumps(config))


def _split(pattern: str, behavior: str = "isolated", invert: bool = False) -> Any:
    return pre.Split(Regex(pattern), behavior, invert)


def _bytes(regex: bool, prefix: bool = False) -> Any:
    return pre.ByteLevel(add_prefix_space=prefix, use_regex=regex)


def _unigram(normalizer: Any, *pre_tokenizers: Any) -> Tokenizer:
    trainer = trainers.UnigramTrainer(
        vocab_size=500, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    return _trained(Tokenizer(models.Unigram()), trainer, normalizer, pre_tokenizers)


def _precompiled() -> Any:
    return norm.Precompiled(base64.b64decode(charsmap(RULES)))


def _llama2(**model: Any) -> Tokenizer:
    normalizer = norm.Sequence([norm.Prepend("▁"), norm.Replace(" ", "▁")])
    return _bpe(normalizer, unk_token="<unk>", byte_fallback=True, fuse_unk=True, **model)


def _special(tokenizer: Tokenizer, *contents: str, **flags: bool) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(content, **flags) for content in contents])
    return tokenizer


def _with_id(tokenizer: Tokenizer, content: str) -> tuple[str, int]:
    found = tokenizer.token_to_id(content)
    assert found is not None
    return content, found


def _template(tokenizer: Tokenizer, single: str, *contents: str) -> Tokenizer:
    _special(tokenizer, *contents)
    ids = [_with_id(tokenizer, content) for content in contents]
    tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ids)
    return tokenizer


def _gpt2() -> Tokenizer:
    return _special(_bpe(None, _bytes(True)), "<|endoftext|>")


def _gpt_neox() -> Tokenizer:
    tokenizer = _special(_bpe(norm.NFC(), _bytes(True)), "<|endoftext|>")
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(2, 9)])
    return tokenizer


def _llama3() -> Tokenizer:
    tokenizer = _bpe(None, _split(_LLAMA3), _bytes(False), ignore_merges=True)
    _template(tokenizer, "<|begin_of_text|> $A", "<|begin_of_text|>")
    first = tokenizer.post_processor
    tokenizer.post_processor = Sequence([ByteLevel(trim_offsets=True), first])
    return tokenizer


def _cl100k() -> Tokenizer:
    return _special(_bpe(None, _split(_CL100K), _bytes(False)), "<|endoftext|>", "<|fim|>")


def _o200k() -> Tokenizer:
    return _special(_bpe(None, _split(_O200K), _bytes(False)), "<|endoftext|>")


def _qwen() -> Tokenizer:
    return _special(_bpe(norm.NFC(), _split(_QWEN), _bytes(False)), "<|im_start|>", "<|im_end|>")


def _deepseek() -> Tokenizer:
    splits = [
        _split(r"\p{N}{1,3}"),
        _split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
        _split(_DEEPSEEK),
    ]
    return _template(_bpe(None, *splits, _bytes(False)), "<bos> $A", "<bos>")


def _llama_2() -> Tokenizer:
    return _template(_llama2(), "<s> $A", "<s>")


def _mistral() -> Tokenizer:
    mark = pre.Metaspace(prepend_scheme="first", split=False)
    tokenizer = _bpe(None, mark, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    return _template(tokenizer, "<s> $A", "<s>", "[INST]")


def _gemma() -> Tokenizer:
    split = pre.Split(" ", "merged_with_previous")
    tokenizer = _bpe(
        norm.Replace(" ", "▁"), split, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    tokenizer.add_tokens([AddedToken("\n" * n, normalized=False) for n in range(2, 5)])
    return _template(tokenizer, "<bos> $A", "<bos>", "<eos>")


def _metaspace_bpe() -> Tokenizer:
    mark = pre.Metaspace(prepend_scheme="always")
    return _template(_bpe(norm.NFKC(), mark, unk_token="<unk>"), "$A </s>", "</s>")


def _t5() -> Tokenizer:
    steps = [_precompiled(), norm.Strip(left=False), norm.Replace(Regex(" {2,}"), "▁")]
    tokenizer = _unigram(norm.Sequence(steps), pre.Metaspace(prepend_scheme="always"))
    return _template(tokenizer, "$A </s>", "</s>", "<extra_id_0>")


def _xlm_r() -> Tokenizer:
    steps = [_precompiled(), norm.Replace(Regex(" {2,}"), " ")]
    tokenizer = _unigram(norm.Sequence(steps), pre.WhitespaceSplit(), pre.Metaspace())
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return _template(tokenizer, "<s> $A </s>", "<s>", "</s>")


def _albert() -> Tokenizer:
    steps = [norm.Replace("``", '"'), norm.Replace("''", '"'), norm.NFKD(), norm.StripAccents()]
    steps += [norm.Lowercase(), _precompiled(), norm.Replace(Regex(" {2,}"), " ")]
    tokenizer = _unigram(norm.Sequence(steps), pre.Metaspace())
    return _template(tokenizer, "[CLS] $A [SEP]", "[CLS]", "[SEP]")


def _bert() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[UNK]"], limit_alphabet=150, show_progress=False
    )
    model = models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100)
    tokenizer = _trained(
        Tokenizer(model), trainer, norm.BertNormalizer(), (pre.BertPreTokenizer(),)
    )
    _special(tokenizer, "[CLS]", "[SEP]", "[MASK]")
    ends = _with_id(tokenizer, "[SEP]"), _with_id(tokenizer, "[CLS]")
    tokenizer.post_processor = BertProcessing(*ends)
    return tokenizer


def _word_level() -> Tokenizer:
    trainer = trainers.WordLevelTrainer(
        vocab_size=300, special_tokens=["[UNK]"], show_progress=False
    )
    model = models.WordLevel(unk_token="[UNK]")
    return _trained(Tokenizer(model), trainer, norm.Lowercase(), (pre.Whitespace(),))


def _roberta() -> Tokenizer:
    tokenizer = _special(_bpe(None, _bytes(True, prefix=True)), "<s>", "</s>")
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    ends = _with_id(tokenizer, "</s>"), _with_id(tokenizer, "<s>")
    tokenizer.post_processor = RobertaProcessing(*ends, trim_offsets=True, add_prefix_space=True)
    return tokenizer


def _clip() -> Tokenizer:
    steps = norm.Sequence([norm.NFC(), norm.Replace(Regex(r"\s+"), " "), norm.Lowercase()])
    split = _split(_CLIP, "removed", invert=True)
    tokenizer = _bpe(steps, split, _bytes(False), end_of_word_suffix="</w>")
    return _special(tokenizer, "<|endoftext|>")


def _falcon() -> Tokenizer:
    parts = [pre.Punctuation("contiguous"), _bytes(True), pre.Digits(individual_digits=False)]
    return _special(_bpe(None, *parts, _split("[0-9][0-9][0-9]")), "<|endoftext|>", ">>TITLE<<")


def _starcoder() -> Tokenizer:
    return _special(_bpe(None, pre.Digits(individual_digits=True), _bytes(True)), "<fim_prefix>")


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": _gpt2,
    "gpt-neox": _gpt_neox,
    "llama-3": _llama3,
    "cl100k": _cl100k,
    "o200k": _o200k,
    "qwen": _qwen,
    "deepseek": _deepseek,
    "llama-2": _llama_2,
    "mistral": _mistral,
    "gemma": _gemma,
    "metaspace-bpe": _metaspace_bpe,
    "t5": _t5,
    "xlm-r": _xlm_r,
    "albert": _albert,
    "bert": _bert,
    "word-level": _word_level,
    "roberta": _roberta,
    "clip": _clip,
    "falcon": _falcon,
    "starcoder": _starcoder,
}


@functools.cache
def described(kind: str) -> str:
    """The tokenizer of a kind, as in tokenizer.json."""
    return str(KINDS[kind]().to_str())
