"""Run once what the texts of a batch begin with: their prompt, mostly."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compat.errors import VerticalChunkingError
from compat.families.base import Family
from compat.families.positions import need_length
from compat.stream.chunk import Chunk
from compat.stream.loop import stream
from compat.stream.reading import Reading
from compat.stream.rows import windows

# Tokens that must be spared for each run more. Measured on a CPU, sharing pays from about 110 on
# where layers are 768 wide, and from about 300 on where they are 256 wide.
SPARED = 256


@torch.inference_mode(False)  # A state that is made in one call may be used in another's mode.
@torch.no_grad()
def stream_sharing(
    backbone: PreTrainedModel,
    family: Family,
    input_ids: Tensor,
    lengths: Tensor,
    vertical_chunk_size: int,
) -> Iterator[Chunk]:
    """Run rows through all layers in chunks; tokens that all of them begin with are run once.

    The state after those is handed to each row. Of a hybrid, each row gets its own copy of their
    keys and values, which it would have made itself otherwise.

    Args:
        backbone: The model without its head.
        family: How its state is carried.
        input_ids: (batch, seqlen) int64, each row's tokens at its beginning.
        lengths: (batch,) int64, the number of tokens of each row.
        vertical_chunk_size: Tokens in a chunk.

    Yields:
        The chunks of the tokens that are shared, of all rows, and those of `stream` behind them.
    """
    rows = (lengths > 0).nonzero()[:, 0]
    shared, state = 0, None
    if count := _num_shared(backbone, input_ids[rows], lengths[rows], vertical_chunk_size):
        reading = Reading(backbone, family)
        for start, stop in windows(count, vertical_chunk_size):
            hidden = reading.read(input_ids[rows[0], start:stop].tolist())
            if not start and not _is_copied(reading):
                break
            widths = torch.full_like(rows, stop - start)
            yield Chunk(start, rows, widths, hidden.expand(len(rows), -1, -1))
            del hidden  # The next chunk's hidden states must not come on top of this one's.
            shared, state = stop, reading.state
    rest = windows(input_ids.shape[1] - shared, vertical_chunk_size)
    parts = [(start + shared, stop + shared) for start, stop in rest]
    yield from stream(backbone, family, input_ids, lengths, parts, state)


def _num_shared(
    backbone: PreTrainedModel, input_ids: Tensor, lengths: Tensor, vertical_chunk_size: int
) -> int:
    """Return how many tokens at the beginning of all rows are run once; 0 where it does not pay.

    It has been measured on a CPU alone; on an accelerator, a run of one row may take as long as
    one of many.
    """
    if len(lengths) < 2 or lengths.device.type != "cpu":
        return 0
    if need_length(backbone.config):
        return 0  # A token's positions depend on the length of its row.
    # Each row keeps two tokens: released models take another path for a single one.
    room = max(int(lengths.min()) - 2, 0)
    equal = (input_ids[:, :room] == input_ids[:1, :room]).all(0)
    count = int(equal.long().cumprod(0).sum())
    if count < 2:
        return 0
    runs = len(windows(count, vertical_chunk_size))
    return count if (len(lengths) - 1) * count >= SPARED * runs else 0


def _is_copied(reading: Reading) -> bool:
    """Return whether the state can be copied, and so be handed to several rows."""
    try:
        reading.copy()
    except VerticalChunkingError:
        return False
    return True
