"""The call of `encode` that is under way, as the hooks in the modules see it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from compat.hooks.streamed_texts import size_of
from compat.stream.chunk import Chunk
from compat.stream.token_ids import TokenIds

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

T = TypeVar("T")


@dataclass
class Run:
    """The call of `_inference` that the modules serve.

    Attributes:
        size: Tokens in a vertical chunk.
        pooled: Whether only sentence embeddings are asked for, so that tokens can be streamed.
        bar: The progress bar, in characters.
        chars: Characters in the present batch, without those of texts that are streamed.
        moved: Those of them that the bar has gone over.
        streamed: The texts of the present batch that are streamed, by row.
        sizes: Their characters, as far as they are known beforehand.
    """

    size: int
    pooled: bool
    bar: Any
    chars: int = 0
    moved: int = 0
    streamed: dict[int, TokenIds] = field(default_factory=dict)
    sizes: int = 0

    def begin(self, model: SentenceTransformer, inputs: Sequence[Any]) -> None:
        """Note the characters of a batch, of which `streamed` is known."""
        sizes = [size_of(model, text) or 0 for text in inputs]
        self.sizes = sum(sizes[row] for row in self.streamed)
        self.chars, self.moved = sum(sizes) - self.sizes, 0

    def move(self, done: int, total: int) -> None:
        """Move the bar over the batch's characters, in proportion to its tokens that are done."""
        step = self.chars * done // total - self.moved
        self.bar.update(step)
        self.moved += step

    def watch(self, chunks: Iterator[Chunk], total: int) -> Iterator[Chunk]:
        """Pass the chunks on, and move the bar as their tokens go by."""
        tokens = 0
        for chunk in chunks:
            yield chunk
            tokens += int(chunk.lengths.sum())
            self.move(tokens, total)

    def watch_texts(self, chunks: Iterator[Chunk], texts: Sequence[TokenIds]) -> Iterator[Chunk]:
        """Pass the chunks of texts on, and move the bar over their characters as they go by."""
        done = 0
        for chunk in chunks:
            yield chunk
            step = max(sum(text.chars for text in texts) - done, 0)
            self.bar.update(step)
            done += step
        if done < self.sizes:  # Sizes may be bytes.
            self.bar.update(self.sizes - done)


inferring: ContextVar[bool] = ContextVar("compat_inferring", default=False)
"""Whether `_inference` or a call of the model in chunks is under way."""
running: ContextVar[Run | None] = ContextVar("compat_run", default=None)
"""The call that the modules serve, if it reads chunks."""


@contextmanager
def setting(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Set a variable for the length of a `with` block."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
