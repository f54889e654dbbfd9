"""The hooks in the modules: a stream of chunks from Transformer to Pooling.

Each module does what it always did where no call with a chunk size is under way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compat.families.lookup import backbone_of
from compat.hooks.refusals import TOKENS, check_features
from compat.hooks.run import running
from compat.stream.hidden_states import iter_chunks
from compat.stream.pooling import TokenStream
from compat.stream.rows import align_left
from compat.stream.shared_prefix import stream_sharing
from compat.stream.text_loop import stream_texts

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

Features = dict[str, Any]


def hook_transformer(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let a Transformer give a stream of chunks, or put the chunks of all tokens together."""

    @functools.wraps(original)
    def forward(self: Transformer, features: Features, **kwargs: Any) -> Features:
        # Chunks are never compiled, and a graph would break where the run is asked for.
        if torch.compiler.is_compiling() or (run := running.get()) is None:
            return original(self, features, **kwargs)  # type: ignore[no-any-return]
        check_features(self, {**features, **kwargs})
        input_ids, mask = features["input_ids"], features.get("attention_mask")
        if run.pooled:
            backbone, family = backbone_of(self.model)
            tokens, lengths = align_left(input_ids, mask)
            rows = torch.tensor([*run.streamed], device=lengths.device, dtype=torch.int64)
            lengths = lengths.index_fill(0, rows, 0)
            short = stream_sharing(backbone, family, tokens, lengths, run.size)
            texts = list(run.streamed.values())
            long = stream_texts(backbone, family, texts, rows, run.size)
            chunks = chain(run.watch(short, int(lengths.sum())), run.watch_texts(long, texts))
            features[TOKENS] = TokenStream(chunks, lengths)
        else:
            pieces = []
            for start, hidden in iter_chunks(
                self.model, input_ids=input_ids, attention_mask=mask, vertical_chunk_size=run.size
            ):
                pieces.append(hidden)
                run.move(start + hidden.shape[1], input_ids.shape[1])
            features[TOKENS] = torch.cat(pieces, dim=1)
        return features

    return forward


def hook_token_wise(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let a module of single tokens work chunk by chunk."""

    @functools.wraps(original)
    def forward(self: Any, features: Features, **kwargs: Any) -> Features:
        tokens = features.get(self.module_input_name)
        if not isinstance(tokens, TokenStream):
            return original(self, features, **kwargs)  # type: ignore[no-any-return]

        def one_chunk(hidden: Tensor) -> Tensor:
            out: Tensor = original(self, {self.module_input_name: hidden}, **kwargs)[TOKENS]
            return out

        features[self.module_output_name] = tokens.map(one_chunk)
        return features

    return forward


def hook_pooling(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let a Pooling read the stream to its end."""

    @functools.wraps(original)
    def forward(self: Pooling, features: Features, **kwargs: Any) -> Features:
        if not isinstance(features[TOKENS], TokenStream):
            return original(self, features, **kwargs)  # type: ignore[no-any-return]
        tokens: TokenStream = features.pop(TOKENS)
        modes = (self.pooling_mode,) if isinstance(self.pooling_mode, str) else self.pooling_mode
        prompt_length = 0 if self.include_prompt else int(features.get("prompt_length", 0))
        features["sentence_embedding"] = tokens.pool(modes, prompt_length)
        return features

    return forward
