"""A text that grows, with its embedding at any time."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from compat.errors import VerticalChunkingError
from compat.families.states import leaves, restored
from compat.hooks import saved_reader
from compat.hooks.cut_texts import Cuts
from compat.hooks.pipeline import Pipeline
from compat.hooks.refusals import without_token
from compat.stream.chunk import Chunk
from compat.stream.chunk_size import settled
from compat.stream.growing_text import GrowingText
from compat.stream.pooling import StreamingPooling
from compat.stream.reading import Reading
from compat.stream.rows import Auto

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class Reader:
    """A text that grows: `embedding()` is at any time what `encode` gives for all of it so far.

    The model's state is carried on, so an embedding costs what has come since the last one, plus
    the tokens that the next character may still change (the last word, mostly) and those that the
    tokenizer puts behind a text; these are read on a copy of the state. The memory does not grow
    with the text; for a hybrid it does, as keys and values of the whole text are a part of its
    state, of which `embedding`, `fork` and `save` make a copy.

    Readers of one model may be used in several threads, each reader by one thread at a time (others
    wait). The hooks of `enable_vertical_chunking` are not needed.

    Example:
        >>> reader = compat.Reader(model, vertical_chunk_size=512)
        >>> for line in log:
        ...     reader.append(line)
        ...     index[name] = reader.embedding()
        >>> reader.save("log.safetensors")
        >>> reader = compat.Reader.load("log.safetensors", model)

    Args:
        model: A SentenceTransformer of a supported family. It must not change meanwhile.
        vertical_chunk_size: Tokens in a chunk; "auto" for the fastest size.
        prompt: What stands before the text; None for the model's default prompt. To read a prompt
            once for many texts, make a reader of it, and a `fork()` for each text.

    Raises:
        TypeError: An argument is of another type.
        ValueError: vertical_chunk_size is less than 1.
        UnsupportedTokenizerError: It cannot be shown that the ids would be those of the whole text.
        VerticalChunkingError: The model cannot be read in chunks.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        vertical_chunk_size: int | Auto = 512,
        prompt: str | None = None,
    ) -> None:
        self._pipeline = pipeline = Pipeline(model, prompt)
        self._size = max(settled(vertical_chunk_size, model.device), 2)
        self._lock = threading.RLock()
        self._broken = False
        self._text = GrowingText(pipeline.tokenizer)
        self._reading = pipeline.reading()
        self._pooling = StreamingPooling(pipeline.modes, 1, pipeline.prompt_length)
        before, after = pipeline.tokenizer.special_tokens
        # Ids that are known and not read yet: less than a chunk.
        self._waiting = [*before]
        # Tokens that were made of the text, and how many of them the limit leaves room for.
        self._made = 0
        limit = pipeline.limit
        self._room = None if limit is None else max(limit - len(before) - len(after), 0)
        self._take(pipeline.prompt)

    def append(self, text: str) -> None:
        """Let the text grow; it may be cut anywhere, also inside a word.

        Whole chunks are read at once, the rest when it is needed.

        Raises:
            TypeError: text is not a str.
            UnsupportedTokenizerError: A million characters hold no place to cut.
            VerticalChunkingError: A call before has failed halfway.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str; found {type(text).__name__}.")
        with self._lock:
            self._take(text)

    def embedding(self) -> NDArray[Any]:
        """Embed all text so far, (dim,), as `encode(text, vertical_chunk_size=...)` does.

        A text that is longer than the model's limit is cut there with a `CutTextWarning`.

        Raises:
            ValueError: The tokenizer makes no token of the text so far.
            VerticalChunkingError: A call before has failed halfway.
        """
        with self._lock:
            self._flush()
            tail = self._text.tail()
            ids = self._waiting + self._kept(tail, self._made)
            ids += self._pipeline.tokenizer.special_tokens[1]
            if not ids and not self._reading.start:
                raise without_token("", "The text so far")
            self._warn_if_cut(self._made + len(tail))
            pooling = self._pooling
            if ids:
                pooling, reading = _copied(pooling), self._reading.copy()
                self._read(ids, reading, pooling)
            embedding: NDArray[Any] = self._pipeline.finish(pooling.finalize())[0]
            return embedding

    @property
    def num_tokens(self) -> int:
        """Return how many tokens `embedding()` is made of, special ones and the prompt's counted.

        Behind the last seam they are counted as they are if the text ends here.
        """
        with self._lock:
            known = self._reading.start + len(self._waiting)
            tail = self._kept(self._text.tail(), self._made)
            return known + len(tail) + len(self._pipeline.tokenizer.special_tokens[1])

    def fork(self) -> Reader:
        """Return a reader of the same text, that grows apart from this one; nothing is read twice.

        It costs the memory of a state; of a hybrid, that of its keys and values too.
        """
        with self._lock:
            self._flush()
            other = copy.copy(self)
            other._lock = threading.RLock()
            other._text = self._text.copy()
            other._reading = self._reading.copy()
            other._pooling = _copied(self._pooling)
            other._waiting = [*self._waiting]
            return other

    def state(self) -> dict[str, Tensor]:
        """Copy the model's state after all tokens that are known, with a name for each tensor.

        It is that of all text so far but for the last tokens, which the next character may change.

        Returns:
            Tensors such as `layers.0.recurrent_states.0`, by their places in the library's own
            cache. For Mamba2 that is for each layer the conv state, (1, conv_dim, width) in the
            model's dtype, and the SSM state, (1, nheads, headdim, dstate) float32. Empty where no
            token is known yet.
        """
        with self._lock:
            self._flush()
            return leaves(self._reading.copy().state)[0]

    def save(self, path: str | PathLike[str]) -> None:
        """Write the reader as safetensors: the model's state, sums of the pooling, the text's end.

        The file is written beside its place and moved there, so that it is there whole or not at
        all. In it stands what it depends on: weights, configuration, tokenizer, dtype, libraries;
        and a card, `safetensors.safe_open(path, "pt").metadata()["card"]`, which says so in words
        and lists each tensor with its shape and dtype.

        Raises:
            OSError: The file cannot be written.
        """
        with self._lock:
            self._flush()
            tensors, values = leaves(_tree(self._reading, self._pooling))
            text = self._text
            saved_reader.write(
                path,
                tensors,
                {
                    "identity": saved_reader.identity(self._pipeline.model),
                    "limit": self._pipeline.limit,
                    "vertical_chunk_size": self._size,
                    "prompt": self._pipeline.prompt,
                    "start": self._reading.start,
                    "waiting": self._waiting,
                    "made": self._made,
                    "text": [text.held, text.given, text.known, text.begin, text.searched],
                    "values": values,
                },
            )

    @classmethod
    @torch.inference_mode(False)
    def load(cls, path: str | PathLike[str], model: SentenceTransformer) -> Reader:
        """Read what `save` has written, and go on from there.

        Args:
            path: The file.
            model: The model that it was saved with; it may be on another device.

        Raises:
            OSError: There is no such file.
            VerticalChunkingError: The file is torn, or belongs to another model; the message names
                what differs.
        """
        tensors, saved = saved_reader.read(path)
        saved_reader.check_same(saved["identity"], saved_reader.identity(model))
        reader = cls(model, saved["vertical_chunk_size"], saved["prompt"])
        own = {"max_seq_length": reader._pipeline.limit}
        saved_reader.check_same({"max_seq_length": saved["limit"]}, own)
        reader._waiting, reader._made = saved["waiting"], saved["made"]
        reader._text = GrowingText(reader._pipeline.tokenizer, *saved["text"])
        reader._reading, reader._pooling = reader._template(bool(saved["start"]))
        tree = restored(_tree(reader._reading, reader._pooling), tensors, saved["values"])
        reader._reading.start, reader._reading.state = saved["start"], tree["state"]
        vars(reader._pooling).update(tree["pooling"])
        return reader

    def _template(self, begun: bool) -> tuple[Reading, StreamingPooling]:
        """Begin anew, or make a state of any two tokens."""
        pipeline = self._pipeline
        reading = pipeline.reading()
        pooling = StreamingPooling(pipeline.modes, 1, pipeline.prompt_length)
        if begun:
            self._read([0, 0], reading, pooling)
        return reading, pooling

    def _take(self, text: str) -> None:
        self._require_whole()
        self._broken = True
        for ids in self._text.append(text):
            self._waiting += self._kept(ids, self._made)
            self._made += len(ids)
            while len(self._waiting) >= self._size:
                self._read(self._waiting[: self._size], self._reading, self._pooling)
                del self._waiting[: self._size]
        self._broken = False

    def _flush(self) -> None:
        """Read the ids that wait, unless it is one, which would end the reading."""
        self._require_whole()
        if len(self._waiting) > 1:
            self._broken = True
            self._read(self._waiting, self._reading, self._pooling)
            self._waiting = []
            self._broken = False

    @torch.inference_mode(False)  # Sums of one call are added to in another's mode.
    @torch.no_grad()
    def _read(self, ids: Sequence[int], reading: Reading, pooling: StreamingPooling) -> None:
        """Read ids in chunks, and pool them."""
        for at in range(0, len(ids), self._size):
            start, part = reading.start, ids[at : at + self._size]
            hidden = self._pipeline.token_wise(reading.read(part))
            row = torch.zeros(1, dtype=torch.int64, device=hidden.device)
            pooling.update(Chunk(start, row, row + len(part), hidden))

    def _kept(self, ids: list[int], made: int) -> list[int]:
        """The ids that the limit leaves of some that come behind `made` others."""
        return ids if self._room is None else ids[: max(self._room - made, 0)]

    def _warn_if_cut(self, made: int) -> None:
        if self._room is not None and made > self._room:
            special = sum(map(len, self._pipeline.tokenizer.special_tokens))
            cuts = Cuts(1, 1, self._room + special, made + special)
            cuts.tell(self._pipeline.model, None)

    def _require_whole(self) -> None:
        if self._broken:
            raise VerticalChunkingError(
                "a Reader whose last call failed halfway",
                "a Reader that has read all of its text",
                "go on from an earlier fork or file, or read the text again",
            )


@torch.inference_mode(False)
def _copied(pooling: StreamingPooling) -> StreamingPooling:
    return copy.deepcopy(pooling)


def _tree(reading: Reading, pooling: StreamingPooling) -> dict[str, Any]:
    """All that is made of the tokens that were read."""
    sums = {name: part for name, part in vars(pooling).items() if name in ("_state", "_seen")}
    return {"state": reading.state, "pooling": sums}
