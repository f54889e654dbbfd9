"""Measure the parts of a layer of Mamba2 130M on this CPU: `python -m ci.bench.profile_layer`.

Each part runs alone, on inputs of the shapes that it has in a chunk; the parts take turns, and the
medians are shown. In the model a part may find its inputs in a cache, or not.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import linear, pad
from transformers import Mamba2Config, Mamba2Model

from compat import ops
from compat.families.lookup import FAMILIES
from compat.ops import mamba2


def parts(model: Mamba2Model, tokens: int) -> dict[str, Callable[[], Any]]:
    """Return the parts of a layer, and the layer as the chunk loop runs it, on so many tokens."""
    layer: Any = model.layers[0]
    mixer, dtype = layer.mixer, model.dtype
    hidden = torch.randn(1, tokens, model.config.hidden_size).to(dtype)
    projected = linear(hidden, mixer.in_proj.weight)
    gated = torch.randn(1, tokens, mixer.intermediate_size).to(dtype)
    z, inputs, _ = projected.split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], -1)
    ids = torch.randint(model.config.vocab_size, (1, tokens))
    family = FAMILIES["mamba2"]
    _, state = family.forward(model, ids, 0, None)
    shared: dict[str, Any] = {
        "conv1d_weight": mixer.conv1d.weight.squeeze(1),
        "conv1d_bias": mixer.conv1d.bias,
        "dt_bias": mixer.dt_bias,
        "A": -mixer.A_log.float().exp(),
        "D": mixer.D,
        "rmsnorm_weight": mixer.norm.weight,
        "headdim": mixer.head_dim,
        "norm_before_gate": False,
        "return_final_states": True,
    }

    def op(backend: ops.Backend) -> None:
        with ops.using(backend):
            mamba2.mamba_split_conv1d_scan_combined(projected, **shared)

    def convolve() -> None:
        before = mixer.conv_kernel_size - 1
        mamba2._convolve(
            pad(inputs, (0, 0, before, 0)).float(),
            shared["conv1d_weight"].float().t().contiguous(),
            mixer.conv1d.bias.float(),
            None,
        )

    def whole(backend: ops.Backend) -> None:
        with ops.using(backend):
            family.forward(model, ids, tokens, state)

    def gate() -> None:
        mamba2._gate(gated.float(), z.float(), mixer.norm.weight, 1e-5, 1, False)

    found: dict[str, Callable[[], Any]] = {
        "in_proj and out_proj (the floor)": lambda: (
            linear(hidden, mixer.in_proj.weight),
            linear(gated, mixer.out_proj.weight),
        ),
        "norm and residual": lambda: hidden + layer.norm(hidden),
        "op, torch": functools.partial(op, "torch"),
        "  of it the convolution": convolve,
        "  of it the gated norm": gate,
        "a model of one layer, torch": functools.partial(whole, "torch"),
        "a model of one layer, released": functools.partial(whole, "released"),
    }
    if ops.backend() == "native":
        found["op, native"] = functools.partial(op, "native")
        found["a model of one layer, native"] = functools.partial(whole, "native")
    return found


def rounds(work: dict[str, Callable[[], Any]], count: int) -> dict[str, list[float]]:
    """Run the parts in turn, once before they count, and return the seconds of each round."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(count + 1):
        for name, part in work.items():
            start = time.perf_counter()
            part()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each dtype."""
    parser = argparse.ArgumentParser(prog="python -m ci.bench.profile_layer", description=__doc__)
    parser.add_argument("--tokens", type=int, default=512, help="in a chunk (default 512)")
    parser.add_argument("--rounds", type=int, default=20, help="of which the median is shown")
    given = parser.parse_args(arguments)
    print(f"{torch.get_num_threads()} threads; {ops.describe()}")
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        config = Mamba2Config(
            vocab_size=256, hidden_size=768, num_hidden_layers=1, num_heads=24, state_size=128,
            n_groups=1, layer_norm_epsilon=1e-5,
        )  # fmt: skip
        model = Mamba2Model(config).eval().to(dtype)
        with torch.no_grad():
            taken = rounds(parts(model, given.tokens), given.rounds)
        found = {name: 1e3 * statistics.median(seconds) for name, seconds in taken.items()}
        floor = next(iter(found.values()))
        print(f"\n{given.tokens} tokens, {dtype}: milliseconds, and parts of the floor")
        for name, value in found.items():
            print(f"{name:34} {value:8.2f} {value / floor:6.2f}")


if __name__ == "__main__":
    main()
