"""Texts that are longer than the model's limit, of which a call of `encode` reads the beginning.

They are counted where features are made of texts. A fast tokenizer keeps what it has cut off beside
what it gives, so that nothing is tokenized twice; of other tokenizers the texts are that fill the
limit. The worker of a pool sends its count along with its embeddings.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from compat.errors import VerticalChunkingError
from compat.families.lookup import backbone_of
from compat.hooks.refusals import route

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class CutTextWarning(UserWarning):
    """Texts were longer than the model's limit, and their ends were not read."""


@dataclass
class Cuts:
    """The number of texts that were cut, and by how much.

    Attributes:
        seen: The number of texts that were looked at.
        count: Those that were cut.
        kept: The most tokens that were left of one.
        longest: The most tokens that one would have had.
    """

    seen: int = 0
    count: int = 0
    kept: int = 0
    longest: int = 0

    def add(self, other: Cuts) -> None:
        """Count the texts of another part of the same call as well."""
        self.seen += other.seen
        self.count += other.count
        self.kept = max(self.kept, other.kept)
        self.longest = max(self.longest, other.longest)

    def look(
        self,
        model: SentenceTransformer,
        inputs: Sequence[Any],
        features: Any,
        kwargs: Mapping[str, Any],
        skipped: Collection[int] = (),
    ) -> None:
        """Count what was cut when features were made of a batch of texts.

        Args:
            model: Whose `preprocess` it was.
            inputs: The batch.
            features: What `preprocess` has made of it.
            kwargs: What else `preprocess` was given.
            skipped: Rows of texts that are streamed, which are counted when their ends are read.
        """
        self.seen += len(inputs)
        reader = reader_of(model, kwargs.get("task"))
        if asked_for(kwargs.get("processing_kwargs") or {}):
            return
        encodings = getattr(features, "encodings", None)
        if encodings is not None and len(encodings) == len(inputs):
            full = [_full_length(encoding) for encoding in encodings]
            kept = [
                sum(encoding.attention_mask) if n else 0
                for n, encoding in zip(full, encodings, strict=True)
            ]
        else:
            limit = _limit(reader, kwargs.get("task"))[1]
            mask = features.get("attention_mask")
            if limit is None or mask is None or len(mask) != len(inputs):
                return
            kept = mask.sum(1).tolist()
            full = [
                _count(reader.tokenizer, text, kwargs.get("prompt")) if n >= limit else 0
                for n, text in zip(kept, inputs, strict=True)
            ]
        for row, (whole, left) in enumerate(zip(full, kept, strict=True)):
            if whole > left and row not in skipped:
                self.add(Cuts(0, 1, left, whole))

    def beside(self, outputs: Any) -> Any:
        """The outputs of a worker; the process that unpickles them learns of the cuts."""
        from sentence_transformers.util.tensor import _move_tensors_to_cpu

        return _Outputs(_move_tensors_to_cpu(outputs), self)

    def tell(self, model: SentenceTransformer, task: str | None) -> None:
        """Tell the running call of `encode`; where there is none in this process, warn."""
        if (call := _call.get()) is not None:
            call.add(self)
        else:
            self._warn(model, task, 3)

    def _warn(self, model: SentenceTransformer, task: str | None, stacklevel: int) -> None:
        if not self.count:
            return
        reader = reader_of(model, task)
        place = _limit(reader, task)[0]
        warnings.warn(
            f"{self.count} of {self.seen} texts are longer than the limit of {self.kept} tokens, "
            f"and only their beginning was read; the longest has {self.longest} tokens. To read "
            f"them whole, set {place} = {self.longest}.{_about(reader)}",
            CutTextWarning,
            stacklevel + 1,
        )


counting: ContextVar[Cuts | None] = ContextVar("compat_cuts", default=None)
"""What `preprocess` counts into."""

_call: ContextVar[Cuts | None] = ContextVar("compat_cuts_of_a_call", default=None)


@contextmanager
def told_once(model: SentenceTransformer, task: str | None) -> Iterator[None]:
    """Warn of the texts that are cut in a `with` block, at its end, and in whichever process."""
    cuts = Cuts()
    token = _call.set(cuts)
    try:
        yield
    finally:
        _call.reset(token)
    cuts._warn(model, task, 4)


class _Outputs:
    """Outputs on their way from a worker; they arrive as themselves."""

    def __init__(self, outputs: Any, cuts: Cuts) -> None:
        self._sent = outputs, astuple(cuts)

    def __reduce__(self) -> tuple[Any, tuple[Any, tuple[int, ...]]]:
        return _arrive, self._sent


def _arrive(outputs: Any, cuts: tuple[int, ...]) -> Any:
    if (call := _call.get()) is not None:
        call.add(Cuts(*cuts))
    return outputs


def reader_of(model: SentenceTransformer, task: str | None) -> Any:
    """The module that makes features of texts."""
    return route(list(model.children()), task)[0]


def asked_for(processing_kwargs: Mapping[str, Any]) -> bool:
    """Return whether the call itself says where texts are to be cut."""
    settings = {**processing_kwargs.get("common", {}), **processing_kwargs.get("text", {})}
    return bool({"max_length", "truncation"} & set(settings))


def _limit(reader: Any, task: str | None) -> tuple[str, int | None]:
    """Say what limits a text of this task: the name under which a user sets it, and the number."""
    own = f"{task}_length"
    if task in ("query", "document") and getattr(reader, own, None) is not None:
        return f"model[0].{own}", getattr(reader, own)
    stored = (getattr(reader, "processing_kwargs", None) or {}).get("text", {})
    if stored.get("max_length") is not None:
        return "model[0].processing_kwargs['text']['max_length']", stored["max_length"]
    return "model.max_seq_length", getattr(reader, "max_seq_length", None)


def _full_length(encoding: Any) -> int:
    """Return how many tokens a text had before a fast tokenizer cut it; 0 where it has not."""
    parts = encoding.overflowing
    own = sum(encoding.attention_mask)
    # Each part has the tokens around a text, such as its end, and padding.
    more = sum(
        real and not special
        for part in parts
        for real, special in zip(part.attention_mask, part.special_tokens_mask, strict=True)
    )
    return own + more if parts else 0


def _count(tokenizer: Any, text: Any, prompt: str | None) -> int:
    """Return how many tokens a text has where nothing limits it; 0 where it is no text."""
    if not isinstance(text, str):
        return 0
    ids = tokenizer((prompt or "") + text, truncation=False, verbose=False)["input_ids"]
    return len(ids)


def _about(reader: Any) -> str:
    """Say what the model itself has against longer texts."""
    try:
        backbone, family = backbone_of(reader.model)
    except (VerticalChunkingError, AttributeError):
        return ""
    name = backbone.config.model_type
    if not family.grows:
        return f" A {name} has no attention over the whole text, so it needs no limit."
    trained = getattr(backbone.config, "max_position_embeddings", None)
    limit = f", and max_position_embeddings = {trained} in its config" if trained else ""
    return (
        f" A {name} has attention layers{limit}: chunks of longer texts are exact, but it may not "
        "have been trained on such lengths."
    )
