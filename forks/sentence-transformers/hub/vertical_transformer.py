"""A Transformer that reads texts of any length in vertical chunks, and its Pooling, to be stored with a model.

They are what a release of Sentence Transformers with ``vertical_chunk_size`` has in its own modules.
"""

from __future__ import annotations

from typing import Any

from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from .vertical_chunks import TokenStream, read_in_chunks


class VerticalTransformer(Transformer):
    """A Transformer whose recurrent model reads texts in chunks, if ``encode`` is given ``vertical_chunk_size``."""

    forward_kwargs = Transformer.forward_kwargs | {"vertical_chunk_size"}

    def forward(
        self, features: dict[str, Any], vertical_chunk_size: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Write the token embeddings into the features: all of them, or a stream of chunks."""
        if vertical_chunk_size is None:
            return super().forward(features, **kwargs)
        features["token_embeddings"] = read_in_chunks(self, {**features, **kwargs}, vertical_chunk_size)
        return features

    def _should_flatten_inputs(self, *args: Any, vertical_chunk_size: int | None = None, **kwargs: Any) -> bool:
        return vertical_chunk_size is None and super()._should_flatten_inputs(*args, **kwargs)


class VerticalPooling(Pooling):
    """A Pooling that also takes token embeddings chunk by chunk."""

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Write the sentence embedding into the features."""
        tokens = features["token_embeddings"]
        if not isinstance(tokens, TokenStream):
            return super().forward(features, **kwargs)
        modes = (self.pooling_mode,) if isinstance(self.pooling_mode, str) else self.pooling_mode
        prompt_length = 0 if self.include_prompt else int(features.get("prompt_length", 0))
        features["sentence_embedding"] = tokens.pool(modes, prompt_length)
        return features
