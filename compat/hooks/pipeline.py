"""A SentenceTransformer's parts: ids of a text, its model, and the modules around the pooling."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compat.errors import UnsupportedModelError, UnsupportedPipelineError
from compat.families.lookup import backbone_of
from compat.families.positions import need_length
from compat.hooks.cut_texts import reader_of
from compat.hooks.own_chunks import KEYWORD, is_native, reads_by_itself
from compat.hooks.refusals import TOKENS, check_features, check_modules, route
from compat.hooks.streamed_texts import streaming
from compat.installed.recurrent_cache import require_support
from compat.stream.reading import Reading

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# A tokenizer must not be given two settings at once.
_lock = threading.Lock()


class Pipeline:
    """All that `encode` does to one text, in steps.

    Attributes:
        model: The model.
        tokenizer: Makes the ids of texts in pieces.
        prompt: What stands before each text.
        prompt_length: The first tokens that the pooling leaves out.
        limit: The most tokens of a text that are read, special ones counted; None for all.
        modes: The modes of the model's pooling.

    Args:
        model: The model; it is put in eval mode, as by `encode`.
        prompt: What comes before each text; None for the model's default prompt.
        task: "query" or "document", by which a Router chooses the modules; None for its default.

    Raises:
        TypeError: model is no SentenceTransformer.
        VerticalChunkingError: The model cannot be read in chunks, or its texts not in pieces.
    """

    def __init__(
        self, model: SentenceTransformer, prompt: str | None, task: str | None = None
    ) -> None:
        from sentence_transformers import SentenceTransformer

        if not isinstance(model, SentenceTransformer):
            raise TypeError(f"model must be a SentenceTransformer; found {type(model).__name__}.")
        require_support()
        if reads_by_itself(model, task) and not is_native():
            raise UnsupportedPipelineError(
                f"a model with a module that takes {KEYWORD} itself",
                "a Transformer and a Pooling whose chunks compat reads",
                "use encode, which leaves the chunks to that module",
            )
        check_modules(model, True, task)
        model.eval()
        first, *self._rest = route(list(model.children()), task)
        backbone, family = backbone_of(first.model)
        if need_length(backbone.config):
            raise UnsupportedModelError(
                f"a {type(backbone).__name__} whose positions depend on the length of the text",
                "a model that can read a text before its length is known",
                f"use encode with {KEYWORD}",
            )
        self.model = model
        self._backbone, self._family = backbone, family
        self.prompt = self._resolve(prompt)
        extra = {} if task is None else {"task": task}
        with _lock:
            self.tokenizer, self.limit, features = streaming(
                lambda texts: model.preprocess(texts, prompt=self.prompt or None, **extra),
                reader_of(model, task),
                self.prompt,
            )
        check_features(first, features)
        pooling = self._rest.pop(self._place_of_pooling())
        modes = pooling.pooling_mode
        self.modes: tuple[str, ...] = (modes,) if isinstance(modes, str) else tuple(modes)
        kept = pooling.include_prompt
        self.prompt_length = 0 if kept else int(features.get("prompt_length", 0))

    def _resolve(self, prompt: str | None) -> str:
        if prompt is None and self.model.default_prompt_name is not None:
            prompt = self.model.prompts.get(self.model.default_prompt_name)
        return prompt or ""

    def _place_of_pooling(self) -> int:
        from sentence_transformers.sentence_transformer.modules import Pooling

        self._before = next(
            place for place, module in enumerate(self._rest) if isinstance(module, Pooling)
        )
        return self._before

    def reading(self) -> Reading:
        """Begin to read a text."""
        return Reading(self._backbone, self._family)

    @torch.inference_mode(False)
    @torch.no_grad()
    def token_wise(self, hidden: Tensor) -> Tensor:
        """Run the modules between the Transformer and the pooling on tokens, (1, n, width)."""
        for module in self._rest[: self._before]:
            hidden = module({TOKENS: hidden})[TOKENS]
        return hidden

    @torch.inference_mode(False)
    @torch.no_grad()
    def finish(self, pooled: Tensor) -> NDArray[Any]:
        """Run the modules behind the pooling, and cut the result at the model's `truncate_dim`.

        Args:
            pooled: (n, width).

        Returns:
            The embeddings, (n, dim), in the dtype in which `encode` gives them.
        """
        features: dict[str, Any] = {"sentence_embedding": pooled}
        for module in self._rest[self._before :]:
            features = module(features)
        found: Tensor = features["sentence_embedding"]
        if self.model.truncate_dim is not None:
            found = found[..., : self.model.truncate_dim]
        if found.dtype == torch.bfloat16:  # NumPy has none.
            found = found.float()
        return np.asarray(found.cpu().numpy())
