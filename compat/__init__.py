"""Embed texts of any length in constant memory with recurrent language models.

A text is read in *vertical chunks*: each goes through all layers before the next one does, and the
recurrent state is carried between them. The result is that of one pass over the whole text:

1. Chunking is invisible: any split gives the outputs of the unsplit text.
2. Padding is invisible: left or right, also over whole chunks.
3. Packing is invisible: a sequence in a packed row gives what it gives alone (in the ops that take
   packed rows; a model is given one text a row).
4. Batching is invisible: a row does not depend on the other rows.
5. Gradients too: a loss on embeddings in chunks has those of one pass.

`enable_vertical_chunking()` gives `SentenceTransformer.encode` the argument `vertical_chunk_size`;
`iter_chunks` and `last_hidden_state` do the same for a plain transformers model, and need no hooks.
For training there are `pooled` and, with the hooks on, `model.training_chunk_size`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compat.default_model import load_default_model
    from compat.errors import (
        UnsupportedModelError,
        UnsupportedPipelineError,
        UnsupportedTokenizerError,
        UnsupportedVersionError,
        VerticalChunkingError,
    )
    from compat.families.lookup import supported_models_table
    from compat.hooks.reader import Reader
    from compat.hooks.report import LibraryStatus, Report
    from compat.hooks.spans import encode_spans
    from compat.hooks.switch import (
        disable_vertical_chunking,
        enable_vertical_chunking,
        status,
        vertical_chunking,
    )
    from compat.stream.chunk_size import fastest_chunk_size
    from compat.stream.gradients import pooled
    from compat.stream.hidden_states import iter_chunks, last_hidden_state
    from compat.stream.spans import spans_by_tokens
    from compat.stream.text import TextStream
    from compat.stream.tokenizer import StreamingTokenizer

__all__ = [
    "LibraryStatus",
    "Reader",
    "Report",
    "StreamingTokenizer",
    "TextStream",
    "UnsupportedModelError",
    "UnsupportedPipelineError",
    "UnsupportedTokenizerError",
    "UnsupportedVersionError",
    "VerticalChunkingError",
    "disable_vertical_chunking",
    "enable_vertical_chunking",
    "encode_spans",
    "fastest_chunk_size",
    "iter_chunks",
    "last_hidden_state",
    "load_default_model",
    "pooled",
    "spans_by_tokens",
    "status",
    "supported_models_table",
    "vertical_chunking",
]

_HOMES = {
    "default_model": ["load_default_model"],
    "stream.chunk_size": ["fastest_chunk_size"],
    "stream.gradients": ["pooled"],
    "stream.hidden_states": ["iter_chunks", "last_hidden_state"],
    "errors": [
        "UnsupportedModelError",
        "UnsupportedPipelineError",
        "UnsupportedTokenizerError",
        "UnsupportedVersionError",
        "VerticalChunkingError",
    ],
    "families.lookup": ["supported_models_table"],
    "hooks.switch": [
        "disable_vertical_chunking",
        "enable_vertical_chunking",
        "status",
        "vertical_chunking",
    ],
    "hooks.reader": ["Reader"],
    "hooks.report": ["LibraryStatus", "Report"],
    "hooks.spans": ["encode_spans"],
    "stream.spans": ["spans_by_tokens"],
    "stream.text": ["TextStream"],
    "stream.tokenizer": ["StreamingTokenizer"],
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for.

    Importing torch and transformers takes seconds, and `--help` needs neither.
    """
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"compat.{module}"), name)
    raise AttributeError(f"module 'compat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
