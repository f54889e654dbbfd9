"""Time of `encode` on short texts: `python -m ci.bench.short_texts [--readme]`.

1,000 texts of 16 to 64 tokens, in batches of 32, by models with random weights in the bundled
model's pipeline. Three times take turns: all of `encode`, of it the model's own (its runs through
all layers), and the floor: the matrix products of its linear layers, on each batch's tokens at
once. What `encode` costs beside the model is tokenizing, Python and pooling; the goal is 10 %.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
import transformers

import compat
from ci import corpus
from ci.bench.__main__ import measured
from ci.bench.contenders import HYBRID, SMOKE, Sizes, make_model, projections
from ci.tables import markers
from compat.default_model import load_default_model
from compat.families.lookup import backbone_of

BATCH, CHUNK = 32, 512
MODELS = {"Mamba2 130M": "mamba2", "four layers of Qwen3.5 0.8B": HYBRID}


def texts_of(tokenizer: Any, count: int) -> list[str]:
    """Cut texts of 16 to 64 tokens out of the corpus, in no order of length."""
    ids = tokenizer(corpus.text_of_length(300 * count), verbose=False)["input_ids"]
    lengths = torch.randint(14, 62, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    texts, start = [], 0
    for length in lengths:
        texts.append(tokenizer.decode(ids[start : start + length], skip_special_tokens=True))
        start += length
    return texts


def within(model: Any, encode: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds of a call of `encode`, and those of the model's runs in it."""
    family = type(backbone_of(model.transformers_model)[1])
    released, own = family.forward, [0.0]

    def forward(*args: Any) -> Any:
        start = time.perf_counter()
        found = released(*args)
        own[0] += time.perf_counter() - start
        return found

    with mock.patch.object(family, "forward", forward):
        start = time.perf_counter()
        encode()
        return time.perf_counter() - start, own[0]


def measure(name: str, dtype: str, count: int, sizes: Sizes, rounds: int) -> list[str]:
    """Return a line of the table."""
    model: Any = load_default_model(device="cpu")
    vocabulary = model.transformers_model.config.vocab_size
    model[0].model = make_model(MODELS[name], sizes, dtype, vocabulary)
    texts = texts_of(model.tokenizer, count)
    tokens = sum(len(ids) for ids in model.tokenizer(texts)["input_ids"])

    def encode() -> object:
        return model.encode(texts, batch_size=BATCH, vertical_chunk_size=CHUNK)

    encode()
    wholes, beside, over = [], [], []
    for _ in range(rounds):
        whole, own = within(model, encode)
        start = time.perf_counter()
        with torch.no_grad():
            projections(model[0].model, tokens, BATCH * tokens // count)
        floor = time.perf_counter() - start
        wholes.append(whole)
        beside.append(100 * (whole / own - 1))
        over.append(whole / floor)
    medians = [statistics.median(each) for each in (wholes, over, beside)]
    return [name, dtype, f"{medians[0]:.1f} s", f"{medians[1]:.2f}", f"{medians[2]:.0f} %"]


def section(rows: Sequence[Sequence[str]], count: int, smoke: bool) -> str:
    """Write the section of RESULTS.md."""
    about = (
        f"{measured('short_texts', smoke)}: {count:,} texts of 16 to 64 "
        f"tokens, {BATCH} at a time. *Over the floor*: over the model's matrix products. *Beside "
        "the model*: what tokenizing, Python and pooling take more than the model alone; the goal "
        "is 10 %."
    )
    head = ["model", "dtype", "encode", "over the floor", "beside the model"]
    return markers.section(about, markers.table(head, rows), smoke=smoke)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table as it grows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--readme", action="store_true", help="write ci/bench/RESULTS.md, too")
    parser.add_argument("--smoke", action="store_true", help="narrow models, few texts, a round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    count, sizes, rounds = (64, SMOKE, 1) if options.smoke else (1000, Sizes(), options.rounds)
    rows = []
    with compat.vertical_chunking():
        for name in MODELS:
            for dtype in ("float32", "bfloat16"):
                rows.append(measure(name, dtype, count, sizes, rounds))
                print(*rows[-1], sep="  ", flush=True)
    text = section(rows, count, options.smoke)
    print(f"\n{text}")
    if options.readme:
        markers.put("short-texts", text, markers.BENCH)


if __name__ == "__main__":
    main()
