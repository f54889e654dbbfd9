"""Memory and time of a training step over the length of a text: `python -m ci.bench.training`.

A small Mamba2 of 4 layers of 128 (--layers, --width) embeds one text by its mean and takes the
gradient of a loss, each length in a process of its own: in one pass, in one pass with the layers
checkpointed, in chunks of 2,048 tokens and of the size that "auto" takes; beside it a GPT-NeoX of
half as many layers. The peak is counted above the model and its gradients; the time is that of the
second step. For chunks, what `compat.stream.training_size` computes stands beside it.

Last comes what it computes for 65,536 tokens of a model of 1.3B parameters, from one and two layers
of its width. `--readme` writes RESULTS.md, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import transformers
from transformers import PreTrainedModel

import compat
from ci.bench.__main__ import measured
from ci.bench.contenders import TRANSFORMER, Sizes, make_model
from ci.bench.measure import measure
from ci.tables import markers
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


def lines(sizes: Sizes, lengths: Sequence[int]) -> Iterator[list[str]]:
    """Yield a line of the table for each way and length."""
    small = make_model("mamba2", sizes, "float32").train()
    for name in (PASS, LAYERS, TRANSFORMER, CHUNKS, AUTO):
        for tokens in lengths:
            if tokens > LONGEST.get(name, tokens):
                yield [name, f"{tokens:,}", "", "not run", "", ""]
                continue
            found = measure(partial(prepare, name, sizes, tokens), step)
            size, wanted = "", ""
            if name in (CHUNKS, AUTO):
                size = f"{found.result:,}"
                wanted = f"{computed(small, tokens, found.result) / 1e6:,.0f} MB"
            peak = f"{found.peak_bytes / 1e6:,.0f} MB"
            yield [name, f"{tokens:,}", size, peak, wanted, f"{found.seconds:.1f} s"]


def large(tokens: int) -> str:
    """Say what a text takes in a model of 1.3B parameters, in bfloat16, as computed."""
    one, two = (
        training_size.costs(*backbone_of(make_model("mamba2", sizes, "bfloat16").train()))
        for sizes in (Sizes(n, LARGE.hidden_size, LARGE.state_size) for n in (1, 2))
    )
    token, state = (a + (LARGE.layers - 1) * (b - a) for a, b in zip(one, two, strict=True))
    rows, size = [], 256
    while size < tokens:
        gigabytes = training_size.memory(token, state, [tokens], size) / 1e9
        rows.append([f"{size:,}", f"{gigabytes:.1f} GB"])
        size *= 2
    rows.append(["one pass", f"{token * tokens / 1e9:,.0f} GB"])
    about = (
        f"Computed for 1.3B parameters (48 layers of 2,048) in bfloat16, {tokens:,} tokens: "
        f"{token / 1e6:.1f} MB of activations a token, {state / 1e6:.0f} MB of states a border."
    )
    table = markers.table(["chunks of", "above the model and its gradients"], rows, numbers=True)
    return markers.section(about, table)


def section(rows: Sequence[Sequence[str]], sizes: Sizes, smoke: bool) -> str:
    """Write the section of RESULTS.md."""
    about = (
        f"{measured('training', smoke)}: one step on one text by a Mamba2 of {sizes.layers} layers "
        f"of {sizes.hidden_size}, float32; beside it a GPT-NeoX of half as many layers. *Peak*: "
        "above the model and its gradients. *Computed*: by `compat.stream.training_size`."
    )
    head = ["", "tokens", "chunk", "peak", "computed", "time"]
    parts = [markers.table(head, rows, numbers=True), large(65_536)]
    return markers.section(about, *parts, smoke=smoke)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print each line as it comes."""
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16_384, 65_536])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--readme", action="store_true", help="write ci/bench/RESULTS.md, too")
    parser.add_argument("--smoke", action="store_true", help="two short lengths alone")
    options = parser.parse_args(arguments)
    sizes = Sizes(options.layers, options.width, state_size=64, lengths=(max(LONGEST.values()),))
    rows = []
    for row in lines(sizes, [512, 1024] if options.smoke else options.lengths):
        rows.append(row)
        print(*row, sep="  ", flush=True)
    text = section(rows, sizes, options.smoke)
    print(f"\n{text}")
    if options.readme:
        markers.put("training", text, markers.BENCH)


if __name__ == "__main__":
    main()
