"""Measure every family of models: `python -m ci.tables.families [--readme]`.

The models are the tests' tiny ones, with random weights, in float32. A batch is read through the
model's own cache by the released library, and by compat, in chunks of several tokens and a last
chunk of one token, without padding and with padding on the left. Each row is compared with itself
alone in one pass. The exit status is 1 if compat is wrong anywhere.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

import compat
from ci.tables import markers
from compat.families.lookup import FAMILIES

TESTS = Path(__file__).parents[2] / "tests"
SIZES = [7, 7, 7, 7, 7, 1]
Read = Callable[[PreTrainedModel, Tensor, list[int]], Tensor]
NO_PADDING, LEFT_PADDING = [0, 0, 0], [0, 3, 16]


def in_chunks(
    model: PreTrainedModel, ids: Tensor, left: list[int], right: Sequence[int] = NO_PADDING
) -> Tensor:
    """Return compat's hidden states, (batch, seqlen, hidden_size), of rows with this padding."""
    columns = torch.arange(ids.shape[1])
    ends = ids.shape[1] - torch.tensor(right)[:, None]
    mask = (columns >= torch.tensor(left)[:, None]) & (columns < ends)
    chunks = compat.iter_chunks(
        model, input_ids=ids, attention_mask=mask, vertical_chunk_size=SIZES[0]
    )
    return torch.cat([hidden for _, hidden in chunks], 1)


@torch.no_grad()
def error(read: Read, model: PreTrainedModel, left: list[int]) -> float:
    """Return the largest absolute error over the tokens of a batch.

    It is infinite where the batch cannot be read: the model raises, returns no state to continue
    from, or hidden states of another shape.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (len(left), sum(SIZES)), generator=generator)
    alone = [model(row[None, n:], use_cache=False)[0][0] for row, n in zip(ids, left, strict=True)]
    try:
        found = read(model, ids, left)
    except (AssertionError, AttributeError, RuntimeError):
        return float("inf")
    if found.shape[:2] != ids.shape:
        return float("inf")
    pairs = zip(found, alone, left, strict=True)
    return max(float((row[n:] - wanted).abs().max()) for row, wanted, n in pairs)


def verdict(plain: float, padded: float, right: float) -> str:
    """Return the verdict on the two errors, without and with padding, in words."""
    if max(plain, padded) <= right:
        return f"{max(plain, padded):.0e}"
    found, where = (plain, "") if plain > right else (padded, " with padding")
    return f"**fails**{where}" if found == float("inf") else f"**wrong**{where}, {found:.1g}"


def main(into_file: bool = False) -> int:
    """Print the table as Markdown, write it if asked to, and return the exit status."""
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".* has attention layers")
    torch.set_num_threads(1)
    sys.path.append(str(TESTS))
    tiny_model: Any = importlib.import_module("support.families").tiny_model
    released: Any = importlib.import_module("tests.laws.test_released").in_chunks
    right: float = importlib.import_module("support.tolerances").CHUNKED[torch.float32]

    ways: list[Read] = [
        # A mask is given only where there is padding.
        lambda model, ids, left: released(model, ids, SIZES, left if any(left) else None),
        in_chunks,
    ]

    status = 0
    lines = [
        "| model type | released, in chunks | with compat | state that grows with the text |",
        "|---|---|---|---|",
    ]
    print(*lines, sep="\n", flush=True)
    # Families without attention come first.
    for name, family in sorted(FAMILIES.items(), key=lambda item: (item[1].grows, item[0])):
        model = tiny_model(name)
        cells = []
        for read in ways:
            errors = [error(read, model, left) for left in (NO_PADDING, LEFT_PADDING)]
            cells.append(verdict(errors[0], errors[1], right))
        status |= max(errors) > right
        grows = "keys and values of attention" if family.grows else "no"
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {grows} |")
        print(lines[-1], flush=True)
    if into_file:
        markers.put("families", "\n".join(lines), markers.MODELS)
    return int(status)


if __name__ == "__main__":
    raise SystemExit(main("--readme" in sys.argv[1:]))
