"""The chunk loop of texts whose ends are not known yet; that of whole rows is in `loop.py`.

A model whose positions depend on the length of a text (`positions.need_length`) is not for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compat.families.base import Family
from compat.stream.chunk import Chunk
from compat.stream.loop import warn_that_it_grows
from compat.stream.token_ids import TokenIds


def stream_texts(
    backbone: PreTrainedModel,
    family: Family,
    texts: Sequence[TokenIds],
    rows: Tensor,
    vertical_chunk_size: int,
) -> Iterator[Chunk]:
    """Run texts chunk by chunk through all layers, and carry the state from chunk to chunk.

    On an accelerator the texts go side by side. On a CPU, where a token takes about the same time
    in any batch, they go one after the other, so that one window of text is held.

    Args:
        backbone: The model without its head.
        family: How its state is carried.
        texts: The token ids.
        rows: (n,) int64, the row of the batch that each text is, on the model's device.
        vertical_chunk_size: Tokens in a chunk; 1 is run as 2.

    Yields:
        A `Chunk` for each step; a text without a token is in none.
    """
    size = max(vertical_chunk_size, 2)
    if rows.device.type != "cpu":
        yield from _run(backbone, family, texts, rows, size)
        return
    for at, text in enumerate(texts):
        yield from _run(backbone, family, [text], rows[at : at + 1], size)


@torch.inference_mode(False)  # A state that is made in one call may be used in another's mode.
@torch.no_grad()
def _run(
    backbone: PreTrainedModel,
    family: Family,
    texts: Sequence[TokenIds],
    rows: Tensor,
    size: int,
) -> Iterator[Chunk]:
    """`stream_texts` of some texts as one batch, which each leaves at its end."""
    if family.grows:
        warn_that_it_grows(str(backbone.config.model_type))
    start = 0
    state: Any = None
    while True:
        taken = [text.take(size) for text in texts]
        alive = [at for at, ids in enumerate(taken) if ids]
        if not alive:
            return
        if len(alive) < len(texts):
            kept = torch.tensor(alive, device=rows.device)
            texts, taken = [texts[at] for at in alive], [taken[at] for at in alive]
            rows = rows[kept]
            if state is not None:
                state = family.select_rows(state, kept)
        lengths = torch.tensor([len(ids) for ids in taken], device=rows.device)
        tokens = padded(taken, start).to(rows.device)
        hidden, state = family.forward(backbone, tokens, start, state)
        yield Chunk(start, rows, lengths, hidden)
        del hidden  # The next chunk's hidden states must not come on top of this one's.
        start += size


def padded(taken: Sequence[list[int]], start: int) -> Tensor:
    """The ids as rows, (n, width) int64, with zeros behind them.

    Released models take another path for a single token that continues a text: there are two.
    """
    width = max(max(map(len, taken)), 2 if start else 1)
    tokens = torch.zeros(len(taken), width, dtype=torch.int64)
    for row, ids in zip(tokens, taken, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return tokens
