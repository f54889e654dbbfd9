"""Memory and time of a training step over the length of a text: `python -m ci.bench.training`.

A small Mamba2 of 4 layers of 128 (--layers, --width) embeds one text by its mean and takes the
gradient of a loss, each length in a process of its own: in one pass, in one pass with the layers
checkpointed, in chunks of 2,048 tokens and of the size that "auto" takes; beside it a GPT-NeoX of
as many layers. The peak is counted above the model and its gradients; the time is that of the
second step. For chunks, what `compat.stream.training_size` computes stands beside it.

Last comes what it computes for 65,536 tokens of a model of 1.3B parameters, from one and two layers
of its width.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import compat
from ci.bench.contenders import TRANSFORMER, Sizes, make_model
from ci.bench.measure import measure
from compat.families.gradients import run
from compat.families.lookup import backbone_of
from compat.stream import training_size

PASS, LAYERS, CHUNKS, AUTO = "one pass", "layers checkpointed", "chunks of 2,048", "auto"
# The longest text of each, where it would take more than a machine of 16 GB has, or too long.
LONGEST = {PASS: 16_384, LAYERS: 16_384, TRANSFORMER: 8192}
# llama-embed-mamba2-1.3b: 48 layers of 2,048.
LARGE = Sizes(layers=48, hidden_size=2048, state_size=128)

Step = tuple[PreTrainedModel, str, int]


def prepare(name: str, sizes: Sizes, tokens: int) -> Step:
    """Make a model, and do a step on a text of two chunks."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = make_model("gpt_neox" if name == TRANSFORMER else "mamba2", sizes, "float32").train()
    if name == LAYERS:
        model.activation_checkpointing_enable()
    step((model, name, 600))
    return model, name, tokens


def step(subject: Step) -> int:
    """Take the gradients of one text; returns the chunk size, or the length for one pass."""
    model, name, tokens = subject
    ids = torch.randint(256, (1, tokens), generator=torch.Generator().manual_seed(0))
    size = tokens
    if name in (CHUNKS, AUTO):
        size = 2048 if name == CHUNKS else leanest(model, tokens)
        embedding = compat.pooled(model, input_ids=ids, vertical_chunk_size=size)
    elif name == PASS:  # On the same ops as the chunks.
        embedding = run(*backbone_of(model), ids, 0, None)[0].mean(1)
    else:
        embedding = model(input_ids=ids, use_cache=False).last_hidden_state.mean(1)
    embedding.square().sum().backward()
    return size


def leanest(model: PreTrainedModel, tokens: int) -> int:
    """Return the size that "auto" takes."""
    return training_size.leanest(*backbone_of(model), torch.tensor([tokens]))


def computed(model: PreTrainedModel, tokens: int, size: int) -> int:
    """Return the bytes that a step in chunks should take."""
    return training_size.memory(*training_size.costs(*backbone_of(model)), [tokens], size)


def table(sizes: Sizes, lengths: list[int]) -> None:
    """Print a line for each way and length."""
    print(f"{'':22}{'tokens':>9}{'chunk':>9}{'peak MB':>10}{'computed':>10}{'s':>8}")
    small: Any = make_model("mamba2", sizes, "float32").train()
    for name in (PASS, LAYERS, TRANSFORMER, CHUNKS, AUTO):
        for tokens in lengths:
            if tokens > LONGEST.get(name, tokens):
                print(f"{name:22}{tokens:9,}{'not run':>19}", flush=True)
                continue
            found = measure(partial(prepare, name, sizes, tokens), step)
            size = found.result
            in_chunks = name in (CHUNKS, AUTO)
            wanted = f"{computed(small, tokens, size) / 1e6:10,.0f}" if in_chunks else " " * 10
            print(
                f"{name:22}{tokens:9,}{size:9,}{found.peak_bytes / 1e6:10,.0f}{wanted}"
                f"{found.seconds:8.1f}",
                flush=True,
            )


def of_a_large_model(tokens: int) -> str:
    """Say what a text takes in a model of 1.3B parameters, in bfloat16."""
    one, two = (
        training_size.costs(*backbone_of(make_model("mamba2", sizes, "bfloat16").train()))
        for sizes in (Sizes(n, LARGE.hidden_size, LARGE.state_size) for n in (1, 2))
    )
    token, state = (a + (LARGE.layers - 1) * (b - a) for a, b in zip(one, two, strict=True))
    lines = [
        f"1.3B, bfloat16, {tokens:,} tokens: {token / 1e6:.1f} MB of activations a token, "
        f"{state / 1e6:.0f} MB of states a border"
    ]
    size = 256
    while size < tokens:
        gigabytes = training_size.memory(token, state, [tokens], size) / 1e9
        lines.append(f"  chunks of {size:6,}: {gigabytes:6.1f} GB")
        size *= 2
    return "\n".join([*lines, f"  in one pass:      {token * tokens / 1e9:6,.0f} GB"])


def main() -> None:
    """Measure, and print each line as it comes."""
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16_384, 65_536])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    options = parser.parse_args()
    sizes = Sizes(options.layers, options.width, state_size=64, lengths=(max(LONGEST.values()),))
    table(sizes, options.lengths)
    print(of_a_large_model(65_536))


if __name__ == "__main__":
    main()
