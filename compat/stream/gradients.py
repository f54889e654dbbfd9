"""Pooled embeddings in vertical chunks with the gradients of one pass (law 5).

    forward   run the chunks without gradients, and keep what stands at their borders: the model's
              state, the pooling's accumulators, and the state of the random numbers
    backward  from the last chunk to the first: run the chunk again from its border, with gradients,
              and hand the gradient of the border on to the chunk before

The activations are those of one chunk, whatever the text's length, beside the state of each border
that is kept; the time is that of one more forward. Where borders are many, only some are kept, and
those between two of them are made again when the backward gets there. The parameters are inputs of
one autograd.Function, so whatever hangs on their gradients (hooks, DistributedDataParallel, a
scaler) sees each of them once.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers import PreTrainedModel

from compat.errors import UnsupportedModelError, UnsupportedPipelineError
from compat.families.base import Family
from compat.families.gradients import back, require_gradients, require_no_checkpointing, run
from compat.families.lookup import backbone_of
from compat.installed.behaviour import same_random_numbers
from compat.installed.eager import eager
from compat.installed.recurrent_cache import require_support
from compat.stream.chunk import Chunk
from compat.stream.hidden_states import check_inputs
from compat.stream.pooling import StreamingPooling, TokenStream
from compat.stream.rows import (
    Auto,
    Step,
    align_left,
    batches,
    check_size_or_auto,
    require_tokens,
    steps,
    windows,
)
from compat.stream.training_size import between, leanest

Map = Callable[[Tensor], Tensor]
"""A function of single tokens, (batch, chunk, dim) to (batch, chunk, another dim)."""


@eager
def pooled(
    model: PreTrainedModel,
    *,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    pooling_mode: str | Sequence[str] = "mean",
    vertical_chunk_size: int | Auto,
) -> Tensor:
    """Embed a batch in vertical chunks; the result carries the gradients of one pass.

    Where gradients are recorded, a backward of the result runs each chunk once more. Activations
    take the memory of one chunk, and each chunk's state is kept until the backward; of more than
    64 chunks only some, for which the backward runs all chunks once more still. Dropout draws the
    same masks in all runs. Rows go together where they have no more tokens than one chunk.

    Example:
        >>> embeddings = compat.pooled(
        ...     model, input_ids=ids, attention_mask=mask, vertical_chunk_size=2048
        ... )
        >>> loss(embeddings).backward()

    Args:
        model: A transformers model of the type falcon_mamba, mamba, mamba2, rwkv or xlstm, or an
            RWKV-6 or RWKV-7 of flash-linear-attention, with or without a head.
        input_ids: (batch, seqlen) int64, on the model's device.
        attention_mask: (batch, seqlen), 1 at tokens, 0 at padding, which may stand on the left and
            on the right; None where there is no padding.
        pooling_mode: "cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean" or "lasttoken",
            as in sentence-transformers; or several of them, whose vectors are concatenated.
        vertical_chunk_size: Tokens that are run at once; "auto" for the size that takes the least
            memory for this model and these rows, of the powers of two from 256 on.

    Returns:
        (batch, hidden_size), times the number of modes, in the hidden states' dtype.

    Raises:
        UnsupportedModelError: The model cannot be continued exactly from a state, or not with
            gradients: a hybrid, gradient checkpointing, parameters in shards, a kernel that does
            not hand the gradient of its state on.
        UnsupportedPipelineError: By the backward: it is the second one, it is to be differentiated
            itself, or a parameter or the training mode has changed since the forward.
        TypeError: vertical_chunk_size is neither an int nor "auto".
        ValueError: vertical_chunk_size is less than 1, a mode is unknown, the shapes do not fit, a
            row has no token, or padding stands between tokens.
    """
    backbone, family = trainable(model)
    size = check_size_or_auto(vertical_chunk_size)
    check_inputs(input_ids, attention_mask)
    tokens, lengths = align_left(input_ids, attention_mask)
    require_tokens(lengths)
    stream = gradient_stream(backbone, family, tokens, lengths, size)
    modes = (pooling_mode,) if isinstance(pooling_mode, str) else tuple(pooling_mode)
    return stream.pool(modes)


def trainable(model: Any) -> tuple[PreTrainedModel, Family]:
    """Return the model without its head, and how its state is carried with gradients.

    Raises:
        UnsupportedModelError: See `pooled`.
    """
    if isinstance(model, nn.Module):
        require_no_checkpointing(model)
    backbone, family = backbone_of(model)
    require_support()
    require_gradients(backbone, family)
    return backbone, family


@dataclass(frozen=True)
class GradientStream(TokenStream):
    """A stream of chunks that is read in `pool`, and once more by the backward of its result.

    Attributes:
        text: What is read.
        maps: Functions of single tokens, applied to each chunk's hidden states.
        modules: The modules whose parameters these functions use.
    """

    text: _Text
    maps: tuple[Map, ...] = ()
    modules: tuple[nn.Module, ...] = ()

    def map(self, function: Map) -> GradientStream:
        """Apply a function of single tokens to each chunk's hidden states as it comes."""
        maps = (*self.maps, function)
        return GradientStream(self.chunks, self.lengths, self.text, maps, self.modules)

    def pool(self, modes: Sequence[str], prompt_length: int = 0) -> Tensor:
        """Read all chunks; see `StreamingPooling` for arguments, result and errors."""
        pooling = StreamingPooling(modes, len(self.lengths), prompt_length)
        owners = (self.text.backbone, *self.modules)
        reading = _Reading(self.text, self.maps, pooling, owners)
        parameters = dict.fromkeys(p for m in owners for p in m.parameters() if p.requires_grad)
        if not torch.is_grad_enabled() or not parameters:
            return reading.forward(keep=False)
        found: Tensor = _Pooled.apply(reading, *parameters)  # type: ignore[no-untyped-call]
        return found


def gradient_stream(
    backbone: PreTrainedModel,
    family: Family,
    input_ids: Tensor,
    lengths: Tensor,
    size: int | Auto,
    modules: Iterable[nn.Module] = (),
) -> GradientStream:
    """Make the stream of rows of tokens.

    Args:
        backbone: The model without its head, of `trainable`.
        family: How its state is carried.
        input_ids: (batch, seqlen) int64, each row's tokens at its beginning.
        lengths: (batch,) int64, the number of tokens of each row.
        size: Tokens in a vertical chunk, or "auto".
        modules: Those whose parameters the functions use that the stream will be given.
    """
    if input_ids.shape[1] == 1:  # Released models take another path for a single token.
        input_ids = pad(input_ids, (0, 1))
    if size == "auto":
        size = leanest(backbone, family, lengths)
    text = _Text(backbone, family, input_ids, lengths, size)
    return GradientStream(iter(()), lengths, text, modules=tuple(modules))


class _Text(NamedTuple):
    """Rows of tokens, and the model that reads them."""

    backbone: PreTrainedModel
    family: Family
    input_ids: Tensor
    lengths: Tensor
    size: int

    def steps(self) -> list[Step]:
        """List the runs through all layers, none of more tokens than a chunk.

        So rows that are longer than a chunk are run alone. In groups that share a chunk, every
        border would hold the state of each row. Two or four rows of 1,024 tokens with a chunk of
        512 (one thread, CPU seconds) take 0.99 to 1.01 of the time alone where Mamba2 is 768 wide;
        only where it is 128 wide, and Python takes most of it, 0.72.
        """
        parts = windows(self.input_ids.shape[1], self.size)
        long = self.lengths > parts[0][1]
        together = [*long.nonzero()]
        for rows in batches(self.lengths.masked_fill(long, 0), parts):
            together += rows.split(max(1, self.size // int(self.lengths[rows].max())))
        return [step for rows in together for step in steps(rows, self.lengths, parts)]


class _Border(NamedTuple):
    """The beginning of some steps: the model's state, the pooling, and the random numbers."""

    steps: Sequence[Step]
    state: list[Tensor]
    pooling: StreamingPooling
    random: Any


@dataclass
class _Reading:
    """One reading of a batch, from its forward to the end of its backward."""

    text: _Text
    maps: Sequence[Map]
    pooling: StreamingPooling
    modules: Sequence[nn.Module]
    borders: list[_Border] = field(default_factory=list)

    def forward(self, keep: bool) -> Tensor:
        """Read all chunks without gradients, and keep the borders if they are wanted later."""
        self._autocast = _autocast_of(self.text.input_ids.device.type)
        self._context = contextvars.copy_context()
        # With a frozen model, nothing before Pooling needs the gradient of a state.
        self._through = any(p.requires_grad for p in self.text.backbone.parameters())
        steps = self.text.steps()
        # A border at the beginning alone holds nothing.
        stride = between(len(steps)) if keep else len(steps)
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(**self._autocast):
            self.borders, self.pooling = self._read(steps, [], self.pooling, stride)
            result = self.pooling.finalize()
        self._made_of = self._parts()
        return result

    def _read(
        self, steps: Sequence[Step], state: list[Tensor], pooling: StreamingPooling, stride: int
    ) -> tuple[list[_Border], StreamingPooling]:
        """Run steps without gradients; return a border for every `stride` of them, and the end."""
        borders = []
        for place, step in enumerate(steps):
            if step.kept is None:  # The first one of other rows.
                state = []
            if place % stride == 0:
                random = torch.get_rng_state(), *get_device_states(self.text.input_ids)
                borders.append(_Border(steps[place : place + stride], state, pooling, random))
            state, pooling = self._run(step, state, pooling, pooling.accumulators)
            state = [_alone(part) for part in state]
        return borders, pooling

    def backward(self, gradient: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the gradients of the parameters, given that of the result."""
        self._check()
        # Where autograd runs this in a thread of its own, nothing that was chosen is known there.
        return self._context.copy().run(self._backward, gradient, parameters)

    def _backward(self, gradient: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        totals: list[Tensor | None] = [None] * len(parameters)
        with same_random_numbers(self.text.input_ids.device):
            ends = [part.detach().requires_grad_() for part in self.pooling.accumulators]
            with torch.enable_grad():
                result = self.pooling.resumed(ends).finalize()
            of_sums = list(torch.autograd.grad(result, ends, gradient))
            of_state: list[Tensor | None] = []
            while self.borders:
                border = self.borders.pop()
                if len(border.steps) > 1:
                    self.borders += self._between(border)
                    continue
                of_state, of_sums, found = self._back(border, of_state, of_sums, parameters)
                for place, part in enumerate(found):
                    if part is not None:  # Many chunks are added up, in more than 16 bits.
                        wide = part.to(torch.promote_types(part.dtype, torch.float32))
                        total = totals[place]
                        totals[place] = wide if total is None else total.add_(wide)
        return [
            None if total is None else total.to(parameter.dtype)
            for total, parameter in zip(totals, parameters, strict=True)
        ]

    def _between(self, border: _Border) -> list[_Border]:
        """Read on from a border once more, and return one for each of its steps."""
        self._draw_again(border)
        with torch.no_grad(), torch.autocast(**self._autocast):
            return self._read(border.steps, border.state, border.pooling, 1)[0]

    def _draw_again(self, border: _Border) -> None:
        """Let random numbers be what they were at a border."""
        cpu, devices, states = border.random
        torch.set_rng_state(cpu)
        if devices:
            kind = self.text.input_ids.device.type
            set_device_states(devices, states, device_type=kind)

    def _back(
        self,
        border: _Border,
        of_state: Sequence[Tensor | None],
        of_sums: Sequence[Tensor],
        parameters: Sequence[Tensor],
    ) -> tuple[list[Tensor | None], list[Tensor], Sequence[Tensor | None]]:
        """Run a step again; return the gradients of its border and of the parameters."""
        self._draw_again(border)
        (step,) = border.steps
        with torch.enable_grad(), torch.autocast(**self._autocast):
            begin = [part.detach().requires_grad_(self._through) for part in border.state]
            sums = [part.detach().requires_grad_() for part in border.pooling.accumulators]
            end, pooling = self._run(step, begin, border.pooling, sums)
        if begin and self._through and not all(part.requires_grad for part in end):
            raise UnsupportedModelError(
                f"a {type(self.text.backbone).__name__} that recorded no gradient of its state in "
                f"a chunk of {step.stop - step.start} tokens",
                "layers that are differentiable in the state that they give out",
                "take smaller chunks, or train it in one pass",
            )
        pairs = [
            *zip(end, of_state, strict=False),
            *zip(pooling.accumulators, of_sums, strict=True),
        ]
        outputs = [(part, g) for part, g in pairs if g is not None and part.requires_grad]
        if not self._through:
            begin = []
        sources = [*begin, *sums, *parameters]
        found: list[Tensor | None] = [None] * len(sources)
        if outputs:
            ends, gradients = zip(*outputs, strict=True)
            found = list(back(self.text.family, ends, sources, gradients))
        state, found = found[: len(begin)], found[len(begin) :]
        own = zip(sums, found, strict=False)
        before = [torch.zeros_like(part) if g is None else g for part, g in own]
        return state, before, found[len(sums) :]

    def _run(
        self, step: Step, state: list[Tensor], pooling: StreamingPooling, sums: Sequence[Tensor]
    ) -> tuple[list[Tensor], StreamingPooling]:
        """Run a step from a state and the pooling's accumulators; none of them is changed."""
        text = self.text
        tokens = text.input_ids[step.rows, step.start : step.stop]
        hidden, after = run(text.backbone, text.family, tokens, step.start, state or None)
        for function in self.maps:
            hidden = function(hidden)
        pooling = pooling.resumed(sums)
        pooling.update(Chunk(step.start, step.rows, step.lengths, hidden))
        return after, pooling

    def _parts(self) -> list[object]:
        """Return what must not change between forward and backward: weights and training modes."""
        found: list[object] = []
        for module in self.modules:
            found += [part._version for part in module.parameters()]
            found += [part.training for part in module.modules()]
        return found

    def _check(self) -> None:
        """Refuse a backward that would not be exact."""
        found = ""
        if torch.is_grad_enabled():
            found = "a backward that is to be differentiated itself (create_graph=True)"
            needed, remedy = "a gradient of first order", "call backward without create_graph"
        elif not self.borders:
            found = "a second backward through embeddings in chunks, whose states are used up"
            needed, remedy = "one backward for each forward", "add the losses up, or embed again"
        elif self._made_of != self._parts():
            found = "parameters, or a training mode, that changed between forward and backward"
            needed = "the model as it was in the forward, since each chunk is run again"
            remedy = "call backward before the optimizer's step, model.train() or model.eval()"
        if found:
            raise UnsupportedPipelineError(found, needed, remedy)


class _Pooled(torch.autograd.Function):
    """The pooled embeddings of a reading, as a function of all parameters that need gradients."""

    @staticmethod
    def forward(ctx: Any, reading: _Reading, *parameters: Tensor) -> Tensor:
        ctx.reading, ctx.parameters = reading, parameters
        return reading.forward(keep=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, *ctx.reading.backward(gradients[0], ctx.parameters)


def _alone(part: Tensor) -> Tensor:
    """Return a tensor that keeps no more memory than its own, as a view of a chunk's would."""
    own = part.numel() * part.element_size()
    return part.clone() if part.untyped_storage().nbytes() > own else part


def _autocast_of(kind: str) -> dict[str, Any]:
    """Return the settings of autocast, for both runs.

    Its cache is off: a cast that was made without gradients must not be found by the second run.
    """
    return {
        "device_type": kind,
        "enabled": torch.is_autocast_enabled(kind),
        "dtype": torch.get_autocast_dtype(kind),
        "cache_enabled": False,
    }
