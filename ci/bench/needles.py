"""Train on answers that lie far back: `python -m ci.bench.needles [--readme]`, 11 minutes.

A text of 8,192 tokens names, once and in its first half, who it is about; it mentions other names
all along. A small Mamba2 embeds texts and queries by their last token, and is trained from the same
weights on the same texts in three ways: with the gradients of one pass (`compat.pooled`, in
chunks), with gradients that end where the last quarter begins, and on texts cut to 512 tokens. Then
each query looks for its text among 256 that were kept. Prints each line as it comes, and two
tables, which `--readme` also puts into NEEDLES.md.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import Mamba2Config, Mamba2Model, PreTrainedModel

import compat
from ci.bench.__main__ import machine
from ci.tables import markers
from compat.families.gradients import run
from compat.families.lookup import backbone_of

# Token ids: words without a meaning, the two halves of a name, and what tells what a text is.
WORDS, HALVES = 64, 16
NAMES = HALVES * HALVES
TELL, SAID, ASK, END = range(WORDS + 2 * HALVES, WORDS + 2 * HALVES + 4)
SLOT = 128
"""Tokens in which a name stands once."""

EXACT, TRUNCATED, CUT = "exact gradients", "truncated gradients", "texts cut to {cut:,}"
WHOLE, START = "the same, reading all", "the start"
AGAIN = TRUNCATED + ", {times} times the steps"
_SHARPNESS = 10.0
_PLACES = 4


@dataclass(frozen=True)
class Stage:
    """Steps of training on texts of one length."""

    length: int
    steps: int
    batch: int


@dataclass(frozen=True)
class Scale:
    """Sizes of what is trained and measured."""

    width: int = 32
    state: int = 16
    chunk: int = 2048  # Of exact gradients; of no consequence for the result.
    cut: int = 512
    share: int = 4  # Truncated gradients are those of the last such part of a text.
    times: int = 3
    growing: tuple[Stage, ...] = (
        Stage(256, 240, 32),
        Stage(512, 30, 32),
        Stage(1024, 20, 16),
        Stage(2048, 16, 16),
        Stage(4096, 12, 16),
        Stage(8192, 12, 16),
    )
    short: tuple[Stage, ...] = (Stage(256, 240, 32), Stage(512, 30, 32))
    long: tuple[Stage, ...] = (Stage(8192, 24, 16),)
    lengths: tuple[int, ...] = (8192, 16_384, 32_768)
    threads: int = 1  # A model as small as this gains nothing from a second one.


_STAGE = (Stage(256, 2, 2),)
SMOKE = Scale(16, 8, 4096, 128, 4, 2, _STAGE, _STAGE, _STAGE, lengths=(256, 512))


@dataclass(frozen=True)
class Found:
    """The places of the right texts, of one model at one length.

    Attributes:
        length: Tokens in a text.
        ranks: Of each query's own text, from 1 on; the needles lie one behind the other.
    """

    length: int
    ranks: list[int]

    def recall(self, part: slice = slice(None)) -> float:
        """Return the share of queries that found their text first."""
        return statistics.mean(rank == 1 for rank in self.ranks[part])

    def reciprocal(self) -> float:
        """Return the mean reciprocal rank."""
        return statistics.mean(1 / rank for rank in self.ranks)


@dataclass(frozen=True)
class Line:
    """A model of a table: how it was trained, and what it finds."""

    title: str
    seconds: float | None  # Of the CPU, in training; None where it is that of the line before.
    loss: float | None
    found: list[Found]


# The texts.


def names(which: Tensor) -> Tensor:
    """Return the two tokens of each name, (batch, 2); `which` is (batch,), less than 256."""
    first, second = which // HALVES, which % HALVES
    return torch.stack([WORDS + first, WORDS + HALVES + second], 1)


def queries() -> Tensor:
    """Return a query for each name, (256, 4)."""
    own = names(torch.arange(NAMES))
    return torch.cat([torch.full((NAMES, 1), ASK), own, torch.full((NAMES, 1), END)], 1)


def texts(
    which: Tensor, length: int, generator: torch.Generator, slots: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Make a text for each name.

    Random words, with a random name in each slot of 128 tokens, behind a token SAID. In one slot of
    the first half it is TELL and the name of the text instead. Nothing else depends on that name.

    Args:
        which: (batch,) int64, the names.
        length: A multiple of 128, and 256 at least.
        generator: Of the random numbers.
        slots: (batch,), the slot that tells; random ones by default.

    Returns:
        The texts, (batch, length), and where TELL stands in each, (batch, 1).
    """
    rows, count = len(which), length // SLOT
    tokens = torch.randint(WORDS, (rows, length), generator=generator)
    # No name covers the text's last token.
    offsets = torch.randint(SLOT - 3, (rows, count), generator=generator)
    at = offsets + SLOT * torch.arange(count)
    others = names(torch.randint(NAMES, (rows * count,), generator=generator))
    tokens.scatter_(1, at, SAID)
    for place, half in enumerate(others.view(rows, count, 2).unbind(2), 1):
        tokens.scatter_(1, at + place, half)
    if slots is None:
        slots = torch.randint(count // 2, (rows,), generator=generator)
    needle = at.gather(1, slots[:, None])
    tokens.scatter_(1, needle, TELL)
    tokens.scatter_(1, needle + torch.tensor([[1, 2]]), names(which))
    tokens[:, -1] = END
    return tokens, needle


# The model, and three ways to embed with gradients.


def make_model(scale: Scale, seed: int) -> Mamba2Model:
    """Make a Mamba2 of one layer whose heads forget, at first, in 100 to 1,000,000 tokens."""
    torch.manual_seed(seed)
    config = Mamba2Config(
        num_hidden_layers=1,
        hidden_size=scale.width,
        num_heads=scale.width // 8,
        head_dim=16,
        state_size=scale.state,
        n_groups=1,
        vocab_size=END + 1,
        rescale_prenorm_residual=False,
    )
    model: Mamba2Model = Mamba2Model(config).train()
    with torch.no_grad():
        for layer in model.layers:
            mixer: Any = layer.mixer
            heads = len(mixer.A_log)
            rates = torch.linspace(math.log(1e-3), math.log(1e-1), heads)
            mixer.A_log.copy_(rates[torch.randperm(heads)])
            steps = torch.linspace(math.log(1e-3), math.log(1e-1), heads).exp()
            mixer.dt_bias.copy_(steps.expm1().log())  # The softplus of which they are.
    return model


def exact(model: PreTrainedModel, tokens: Tensor, chunk: int) -> Tensor:
    """Embed rows, (batch, length), with the gradients of one pass."""
    found = compat.pooled(
        model, input_ids=tokens, pooling_mode="lasttoken", vertical_chunk_size=chunk
    )
    return normalize(found, dim=1)


def truncated(model: PreTrainedModel, tokens: Tensor, chunk: int) -> Tensor:
    """Embed rows with the gradients that end where the last chunk begins: its state is detached."""
    backbone, family = backbone_of(model)
    last = tokens.shape[1] - chunk
    with torch.no_grad():
        _, state = run(backbone, family, tokens[:, :last], 0, None)
    hidden, _ = run(backbone, family, tokens[:, last:], last, state)
    return normalize(hidden[:, -1], dim=1)


def cut(tokens: Tensor, length: int) -> Tensor:
    """Cut rows as max_seq_length does: the token at the end stays."""
    return torch.cat([tokens[:, : min(length, tokens.shape[1]) - 1], tokens[:, -1:]], 1)


def embed(model: PreTrainedModel, tokens: Tensor, way: str, scale: Scale) -> Tensor:
    """Embed texts in one of the three ways, (batch, width)."""
    if way == TRUNCATED:
        return truncated(model, tokens, tokens.shape[1] // scale.share)
    return exact(model, cut(tokens, scale.cut) if way == CUT else tokens, scale.chunk)


def train(
    model: PreTrainedModel, way: str, stages: Sequence[Stage], rate: float, scale: Scale, seed: int
) -> tuple[float, float]:
    """Train on each text against the queries of all names, as MultipleNegativesRankingLoss does.

    Returns:
        The seconds of the CPU, and the loss of the last ten steps.
    """
    start, losses = time.process_time(), list[float]()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
    every = [stage for stage in stages for _ in range(stage.steps)]
    for step, stage in enumerate(every):
        optimizer.param_groups[0]["lr"] = (
            rate * min(1, (step + 1) / 10) * (1 - 0.9 * step / len(every))
        )
        which = torch.randint(NAMES, (stage.batch,), generator=generator)
        tokens, _ = texts(which, stage.length, generator)
        found = embed(model, tokens, way, scale) @ exact(model, queries(), scale.chunk).T
        loss = cross_entropy(_SHARPNESS * found, which)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if stage is not every[min(step + 1, len(every) - 1)] or step + 1 == len(every):
            said = f"{way.format(cut=scale.cut)}, {stage.length:,} tokens"
            print(f"{said}: a loss of {losses[-1]:.2f}", flush=True)
    return time.process_time() - start, statistics.mean(losses[-10:])


@torch.no_grad()
def find(model: PreTrainedModel, scale: Scale, cut_to: int | None = None) -> list[Found]:
    """Look for the text of each name among those of all, at each length."""
    results = []
    asked = exact(model, queries(), scale.chunk)
    for length in scale.lengths:
        generator = torch.Generator().manual_seed(length)
        order = torch.randperm(NAMES, generator=generator)
        slots = torch.arange(NAMES) * (length // SLOT // 2) // NAMES
        rows = []
        for part in torch.arange(NAMES).split(16):
            tokens, _ = texts(order[part], length, generator, slots[part])
            rows.append(exact(model, cut(tokens, cut_to) if cut_to else tokens, scale.chunk))
        scores = asked[order] @ torch.cat(rows).T
        own = scores.diagonal()[:, None]
        # Texts that are as near as the right one come before it: all alike is nothing found.
        ranks = (scores >= own).sum(1).tolist()
        results.append(Found(length, ranks))
    return results


# The tables.


def compared(
    begin: PreTrainedModel, stages: Sequence[Stage], rate: float, scale: Scale, seed: int
) -> Iterator[Line]:
    """Train a copy of a model in each way; the lines come as they are made."""

    def lines(way: str, times: int = 1) -> list[Line]:
        model = copy.deepcopy(begin)
        longer = [Stage(s.length, s.steps * times, s.batch) for s in stages]
        seconds, loss = train(model, way, longer, rate, scale, seed)
        title = AGAIN.format(times=times) if times > 1 else way.format(cut=scale.cut)
        if way != CUT:
            return [Line(title, seconds, loss, find(model, scale))]
        whole = Line(WHOLE, None, None, find(model, scale))
        return [Line(title, seconds, loss, find(model, scale, scale.cut)), whole]

    ways = ((EXACT, 1), (TRUNCATED, 1), (CUT, 1), (TRUNCATED, scale.times))
    for way, times in ways:
        yield from lines(way, times)


def table(lines: Sequence[Line]) -> str:
    """Write lines as a table."""
    head = ["trained with", "CPU s", "loss", "tokens", "recall@1", "MRR"]
    parts = range(_PLACES)
    head += [f"{part}/{2 * _PLACES} to {part + 1}/{2 * _PLACES}" for part in parts]
    rows: list[list[str]] = []
    for line in lines:
        about = [line.title]
        about += [
            "" if x is None else f"{x:,.{n}f}" for x, n in ((line.seconds, 0), (line.loss, 2))
        ]
        for found in line.found:
            own = len(found.ranks) // _PLACES
            shares = [found.recall(slice(own * part, own * (part + 1))) for part in parts]
            numbers = [found.recall(), found.reciprocal(), *shares]
            rows.append([*about, f"{found.length:,}", *(f"{x:.2f}" for x in numbers)])
            about = [""] * len(about)
    return markers.table(head, rows, numbers=True)


def from_scratch(scale: Scale, seed: int) -> Iterator[Line]:
    """Train in each way from random weights, on longer and longer texts."""
    return compared(make_model(scale, seed), scale.growing, 1e-2, scale, seed)


def after_short(scale: Scale, seed: int) -> Iterator[Line]:
    """Train on short texts, and go on with long ones in each way."""
    model = make_model(scale, seed)
    seconds, loss = train(model, EXACT, scale.short, 1e-2, scale, seed)
    yield Line(START, seconds, loss, find(model, scale))
    yield from compared(model, scale.long, 5e-3, scale, seed + 1)


TABLES = {"scratch": from_scratch, "short": after_short}


def described(stages: Sequence[Stage]) -> str:
    """Say how many steps on texts of which length."""
    parts = [f"{s.length:,} ({s.steps} steps of {s.batch} texts)" for s in stages]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)


def section(name: str, lines: Sequence[Line], scale: Scale, seed: int) -> str:
    """Write a section of NEEDLES.md."""
    found, smoke = machine(scale.threads, scale == SMOKE), scale == SMOKE
    about = {
        "scratch": f"From random weights, on texts of {described(scale.growing)} tokens, one "
        f"length after the other. Truncated gradients are those of the last 1/{scale.share} of a "
        f"text, at each length: the needle is never in it. Where texts are cut to {scale.cut:,} "
        "tokens, shorter ones are whole.",
        "short": f"From one model (*{START}*), trained on whole texts of {described(scale.short)} "
        f"tokens; then on texts of {described(scale.long)} tokens. Truncated gradients are those "
        f"of the last 1/{scale.share} of a text.",
    }[name]
    made = (
        f"`python -m ci.bench.needles --only {name} --seed {seed}`, on "
        f"{datetime.now(UTC):%Y-%m-%d}, one thread of {found['cpu']}, Python {found['python']}, "
        f"torch {found['torch']}, transformers {found['transformers']}."
    )
    return markers.section(f"{about} {made}", table(lines), smoke=smoke)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, look for needles, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--readme", action="store_true", help="write ci/bench/NEEDLES.md, too")
    parser.add_argument("--smoke", action="store_true", help="two steps on short texts")
    parser.add_argument("--only", choices=[*TABLES], help="one of the two tables")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    scale, seed = SMOKE if options.smoke else Scale(), options.seed
    torch.set_num_threads(scale.threads)
    transformers.logging.set_verbosity_error()
    for name in [options.only] if options.only else TABLES:
        lines, text = list[Line](), ""
        for line in TABLES[name](scale, seed):
            lines.append(line)
            print(*table([line]).splitlines()[2:], sep="\n", flush=True)
            text = section(name, lines, scale, seed)
            if options.readme:  # What is found is kept, whatever comes.
                markers.put(name, text, markers.NEEDLES)
        print(f"\n{text}\n", flush=True)


if __name__ == "__main__":
    main()
