"""The long texts of a call of `encode`, of which the token ids are made as the model reads them.

Where features are made of a batch, a long text is replaced by a short one, the probe, which goes
the released way. If its ids are those that a `StreamingTokenizer` makes of it, with the prompt and
the limit of this very call, then the long text's are streamed. If not, the text is read whole.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

from compat.errors import UnsupportedTokenizerError
from compat.families.positions import need_length
from compat.hooks.cut_texts import Cuts
from compat.hooks.refusals import without_token
from compat.stream.text import TextStream
from compat.stream.token_ids import TokenIds
from compat.stream.tokenizer import StreamingTokenizer, describe


class NoTokenError(ValueError):
    """A text was read of which the tokenizer makes nothing."""


# Characters from which on it pays to stream: two windows, of which the ids take some megabytes.
LONG = 32_768

# All that a pipeline may do to a text shows here, also at its end: stripping, lowering, templates.
_PROBE = " \tThe Probe reads  3 İstanbul lines,\r\nand ends in \u201cwhite space\u201d. \n "

# What is needed where the pipeline is another, and the remedy.
_PLAIN = "token ids that are those of prompt and text", "pass texts that fit into memory"

counted: ContextVar[Callable[[str | TextStream, TokenIds], None] | None]
counted = ContextVar("compat_counted", default=None)
"""Is told of each text that was streamed, at its end."""

_known: WeakKeyDictionary[Any, tuple[object, StreamingTokenizer | UnsupportedTokenizerError]]
_known = WeakKeyDictionary()


def whole(text: Any) -> Any:
    """A text as the released library takes it: a `TextStream` as a str."""
    return text.read() if isinstance(text, TextStream) else text


def is_long(text: Any) -> bool:
    """Return whether a text is to be streamed."""
    return isinstance(text, TextStream) or (isinstance(text, str) and len(text) > LONG)


def check_picklable(texts: Iterable[Any]) -> None:
    """Refuse texts that cannot go to other processes, before a queue fails to send them.

    Raises:
        TypeError: A TextStream was made of something that cannot be pickled, such as a lambda.
    """
    for text in texts:
        if isinstance(text, TextStream):
            try:
                pickle.dumps(text)
            except Exception as error:
                raise TypeError(
                    f"{text!r} cannot be sent to other processes ({error}): make it of a file with "
                    "TextStream.open(path), or of a function of a module."
                ) from error


def size_of(model: Any, text: Any) -> int | None:
    """Characters of a text, for the progress bar; None if that is not known."""
    return text.size if isinstance(text, TextStream) else int(model._input_length(text))


def preprocess(
    released: Callable[[list[Any]], Any],
    reader: Any,
    inputs: Sequence[Any],
    prompt: str | None,
    cuts: Cuts | None,
) -> tuple[Any, dict[int, TokenIds]]:
    """Make the features of a batch.

    Args:
        released: Makes features of texts, as the released library does.
        reader: The Transformer whose tokenizer it is.
        inputs: The batch.
        prompt: What comes before each text.
        cuts: Is told which texts were longer than the limit; None where nobody asks.

    Returns:
        The features, and the ids of the texts that are streamed, by row; in their rows the features
        have the probe.
    """
    rows = [row for row, text in enumerate(inputs) if is_long(text)]
    if rows and not need_length(reader.model.config):
        try:
            features = _of_probes(released, inputs)
            tokenizer = _streaming(reader.tokenizer)
            limit = _limit(reader.tokenizer)
            _check_probe(tokenizer, features, rows[0], prompt, limit)
        except UnsupportedTokenizerError as error:
            _warn_of_whole_texts(error.found)
        else:
            return features, {
                row: _ids(tokenizer, inputs[row], prompt, limit, cuts) for row in rows
            }
    return released([whole(text) for text in inputs]), {}


def streaming(
    released: Callable[[list[Any]], Any], reader: Any, prompt: str
) -> tuple[StreamingTokenizer, int | None, Any]:
    """Return the maker of a model's ids, the most of them that it reads, and a text's features.

    Args:
        released: Makes features of texts, as the released library does, with the prompt.
        reader: The Transformer whose tokenizer it is.
        prompt: What comes before each text.

    Raises:
        UnsupportedTokenizerError: The ids cannot be made piece by piece.
    """
    features = _of_probes(released, [TextStream([_PROBE])])
    tokenizer, limit = _streaming(reader.tokenizer), _limit(reader.tokenizer)
    _check_probe(tokenizer, features, 0, prompt, limit)
    return tokenizer, limit, features


def _of_probes(released: Callable[[list[Any]], Any], inputs: Sequence[Any]) -> Any:
    try:
        return released([_PROBE if is_long(text) else text for text in inputs])
    except Exception as error:
        found = f"an input module that does not take every text ({type(error).__name__}: {error})"
        raise UnsupportedTokenizerError(found, *_PLAIN) from error


def _ids(
    tokenizer: StreamingTokenizer,
    text: str | TextStream,
    prompt: str | None,
    limit: int | None,
    cuts: Cuts | None,
) -> TokenIds:
    told = counted.get()

    def at_end(ids: TokenIds) -> None:
        if not ids.count:
            raise NoTokenError(*without_token(f"{text!r:.60}").args)
        if cuts is not None and ids.count > ids.kept:
            cuts.add(Cuts(0, 1, ids.kept, ids.count))
        if told is not None:
            told(text, ids)

    pieces: Iterable[str] = [text] if isinstance(text, str) else text
    return TokenIds(tokenizer, pieces, prompt or "", limit, at_end)


def _limit(tokenizer: Any) -> int | None:
    """The most tokens that the call that has just been made leaves of a text."""
    truncation: Mapping[str, Any] | None = tokenizer.backend_tokenizer.truncation
    if truncation is None:
        return None
    if truncation["direction"] != "right":
        raise UnsupportedTokenizerError(
            "a tokenizer that cuts long texts on the left",
            "one that keeps a text's beginning",
            "set tokenizer.truncation_side = 'right', or no limit",
        )
    return int(truncation["max_length"])


def _check_probe(
    tokenizer: StreamingTokenizer, features: Any, row: int, prompt: str | None, limit: int | None
) -> None:
    streamed = TokenIds(tokenizer, [_PROBE], prompt or "", limit).take(sys.maxsize)
    ids, mask = features.get("input_ids"), features.get("attention_mask")
    if ids is None or mask is None or ids[row][mask[row].bool()].tolist() != streamed:
        raise UnsupportedTokenizerError(
            "a pipeline that makes more of a text than its tokenizer does, such as a chat template",
            *_PLAIN,
        )


def count(tokenizer: Any, pieces: Iterable[str]) -> int:
    """Return how many tokens a text has, special ones counted.

    Raises:
        UnsupportedTokenizerError: They cannot be streamed.
    """
    return sum(map(len, _streaming(tokenizer)(pieces)))


def _streaming(tokenizer: Any) -> StreamingTokenizer:
    """The `StreamingTokenizer` of a tokenizer, made anew only when that has changed.

    Raises:
        UnsupportedTokenizerError: There is none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return StreamingTokenizer(tokenizer)  # Which says why not.
    # Padding and truncation, which each call sets, stand before the added tokens.
    described = describe(backend).partition('"added_tokens"')[2]
    # Whether special tokens are text is set by each call too, and holds for this one.
    state = (hashlib.sha256(described.encode()).digest(), backend.encode_special_tokens)
    if tokenizer not in _known or _known[tokenizer][0] != state:
        try:
            _known[tokenizer] = state, StreamingTokenizer(backend)
        except UnsupportedTokenizerError as error:
            _known[tokenizer] = state, error
    found = _known[tokenizer][1]
    if isinstance(found, UnsupportedTokenizerError):
        raise found
    return found


@functools.cache
def _warn_of_whole_texts(found: str) -> None:
    """Once for each reason: what it is that takes memory."""
    warnings.warn(
        f"Long texts are tokenized as a whole, in memory that grows with them, because of {found}.",
        stacklevel=2,
    )
