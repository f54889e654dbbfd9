"""The choice of rows that are run together: no token is lost, and no other choice is cheaper."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.families import tiny_model, tokens
from support.tolerances import CHUNKED, error

import compat
from compat.families.lookup import backbone_of
from compat.stream.rows import RUN, batches, windows


def cost(lengths, batch, parts):
    """Return the tokens that are run for a batch, with padding, plus the cost of its runs."""
    longest = max(lengths[row] for row in batch)
    ends = [next(end for _, end in parts if end >= lengths[row]) for row in batch]
    runs = sum(start < longest for start, _ in parts)
    return sum(min(end, longest) for end in ends) + RUN * runs


def partitions(items):
    """Yield every way to put items into batches."""
    if not items:
        yield []
        return
    first, *rest = items
    for partition in partitions(rest):
        yield [[first], *partition]
        for index, batch in enumerate(partition):
            yield [*partition[:index], [first, *batch], *partition[index + 1 :]]


@given(lengths=st.lists(st.integers(0, 700), min_size=1, max_size=6), size=st.integers(2, 300))
def test_no_other_choice_is_cheaper(lengths, size):
    parts = windows(max(max(lengths), 1), size)
    found = [batch.tolist() for batch in batches(torch.tensor(lengths), parts)]
    rows = [row for row, length in enumerate(lengths) if length]
    assert sorted(row for batch in found for row in batch) == rows
    assert all(batch == sorted(batch) for batch in found)
    best = min(sum(cost(lengths, b, parts) for b in choice) for choice in partitions(rows))
    assert sum(cost(lengths, batch, parts) for batch in found) == best


def test_a_row_is_run_to_its_end_and_not_to_the_end_of_the_chunk():
    """Expect hardly more tokens to be run than rows of very different lengths have."""
    model = tiny_model("mamba2")
    lengths = torch.tensor([300, 513, 1100])
    mask = torch.arange(1100) < lengths[:, None]
    ids = tokens(3, 1100)
    run = []
    original = model.forward

    def spy(**kwargs):
        run.append(kwargs["input_ids"].numel())
        return original(**kwargs)

    model.forward = spy
    backbone_of(model)  # A model with a forward of its own is compared once, before this.
    run.clear()
    found = compat.last_hidden_state(
        model, input_ids=ids, attention_mask=mask, vertical_chunk_size=512
    )
    assert sum(run) == 300 + 514 + 1100  # A single token is run with one of padding.
    for row, length in enumerate(lengths):
        [alone] = model(input_ids=ids[row : row + 1, :length]).last_hidden_state[:, -1]
        assert error(found[row], alone) <= CHUNKED[torch.float32]
