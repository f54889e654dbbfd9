"""The chunk loop: rows of tokens in, hidden states chunk by chunk, the state carried between them.

Rows are run without an attention mask. A row is padded on the right only, in its last chunk only,
and leaves the batch after it; so no state that is carried has ever seen padding, no causal model
can let padding reach a token, and rows do not depend on one another.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compat.families.base import Family
from compat.families.positions import settling
from compat.families.states import copied
from compat.stream.chunk import Chunk
from compat.stream.rows import Window, batches, steps


@functools.cache
def warn_that_it_grows(model_type: str) -> None:
    """Once for each model type: what vertical chunks cannot spare a hybrid."""
    warnings.warn(
        f"{model_type} has attention layers, which keep the keys and values of the whole text: in "
        "vertical chunks its activations take constant memory, but that cache grows with the text. "
        "A model without attention, such as Mamba2, does not have it.",
        stacklevel=2,
    )


@torch.inference_mode(False)  # A state that is made in one call may be used in another's mode.
@torch.no_grad()
def stream(
    backbone: PreTrainedModel,
    family: Family,
    input_ids: Tensor,
    lengths: Tensor,
    parts: Sequence[Window],
    begun: Any = None,
) -> Iterator[Chunk]:
    """Run the rows part by part through all layers, and carry the state from part to part.

    Args:
        backbone: The model without its head.
        family: How its state is carried.
        input_ids: (batch, seqlen) int64, each row's tokens at its beginning.
        lengths: (batch,) int64, the number of tokens of each row.
        parts: Consecutive `(start, end)` up to seqlen, from 0 or from where `begun` is; a row's
            tokens are run in the parts that they reach, and not beyond.
        begun: The state, of one row, behind the tokens in front of the first part, which are the
            same in all rows; it is copied, and stays as it is.

    Yields:
        A `Chunk` for each batch of `batches` and each part that it reaches, batch after batch.
    """
    for rows in batches(lengths, parts):
        yield from run_together(backbone, family, input_ids, lengths, parts, rows, begun)


@torch.inference_mode(False)
@torch.no_grad()
def run_together(
    backbone: PreTrainedModel,
    family: Family,
    input_ids: Tensor,
    lengths: Tensor,
    parts: Sequence[Window],
    rows: Tensor,
    begun: Any = None,
) -> Iterator[Chunk]:
    """`stream` of some rows, (n,) int64, as one batch that rows leave after their last part."""
    if family.grows:
        warn_that_it_grows(str(backbone.config.model_type))
    settled = settling(backbone, int(lengths[rows].max()))
    state: Any = None
    if begun is not None:
        state = family.select_rows(copied(begun), torch.zeros_like(rows))
    count = len(rows)
    for step in steps(rows, lengths, parts):
        if step.kept is not None and len(step.kept) < count:
            state = family.select_rows(state, step.kept)
        count = len(step.rows)
        tokens = input_ids[step.rows, step.start : step.stop]
        with settled(lengths[step.rows]):
            hidden, state = family.forward(backbone, tokens, step.start, state)
        yield Chunk(step.start, step.rows, step.lengths, hidden)
        del hidden  # The next chunk's hidden states must not come on top of this one's.
