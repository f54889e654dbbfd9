"""The hooks into sentence-transformers: a stream of chunks from Transformer to Pooling.

    encode(vertical_chunk_size=...) -> _inference -> Transformer: a stream of chunks
                                                  -> Dense, Normalize: chunk by chunk
                                                  -> Pooling: the sentence embedding

The size travels as a keyword argument of the library's own `_inference`, so it reaches the workers
of a pool and the ranks of a distributed evaluation too; `Size` brings the hooks along.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from compat.errors import UnsupportedPipelineError, UnsupportedVersionError
from compat.families.lookup import backbone_of
from compat.hooks import progress, training
from compat.hooks.cut_texts import Cuts, asked_for, counting, reader_of, told_once
from compat.hooks.own_chunks import KEYWORD, for_preprocess, is_native, reads_by_itself
from compat.hooks.refusals import TOKENS, check_features, check_inputs, check_modules, check_tokens
from compat.hooks.size import Share, Size, encoding
from compat.hooks.stored_default import (
    get_default,
    hook_get_model_config,
    hook_of_others,
    hook_parse_model_config,
    in_training,
    set_default,
    warn_of_whole_texts,
)
from compat.hooks.streamed_texts import check_picklable, size_of, whole
from compat.hooks.streamed_texts import preprocess as preprocess_streamed
from compat.installed.patches import Patch
from compat.stream.chunk import Chunk
from compat.stream.hidden_states import iter_chunks
from compat.stream.pooling import TokenStream
from compat.stream.rows import align_left, check_chunk_size
from compat.stream.shared_prefix import stream_sharing
from compat.stream.text_loop import stream_texts
from compat.stream.token_ids import TokenIds

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder, SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

Features = dict[str, Any]
Hold = Callable[[], AbstractContextManager[None]]
T = TypeVar("T")


@dataclass
class _Run:
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


_inferring: ContextVar[bool] = ContextVar("compat_inferring", default=False)
_run: ContextVar[_Run | None] = ContextVar("compat_run", default=None)


@contextmanager
def _set(variable: ContextVar[T], value: T) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def installed() -> bool:
    """Return whether sentence-transformers can be imported."""
    return importlib.util.find_spec("sentence_transformers") is not None


def plan(held: Hold) -> list[Patch]:
    """The class attributes to replace, after a look at all that the replacements rely on.

    Args:
        held: Holds the hooks for the length of a `with` block.

    Returns:
        Nothing where the library is not installed or does it itself.

    Raises:
        UnsupportedVersionError: Something that a hook relies on is not there.
    """
    if not installed() or is_native():
        return []
    try:
        from sentence_transformers import (
            CrossEncoder,
            MultiVectorEncoder,
            SentenceTransformer,
            SparseEncoder,
        )
        from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
        from sentence_transformers.sentence_transformer.modules import Pooling
    except ImportError as error:
        raise _unsupported(str(error)) from error
    hooks: dict[type, dict[str, Callable[[Any], Callable[..., Any]]]] = {
        SentenceTransformer: {
            "encode": functools.partial(_encode, held),
            "forward": lambda released: training.hook_forward(held, _forward(held, released)),
            "get_model_kwargs": _get_model_kwargs,
            "_inference": _inference,
            "_multi_process": _multi_process,
            "preprocess": _preprocess,
            "_get_model_config": hook_get_model_config,
            "_parse_model_config": hook_parse_model_config,
        },
        Transformer: {
            "forward": lambda released: training.hook_transformer(_transformer_forward(released))
        },
        Dense: {"forward": _token_wise_forward},
        Normalize: {"forward": _token_wise_forward},
        Pooling: {"forward": _pooling_forward},
        CrossEncoder: {"predict": _predict, "_parse_model_config": hook_of_others},
        MultiVectorEncoder: {"_parse_model_config": hook_of_others},
        SparseEncoder: {"_parse_model_config": hook_of_others},
    }
    for owner, factories in hooks.items():
        for name in factories:
            method = getattr(owner, name, None)
            if not callable(method) or getattr(method, "__isabstractmethod__", False):
                raise _unsupported(f"{owner.__name__} has no method {name}")
    if not callable(getattr(Router, "_resolve_route", None)):
        raise _unsupported("Router has no method _resolve_route")
    needed = {"inputs", "show_progress_bar", "output_value"}
    if missing := needed - set(inspect.signature(SentenceTransformer._inference).parameters):
        raise _unsupported(f"SentenceTransformer._inference has no argument {sorted(missing)}")
    for method in (SentenceTransformer.encode, SentenceTransformer._inference):
        if not _takes_keywords(method):
            raise _unsupported(f"SentenceTransformer.{method.__name__} takes no **kwargs")
    patches: list[Patch] = [
        (SentenceTransformer, KEYWORD, property(get_default, set_default)),
        (SentenceTransformer, training.NAME, training.size_property),
    ]
    for owner, factories in hooks.items():
        patches += [(owner, name, make(getattr(owner, name))) for name, make in factories.items()]
    return patches


def _unsupported(what: str) -> UnsupportedVersionError:
    import sentence_transformers

    return UnsupportedVersionError(
        f"sentence-transformers {sentence_transformers.__version__}: {what}",
        "a release whose SentenceTransformer, Transformer and Pooling are those of 6.2",
        'pip install "sentence-transformers>=6.2,<7"',
    )


def _takes_keywords(function: Callable[..., Any]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


# From encode to the modules.


def _encode(held: Hold, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def encode(self: SentenceTransformer, *args: Any, **kwargs: Any) -> Any:
        size = kwargs.get(KEYWORD)
        size = get_default(self) if size is None else size
        if size is None and KEYWORD not in kwargs:
            return original(self, *args, **kwargs)
        task = kwargs.get("task")
        if reads_by_itself(self, task):
            with told_once(self, task):
                return original(self, *args, **{**kwargs, KEYWORD: size})
        if size is None:
            del kwargs[KEYWORD]
            return original(self, *args, **kwargs)
        kwargs[KEYWORD] = Size(check_chunk_size(size))
        # Another thread may take the hooks out while this call runs, or before it has begun.
        with held(), _set(encoding, True), told_once(self, task):
            return original(self, *args, **kwargs)

    signature = inspect.signature(original)
    parameters = list(signature.parameters.values())
    added = inspect.Parameter(
        KEYWORD, inspect.Parameter.KEYWORD_ONLY, default=None, annotation="int | None"
    )
    encode.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*parameters[:-1], added, parameters[-1]]
    )
    encode.__doc__ = (original.__doc__ or "") + _ENCODE_DOC
    return encode


_ENCODE_DOC = """
        vertical_chunk_size (int, optional): Added by compat. Read each text in chunks of this many
            tokens, each through all layers, with the recurrent state carried on; the embedding is
            that of the whole text, in memory that does not depend on its length. What all texts of
            a batch begin with, such as a prompt, is read once where that is faster. Defaults to the
            model's own `vertical_chunk_size`. With `output_value="token_embeddings"` or None the
            result holds every token's embedding, so it grows with the text whatever the chunks.
"""


def _predict(original: Callable[..., Any]) -> Callable[..., Any]:
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


def _get_model_kwargs(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_model_kwargs(self: SentenceTransformer) -> list[str]:
        names: list[str] = original(self)
        # Only for `encode` itself: to everybody else the model's own arguments are what they were.
        return [*names, KEYWORD] if encoding.get() and KEYWORD not in names else names

    return get_model_kwargs


def _inference(original: Callable[..., Any]) -> Callable[..., Any]:
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
            stack.enter_context(_set(_inferring, True))
            if size is None:
                return original(self, inputs, show_progress_bar=show_progress_bar, **kwargs)
            if not reads_by_itself(self, task):
                del kwargs[KEYWORD]
                check_modules(self, pooled, task)
                check_inputs(self, inputs, kwargs.get("prompt"), task)
                sizes = [size_of(self, text) for text in inputs]
                chars = None if None in sizes else sum(filter(None, sizes))
                bar = stack.enter_context(progress.opened(chars, show_progress_bar))
                show_progress_bar = False
                stack.enter_context(_set(_run, _Run(int(size), pooled, bar)))
            stack.enter_context(_set(counting, cuts))
            outputs = original(self, inputs, show_progress_bar=show_progress_bar, **kwargs)
        if isinstance(size, Share):
            return cuts.beside(outputs)
        cuts.tell(self, task)
        return outputs

    return _inference


def _forward(held: Hold, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: SentenceTransformer, *args: Any, **kwargs: Any) -> Any:
        size = kwargs.get(KEYWORD)
        if size is None and torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        if _inferring.get():
            return original(self, *args, **kwargs)
        features = args[0] if args else kwargs["input"]
        task = kwargs.get("task", features.get("task"))
        if size is None:
            warn_of_whole_texts(self, features)
        if size is None or reads_by_itself(self, task):
            return original(self, *args, **kwargs)
        del kwargs[KEYWORD]
        _check_forward(self, features)
        check_modules(self, True, task)
        with (
            held(),
            progress.opened(0, show=False) as bar,
            _set(_inferring, True),
            _set(_run, _Run(check_chunk_size(size), True, bar)),
        ):
            return original(self, *args, **kwargs)

    return forward


def _check_forward(model: SentenceTransformer, features: Features) -> None:
    """Refuse a call of the model that chunks cannot serve."""
    if in_training(model):
        raise UnsupportedPipelineError(
            f"{KEYWORD} in a call of a model in training mode",
            f"a model in eval mode, or model.{training.NAME}, with which chunks carry gradients",
            f"call model.eval() first, or set {training.NAME} and leave {KEYWORD} out",
        )
    for row, mask in enumerate(features.get("attention_mask", ())):
        if not mask.any():
            raise ValueError(
                f"Row {row} of attention_mask has no token: there is nothing to embed."
            )


def _multi_process(original: Callable[..., Any]) -> Callable[..., Any]:
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


def _preprocess(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def preprocess(self: SentenceTransformer, inputs: Sequence[Any], **kwargs: Any) -> Any:
        kwargs = for_preprocess(self, kwargs)
        run, cuts = _run.get(), counting.get()
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


# The modules. Each does what it always did when no `_inference` with a chunk size is under way.


def _transformer_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: Transformer, features: Features, **kwargs: Any) -> Features:
        run = _run.get()
        if run is None:
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


def _token_wise_forward(original: Callable[..., Any]) -> Callable[..., Any]:
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


def _pooling_forward(original: Callable[..., Any]) -> Callable[..., Any]:
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
