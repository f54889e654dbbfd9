"""The hooks from `encode` to the modules.

The size travels as a keyword argument of the library's own `_inference`, so it reaches the workers
of a pool and the ranks of a distributed evaluation too; `Size` brings the hooks along.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import torch

from compat.errors import UnsupportedPipelineError
from compat.hooks import progress, training
from compat.hooks.cut_texts import Cuts, asked_for, counting, reader_of, told_once
from compat.hooks.own_chunks import KEYWORD, for_preprocess, reads_by_itself
from compat.hooks.refusals import check_inputs, check_modules, check_tokens
from compat.hooks.run import Run, inferring, running, setting
from compat.hooks.size import Share, Size, encoding
from compat.hooks.stored_default import in_training, settled_default, warn_of_whole_texts
from compat.hooks.streamed_texts import check_picklable, size_of, whole
from compat.hooks.streamed_texts import preprocess as preprocess_streamed
from compat.installed.eager import eager
from compat.stream.chunk_size import settled
from compat.stream.rows import require_tokens

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder, SentenceTransformer

Features = dict[str, Any]
Hold = Callable[[], AbstractContextManager[None]]


def hook_encode(held: Hold, original: Callable[..., Any]) -> Callable[..., Any]:
    """Let `encode` take the size, and hold the hooks for as long as it runs."""

    @functools.wraps(original)
    def encode(self: SentenceTransformer, *args: Any, **kwargs: Any) -> Any:
        size = kwargs.get(KEYWORD)
        size = settled_default(self) if size is None else size
        if size is None and KEYWORD not in kwargs:
            return original(self, *args, **kwargs)
        task = kwargs.get("task")
        if reads_by_itself(self, task):
            with told_once(self, task):
                return original(self, *args, **{**kwargs, KEYWORD: size})
        if size is None:
            del kwargs[KEYWORD]
            return original(self, *args, **kwargs)
        kwargs[KEYWORD] = Size(settled(size, self.device))
        # Another thread may take the hooks out while this call runs, or before it has begun.
        with held(), setting(encoding, True), told_once(self, task):
            return original(self, *args, **kwargs)

    signature = inspect.signature(original)
    parameters = list(signature.parameters.values())
    added = inspect.Parameter(
        KEYWORD, inspect.Parameter.KEYWORD_ONLY, default=None, annotation="int | str | None"
    )
    encode.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*parameters[:-1], added, parameters[-1]]
    )
    encode.__doc__ = (original.__doc__ or "") + _ENCODE_DOC
    return encode


_ENCODE_DOC = """
        vertical_chunk_size (int or "auto", optional): Added by compat. Read each text in chunks of
            this many tokens, or of as many as are fastest on the device, each through all layers,
            with the recurrent state carried on; the embedding is that of the whole text, in memory
            that does not depend on its length. What all texts of a batch begin with, such as a
            prompt, is read once where that is faster. Defaults to the
            model's own `vertical_chunk_size`. With `output_value="token_embeddings"` or None the
            result holds every token's embedding, so it grows with the text whatever the chunks.
"""


def hook_predict(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let a CrossEncoder refuse the size, which it would ignore."""

    @functools.wraps(original)
    def predict(self: CrossEncoder, *args: Any, **kwargs: Any) -> Any:
        # As of sentence-transformers 6.2.0, predict ignores arguments that it does not know.
        if kwargs.pop(KEYWORD, None) is not None:
            raise UnsupportedPipelineError(
                f"a CrossEncoder with {KEYWORD}",
                "a SentenceTransformer, whose encode compat's hooks let read in chunks",
                f"call it without {KEYWORD}",
            )
        return original(self, *args, **kwargs)

    return predict


def hook_get_model_kwargs(original: Callable[..., Any]) -> Callable[..., Any]:
    """Name the size among what the modules take, for `encode` alone."""

    @functools.wraps(original)
    def get_model_kwargs(self: SentenceTransformer) -> list[str]:
        names: list[str] = original(self)
        # Only for `encode` itself: to everybody else the model's own arguments are what they were.
        return [*names, KEYWORD] if encoding.get() and KEYWORD not in names else names

    return get_model_kwargs


def hook_inference(original: Callable[..., Any]) -> Callable[..., Any]:
    """Check a model and its inputs before they are read in chunks, and open the bar."""
    in_chunks = eager(original)

    @functools.wraps(original)
    def _inference(
        self: SentenceTransformer,
        inputs: list[Any],
        *,
        show_progress_bar: bool = False,
        output_value: str | None = "sentence_embedding",
        **kwargs: Any,
    ) -> Any:
        kwargs["output_value"] = output_value
        size, task = kwargs.get(KEYWORD), kwargs.get("task")
        cuts = Cuts()
        pooled = output_value == "sentence_embedding"
        if size is None or not pooled or reads_by_itself(self, task):
            inputs = [whole(text) for text in inputs]
        with ExitStack() as stack:
            stack.enter_context(setting(inferring, True))
            if size is None:
                return original(self, inputs, show_progress_bar=show_progress_bar, **kwargs)
            infer = original
            if not reads_by_itself(self, task):
                infer = in_chunks
                del kwargs[KEYWORD]
                check_modules(self, pooled, task)
                check_inputs(self, inputs, kwargs.get("prompt"), task)
                sizes = [size_of(self, text) for text in inputs]
                chars = None if None in sizes else sum(filter(None, sizes))
                bar = stack.enter_context(progress.opened(chars, show_progress_bar))
                show_progress_bar = False
                stack.enter_context(setting(running, Run(int(size), pooled, bar)))
            stack.enter_context(setting(counting, cuts))
            outputs = infer(self, inputs, show_progress_bar=show_progress_bar, **kwargs)
        if isinstance(size, Share):
            return cuts.beside(outputs)
        cuts.tell(self, task)
        return outputs

    return _inference


def hook_forward(held: Hold, original: Callable[..., Any]) -> Callable[..., Any]:
    """Let a call of the model take the size, and warn of one that ignores a stored default."""

    takes_the_size = eager(reads_by_itself)

    @eager
    def in_chunks(
        self: SentenceTransformer,
        size: object,
        task: str | None,
        args: tuple[Any, ...],
        kwargs: Features,
    ) -> Any:
        _check_forward(self, args[0] if args else kwargs["input"])
        check_modules(self, True, task)
        with (
            held(),
            progress.opened(0, show=False) as bar,
            setting(inferring, True),
            setting(running, Run(settled(size, self.device), True, bar)),
        ):
            return original(self, *args, **kwargs)

    @functools.wraps(original)
    def forward(self: SentenceTransformer, *args: Any, **kwargs: Any) -> Any:
        size = kwargs.get(KEYWORD)
        if size is None and torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        if inferring.get():
            return original(self, *args, **kwargs)
        features = args[0] if args else kwargs["input"]
        task = kwargs.get("task", features.get("task"))
        if size is None:
            warn_of_whole_texts(self, features)
        if size is None or takes_the_size(self, task):
            return original(self, *args, **kwargs)
        del kwargs[KEYWORD]
        return in_chunks(self, size, task, args, kwargs)

    return forward


def _check_forward(model: SentenceTransformer, features: Features) -> None:
    """Refuse a call of the model that chunks cannot serve."""
    if in_training(model):
        raise UnsupportedPipelineError(
            f"{KEYWORD} in a call of a model in training mode",
            f"a model in eval mode, or model.{training.NAME}, with which chunks carry gradients",
            f"call model.eval() first, or set {training.NAME} and leave {KEYWORD} out",
        )
    if (mask := features.get("attention_mask")) is not None:
        require_tokens(mask.sum(1))


def hook_multi_process(original: Callable[..., Any]) -> Callable[..., Any]:
    """Send the size to the workers of a pool, which bring the hooks along by it."""

    @functools.wraps(original)
    def _multi_process(self: SentenceTransformer, inputs: list[Any], **kwargs: Any) -> Any:
        if kwargs.get(KEYWORD) is None:
            inputs = [whole(text) for text in inputs]
        check_picklable(inputs)
        if isinstance(kwargs.get(KEYWORD), Size):
            # The workers check their shares too, but the indices there say nothing to the caller.
            pooled, task = kwargs["output_value"] == "sentence_embedding", kwargs.get("task")
            check_modules(self, pooled, task)
            check_inputs(self, inputs, kwargs.get("prompt"), task)
            kwargs[KEYWORD] = Share(kwargs[KEYWORD])
        return original(self, inputs, **kwargs)

    return _multi_process


def hook_preprocess(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let the ids of long texts be made as they are read."""

    @functools.wraps(original)
    def preprocess(self: SentenceTransformer, inputs: Sequence[Any], **kwargs: Any) -> Any:
        kwargs = for_preprocess(self, kwargs)
        run, cuts = running.get(), counting.get()
        if run is None or not run.pooled:
            features = original(self, inputs, **kwargs)
        else:
            features, run.streamed = preprocess_streamed(
                lambda texts: original(self, texts, **kwargs),
                reader_of(self, kwargs.get("task")),
                inputs,
                kwargs.get("prompt"),
                None if asked_for(kwargs.get("processing_kwargs") or {}) else cuts,
            )
        streamed = {} if run is None else run.streamed
        if cuts is not None:
            cuts.look(self, inputs, features, kwargs, streamed)
        if run is not None:
            run.begin(self, inputs)
            check_tokens(inputs, features)
        return features

    return preprocess
