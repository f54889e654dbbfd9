"""Measure time and peak memory on a GPU, over the length of the text: `python -m ci.bench.gpu`.

The model is a Mamba2 of 130M parameters with random weights, batch 1, in bfloat16. It reads the
text in a full pass, in chunks through the fused path of compat, and in chunks through transformers'
own path. Medians are taken over rounds in alternation.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from transformers import AutoModel, Mamba2Config, PreTrainedModel

import compat
from compat.families import mamba2

ROUNDS = 5


def make_model(layers: int, hidden_size: int, device: str) -> PreTrainedModel:
    """Make a Mamba2 with random weights; 24 layers of 768 give the shape of mamba2-130m."""
    config = Mamba2Config(
        num_hidden_layers=layers,
        hidden_size=hidden_size,
        num_heads=hidden_size * 2 // 64,
        n_groups=1,
        rescale_prenorm_residual=False,
    )
    with torch.device(device):
        model: PreTrainedModel = AutoModel.from_config(config, dtype=torch.bfloat16)
    model.eval()
    return model


def measure(work: Callable[[], object], device: str) -> tuple[float, float]:
    """Return the seconds, and the peak of newly allocated memory in MB; NaN without a GPU."""
    if device == "cpu":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start, float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    work()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, (torch.cuda.max_memory_allocated() - before) / 1e6


@torch.no_grad()
def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--vertical-chunk-size", type=int, default=512)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(10, 18)])
    options = parser.parse_args()
    model = make_model(options.layers, options.hidden_size, options.device)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU, not a GPU"
    print(f"{name}; torch {torch.__version__}; fused path: {compat.status().fused}")

    def in_chunks(ids: torch.Tensor) -> None:
        size = options.vertical_chunk_size
        compat.last_hidden_state(model, input_ids=ids, vertical_chunk_size=size)

    def in_chunks_unfused(ids: torch.Tensor) -> None:
        with mock.patch.object(mamba2, "_has_kernels", return_value=False):
            in_chunks(ids)

    ways: dict[str, Callable[[torch.Tensor], object]] = {
        "full": model,
        "chunks, fused": in_chunks,
        "chunks, unfused": in_chunks_unfused,
    }
    print("".join(f"{head:>24}" for head in ("tokens", *ways)))
    for length in options.lengths:
        ids = torch.randint(model.config.vocab_size, (1, length), device=options.device)
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for _ in range(1 + ROUNDS):
            for way, run in ways.items():
                try:
                    found[way].append(measure(partial(run, ids), options.device))
                except torch.OutOfMemoryError:
                    torch.cuda.empty_cache()
        cells = []
        for rows in found.values():
            # The first round compiles kernels, so it is left out.
            seconds, megabytes = zip(*rows[1:], strict=True) if rows[1:] else ((), ())
            cells.append(
                f"{statistics.median(seconds):.3f} s, {statistics.median(megabytes):,.0f} MB"
                if seconds
                else "out of memory"
            )
        print("".join(f"{cell:>24}" for cell in (f"{length:,}", *cells)), flush=True)


if __name__ == "__main__":
    main()
