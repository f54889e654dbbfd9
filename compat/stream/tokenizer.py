"""Token ids of a text that comes in pieces: those of the whole text, in the memory of a window."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import Encoding, Tokenizer

from compat.stream.growing_text import GrowingText, Offsets, Slice, cut
from compat.stream.normalizers import flat
from compat.stream.refusals import unsupported
from compat.stream.seams import Seams


class StreamingTokenizer:
    """Makes the token ids of texts that come in pieces, exactly those of the whole text.

    The text is tokenized in windows that are cut at *seams*: places that no added token,
    normalization, word or merge can cross, by the tokenizer's own description.

    Example:
        >>> streaming = StreamingTokenizer(tokenizer)
        >>> with open("book.txt", encoding="utf-8", newline="") as file:
        ...     for ids in streaming(iter(lambda: file.read(65536), "")):
        ...         ...

    Attributes:
        special_tokens: The ids that are put before a text, and those that are put after it.
        window: How many characters are tokenized at a time.

    Args:
        tokenizer: A `tokenizers.Tokenizer`, or a fast tokenizer of transformers. It is copied:
            padding and truncation of the original play no part, nor do later changes.
        window: How many characters are tokenized at a time.

    Raises:
        UnsupportedTokenizerError: It cannot be shown that the ids would be those of the whole
            text; the message names the part of the tokenizer.
        ValueError: window is less than 1.
    """

    def __init__(self, tokenizer: Any, window: int = 16_384) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1, a number of characters; found {window}.")
        backend = _backend(tokenizer)
        description = describe(backend)
        config = json.loads(description)
        self._tokenizer = Tokenizer.from_str(description)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        splits = getattr(tokenizer, "split_special_tokens", None)
        self._tokenizer.encode_special_tokens = (
            backend.encode_special_tokens if splits is None else splits
        )
        self._seams = Seams(config, self._tokenizer)
        self.special_tokens = self._special_tokens(config["post_processor"])
        self._cuts_left = getattr(tokenizer, "truncation_side", "right") == "left"
        self.window = window

    def __call__(
        self,
        pieces: Iterable[str],
        add_special_tokens: bool = True,
        max_length: int | None = None,
    ) -> Iterator[list[int]]:
        """Make the ids of one text.

        Args:
            pieces: The text, in pieces of any lengths, or as one str.
            add_special_tokens: Whether to add those that stand before and after a text.
            max_length: The most tokens to make, special ones counted; what is behind them is cut
                off, and not read. None for all.

        Yields:
            Lists of ids, some at a time; together they are the ids of the whole text.

        Raises:
            UnsupportedTokenizerError: A million characters hold no place to cut.
            ValueError: max_length has no room for the special tokens.
        """
        for ids, _ in self._read(pieces, add_special_tokens, max_length, with_offsets=False):
            yield ids

    def offsets(
        self,
        pieces: Iterable[str],
        add_special_tokens: bool = True,
        max_length: int | None = None,
    ) -> Iterator[tuple[list[int], Offsets]]:
        """Make the ids of one text, and say where in the text each token is.

        Arguments and errors are those of a call.

        Yields:
            Lists of ids, and of (start, end) for each of them: characters of the whole text,
            (0, 0) for a special token. They are what `Encoding.offsets` of `tokenizers` holds.
        """
        return self._read(pieces, add_special_tokens, max_length, with_offsets=True)

    def _read(
        self,
        pieces: Iterable[str],
        add_special_tokens: bool,
        max_length: int | None,
        with_offsets: bool,
    ) -> Iterator[tuple[list[int], Offsets]]:
        before, after = self.special_tokens if add_special_tokens else ([], [])
        left = None if max_length is None else max_length - len(before) - len(after)
        if left is not None and left < 0:
            raise ValueError(
                f"max_length must be at least {len(before) + len(after)}, the number of special "
                f"tokens; found {max_length}."
            )
        if left is not None and self._cuts_left:
            raise unsupported("truncation_side 'left', which keeps the end of a text")
        if before:
            yield before, [(0, 0)] * len(before)
        for ids, offsets, begin in self._windows(pieces, with_offsets) if left != 0 else ():
            if left is not None:
                ids, left = ids[:left], left - len(ids)
            if ids:
                yield ids, [(a + begin, b + begin) for a, b in offsets[: len(ids)]]
            if left is not None and left <= 0:
                break
        if after:
            yield after, [(0, 0)] * len(after)

    def _windows(self, pieces: Iterable[str], with_offsets: bool) -> Iterator[Slice]:
        """Tokenize window after window, each from a seam before its own first one on."""
        growing = GrowingText(self, with_offsets=with_offsets)
        parts, size = list[str](), 0
        for piece in [pieces] if isinstance(pieces, str) else pieces:
            for part in cut(piece, self.window):
                parts.append(part)
                size += len(part)
                if size < self.window:
                    continue  # A seam is not looked for in every word that comes.
                if (new := growing.take("".join(parts))) is not None:
                    yield new
                parts, size = [], 0
        growing.held += "".join(parts)
        yield growing.rest()

    def context(self, text: str, seam: int) -> tuple[int, list[int]]:
        """Find where the next window begins, a seam before its own part, and the tokens till then.

        There is one token at least, since the first one of a window may have other offsets.
        """
        start: int | None = seam
        while start:
            start = self._seams.last(text, 0, start)
            if ids := self._encode(text[start or 0 : seam], False).ids:
                return start or 0, ids
        return 0, []

    def last_seam(self, text: str, low: int) -> int | None:
        """The last place from `low` on where the text may be cut; None if there is none."""
        return self._seams.last(text, low, len(text))

    def behind(self, text: str, known: list[int], begin: int, with_offsets: bool) -> Slice:
        """Return the tokens of a text behind those that are known of it, its first ones.

        Args:
            text: The text, which begins at a seam.
            known: The ids of its first tokens.
            begin: How many characters come before it.
            with_offsets: Whether the offsets are wanted.
        """
        encoding = self._encode(text, with_offsets)
        ids, count = encoding.ids, len(known)
        if ids[:count] != known:
            raise unsupported(f"a part that looks across a cut in {text[:40]!r}: please report it")
        return Slice(ids[count:], encoding.offsets[count:] if with_offsets else [], begin)

    def _encode(self, text: str, with_offsets: bool) -> Encoding:
        if with_offsets:
            return self._tokenizer.encode(text, add_special_tokens=False)
        # Without offsets it is faster, and has the same ids.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]

    def _special_tokens(self, config: dict[str, Any] | None) -> tuple[list[int], list[int]]:
        """The ids that the post-processor puts before and after a text."""
        before, after = list[int](), list[int]()
        for part in flat(config, "processors"):
            own = _around(part)
            before, after = own[0] + before, after + own[1]
        if self._tokenizer.encode("").ids != before + after:
            raise unsupported("special tokens that are not those of its template")
        return before, after


def describe(backend: Tokenizer) -> str:
    """The tokenizer as in tokenizer.json.

    Raises:
        UnsupportedTokenizerError: A part is written in Python, which cannot be described.
    """
    try:
        return str(backend.to_str())
    except Exception as error:
        raise unsupported(f"a part that is written in Python ({error})") from error


def _backend(tokenizer: Any) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(backend, Tokenizer):
        raise unsupported(f"the class {type(tokenizer).__name__}, which is not a fast tokenizer")
    return backend


def _around(config: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The ids that one post-processor puts before and after a text."""
    kind = config["type"]
    if kind == "ByteLevel":
        return [], []
    if kind in ("BertProcessing", "RobertaProcessing"):
        return [config["cls"][1]], [config["sep"][1]]
    if kind != "TemplateProcessing":
        raise unsupported(f"the post-processor {kind}")
    sides: list[list[int]] = [[]]
    for piece in config["single"]:
        if "Sequence" in piece:
            sides.append([])
        else:
            sides[-1] += config["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    if len(sides) != 2:
        raise unsupported("a template that does not have the text exactly once")
    return sides[0], sides[1]
