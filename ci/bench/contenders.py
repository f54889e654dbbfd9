"""The contenders of `ci.bench`: models with random weights, and ways to read a text with them."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import Linear
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModel, PreTrainedModel

import compat
from ci.bench.measure import measure
from compat.installed.recurrent_cache import state_argument, state_of
from compat.ops import using

FLOOR, NORMS, TRANSFORMER, RELEASED = "floor", "norms", "GPT-NeoX", "released"
FULL, BATCH = ", full pass", ", batch of 8"
HYBRID, RWKV7 = "qwen3_5_text", "rwkv7"
READERS = ("native", "torch", RELEASED)
"""What a model runs on: the ops of compat, on their kernels or in plain torch, or transformers."""

_VOCABULARY = 256  # A larger one would cost memory and no time.

Read = Callable[[int], int]
"""Reads texts of which the longest has so many tokens; returns the tokens of all of them."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of models and texts; the defaults are Mamba2 130M and its competitors."""

    layers: int = 24  # Of Mamba-1 and Mamba2; the other models have half as many.
    hidden_size: int = 768  # Of all models; a head of Mamba2 or of attention has 64.
    state_size: int = 128  # Of Mamba2.
    groups: int = 1  # The same.
    chunk: int = 512  # The vertical chunk size.
    text: int = 8192
    short: int = 4096  # A length for models whose released scan is slow.
    wide: int = 1024  # The hidden size of the hybrid with the gated delta rule, and of RWKV-7.
    lengths: tuple[int, ...] = (2048, 8192, 32_768, 131_072)  # Read once, with the memory measured.
    rounds: int = 3


SMOKE = Sizes(4, 128, 16, chunk=64, text=256, short=128, wide=128, lengths=(128, 256), rounds=1)


@dataclass(frozen=True)
class Contender:
    """A way to read, described in words that can be sent to another process."""

    name: str  # One of the constants above: a reader, perhaps with FULL or BATCH, or another.
    tokens: int  # The length of the longest text.
    rounds: int
    model: str = "mamba2"  # The model type; for a transformer, that of its opponent.
    dtype: str = "float32"


@dataclass
class Timing:
    """The result of a contender."""

    contender: str
    tokens: int  # The number in all texts of one round.
    seconds: list[float]  # One number for each round.
    peak_bytes: int | None = None  # Above the loaded model; None where others ran beside it.


def compete(contenders: list[Contender], sizes: Sizes, threads: int) -> list[Timing]:
    """Run contenders in turn, in one fresh process; measure the memory where one runs alone."""
    found = measure(functools.partial(_prepare, contenders, sizes, threads), _alternate)
    peak = found.peak_bytes if len(contenders) == 1 else None
    return [replace(timing, peak_bytes=peak) for timing in found.result]


def _prepare(
    contenders: list[Contender], sizes: Sizes, threads: int
) -> list[tuple[Contender, Read]]:
    """Make the models, and read a little with each."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    ready = [(contender, reader(contender, sizes)) for contender in contenders]
    # Where memory is measured, read less than a chunk: memory that a whole chunk leaves allocated
    # would not show in the peak.
    few = 16 if len(contenders) == 1 else 2 * sizes.chunk
    for contender, read in ready:
        read(min(few, contender.tokens))
    return ready


def _alternate(ready: list[tuple[Contender, Read]]) -> list[Timing]:
    timings = [Timing(contender.name, 0, []) for contender, _ in ready]
    for done in range(max(contender.rounds for contender, _ in ready)):
        for timing, (contender, read) in zip(timings, ready, strict=True):
            if done < contender.rounds:
                start = time.perf_counter()
                timing.tokens = read(contender.tokens)
                timing.seconds.append(time.perf_counter() - start)
    return timings


def reader(contender: Contender, sizes: Sizes) -> Read:
    """Make the contender's model, once in a process, and return its way of reading."""
    name = contender.name
    own = "gpt_neox" if name == TRANSFORMER else contender.model
    model = make_model(own, sizes, contender.dtype)
    ways: dict[str, Callable[[PreTrainedModel, int, int], int]] = {
        FLOOR: projections,
        NORMS: _norms,
        TRANSFORMER: _released_full,
        RELEASED: _released_in_chunks if own in ("mamba2", "xlstm", HYBRID) else _released_full,
    }
    rows = 8 if name.endswith(BATCH) else 1
    reading = functools.partial(ours, name.removesuffix(BATCH).removesuffix(FULL), rows)

    def read(tokens: int) -> int:
        with torch.no_grad():
            return ways.get(name, reading)(model, tokens, tokens if FULL in name else sizes.chunk)

    return read


@functools.cache
def make_model(
    model_type: str, sizes: Sizes, dtype: str, vocabulary: int = _VOCABULARY
) -> PreTrainedModel:
    """Make a model with random weights, by default of the shape of the published one."""
    if model_type == RWKV7:
        return _rwkv7(sizes.wide, dtype, vocabulary)
    hidden, heads = sizes.hidden_size, sizes.hidden_size // 64
    own: dict[str, dict[str, Any]] = {
        "mamba2": {"num_heads": 2 * heads, "n_groups": sizes.groups, "state_size": sizes.state_size}
        | {"head_dim": 64, "rescale_prenorm_residual": False},
        "mamba": {},
        "rwkv": {"context_length": sizes.text},
        "xlstm": {"num_heads": 4},
        HYBRID: _hybrid(sizes.wide),
        "gpt_neox": {"num_attention_heads": heads, "intermediate_size": 4 * hidden}
        | {"max_position_embeddings": max(sizes.lengths)},
    }
    layers = sizes.layers if model_type.startswith("mamba") else sizes.layers // 2
    common = {"num_hidden_layers": layers, "hidden_size": hidden, "vocab_size": vocabulary}
    config = AutoConfig.for_model(model_type, **common | own[model_type])
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModel.from_config(config, dtype=getattr(torch, dtype))
    model.eval()
    return model


def _rwkv7(hidden: int, dtype: str, vocabulary: int) -> PreTrainedModel:
    """Make four layers of RWKV-7 by fla, of the shape of 0.4B parameters where they are 1,024 wide.

    No weight is 0 or 1, as many are at the start of a training.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fla finds no GPU, and RWKV's authors have advice.
        from fla.models import RWKV7Config, RWKV7Model

        ranks = {f"{name}_low_rank_dim": hidden // 16 for name in ("decay", "a")}
        ranks |= {"v_low_rank_dim": hidden // 32, "gate_low_rank_dim": hidden // 8}
        config = RWKV7Config(
            vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=4, **ranks
        )
        torch.manual_seed(0)
        model: PreTrainedModel = RWKV7Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3 / parameter.shape[-1] ** 0.5)
    model.to(getattr(torch, dtype))
    return model


def _hybrid(hidden: int) -> dict[str, Any]:
    """Return the settings of Qwen3.5's four layers: three of the gated delta rule, one attention.

    Its shapes are those of Qwen3.5 0.8B, where the hidden size is 1,024.
    """
    heads = max(hidden // 64, 1)
    linear = {"num_key_heads": heads, "num_value_heads": heads}
    linear |= {"key_head_dim": 128, "value_head_dim": 128}
    return {f"linear_{name}": value for name, value in linear.items()} | {
        "hidden_size": hidden,
        "intermediate_size": 7 * hidden // 2,
        "num_hidden_layers": 4,
        "num_attention_heads": max(hidden // 128, 1),
        "num_key_value_heads": max(hidden // 512, 1),
        "head_dim": 256,
        "layer_types": [*["linear_attention"] * 3, "full_attention"],
    }


def _ids(rows: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, _VOCABULARY, (rows, tokens), generator=generator)


def ours(backend: Any, rows: int, model: PreTrainedModel, tokens: int, size: int) -> int:
    """Read through compat's chunk loop; each row is half as long as the one before it."""
    lengths = torch.tensor([max(tokens >> row, 1) for row in range(rows)])
    mask = torch.arange(tokens) < lengths[:, None]
    with using(backend):
        compat.last_hidden_state(
            model, input_ids=_ids(rows, tokens), attention_mask=mask, vertical_chunk_size=size
        )
    return int(lengths.sum())


def _released_full(model: PreTrainedModel, tokens: int, _size: int) -> int:
    model(input_ids=_ids(1, tokens), use_cache=False)
    return tokens


def _released_in_chunks(model: PreTrainedModel, tokens: int, size: int) -> int:
    state, name = None, state_argument(model.forward)
    for ids in _ids(1, tokens).split(size, 1):
        state = state_of(model(input_ids=ids, use_cache=True, **{name: state}))
    return tokens


def projections(model: PreTrainedModel, tokens: int, size: int) -> int:
    """Measure the floor: the products with the weights of all linear layers, and nothing else."""
    weights = [module.weight for module in model.modules() if isinstance(module, Linear)]
    for start in range(0, tokens, size):
        for weight in weights:
            linear(_inputs(min(size, tokens - start), weight), weight)
    return tokens


def _norms(model: PreTrainedModel, tokens: int, size: int) -> int:
    """Run the norms before the mixers, a part of a layer that is left as it was released."""
    layers: Any = model.layers
    for start in range(0, tokens, size):
        for layer in layers:
            layer.norm(_inputs(min(size, tokens - start), layer.norm.weight))
    return tokens


@functools.cache
def _random(tokens: int, channels: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(1, tokens, channels).to(dtype)


def _inputs(tokens: int, weight: Tensor) -> Tensor:
    """Return random inputs (1, tokens, channels) for a weight (..., channels), made once."""
    return _random(tokens, weight.shape[-1], weight.dtype)
