"""Measure models: time and memory over the length of a text and over the chunk size.

Weights are random, in bfloat16; in a rehearsal they are tiny, in float32. A model reads in a full
pass, in chunks through the fused path of compat, and in chunks through transformers' own path.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

import compat
from ci.gpu import stand_in
from ci.gpu.graph import GraphedStep
from ci.gpu.place import Place
from ci.gpu.table import Record, Row, UnavailableError
from compat import ops
from compat.families import mamba2, mamba2_kernels
from compat.families.lookup import backbone_of
from compat.families.tiny_models import CONFIGS

SOURCE = "patched"
"""The kernels that the stage's process imports."""

VOCABULARY = 256  # A larger one would cost memory and no time.
CHUNK = 2048
# Layers, hidden size, heads of 64, groups: mamba2-130m, and the shapes of the published embedders.
MAMBA2 = {
    "mamba2-130m": (24, 768, 24, 1),
    "mamba2-1.3b": (48, 2048, 64, 1),
    "mamba2-7b": (64, 4096, 128, 8),
}
LENGTHS = [2**n for n in range(10, 19)]
SIZES, ROWS = [2**n for n in range(8, 14)], [1, 8, 32]
SIZED_TOKENS = 32_768  # The text of the tables over the chunk size.
EXACT_TOKENS = 131_072
# Beside Mamba2: flash-linear-attention's RWKV-7, and types of transformers, all of 12 x 768.
OTHERS: dict[str, dict[str, Any]] = {
    "rwkv7 (fla)": {"head_dim": 64, "intermediate_size": 3072},
    "xlstm": {"num_heads": 4},
    "falcon_h1": {
        "intermediate_size": 2048,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "mamba_d_ssm": 1536,
        "mamba_n_heads": 24,
        "mamba_d_head": 64,
        "mamba_n_groups": 1,
        "mamba_d_state": 128,
    },
}
TRANSFORMER = "gpt_neox"
Way = Callable[[PreTrainedModel, Tensor], None]
Ways = Mapping[str, Way]


@torch.no_grad()
def run(place: Place, record: Record, options: argparse.Namespace) -> None:
    """Measure all of it."""
    sys.path.append(f"{place.root / 'tests'}")
    with _kernels(place):
        print(f"fused path: {mamba2_kernels.probe().reason}")
        if options.graph:
            _graphs(place, record)
            return
        _launches(place, record)
        _exactness(place, record)
        _lengths(place, record)
        _sizes(place, record)
        _others(place, record)


@contextlib.contextmanager
def _kernels(place: Place) -> Iterator[None]:
    """In a rehearsal, put emulated and interpreted kernels where installed ones would be."""
    if not place.rehearsed:
        yield
        return
    torch.set_num_threads(1)
    packages: Any = importlib.import_module("support.fused_packages")
    # At its import a model takes the packages that are there, but its own path must be torch.
    importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    with packages.in_place(packages.kernels(*stand_in.load(SOURCE))):
        yield


def _lengths(place: Place, record: Record) -> None:
    lengths = [32, 64] if place.rehearsed else LENGTHS
    ways = ["full", "fused", "own", TRANSFORMER]
    columns = [f"{way} {unit}" for way in ways for unit in ("s", "MB")]
    makers = {
        f"{name}, {tokens:,} tokens": functools.partial(_length, place, name, tokens)
        for name in _shapes(place)
        for tokens in lengths
    }
    title = f"Over the length of a text, batch 1, chunks of {_chunk(place):,}"
    record.table(title, columns, makers)


def _length(place: Place, name: str, tokens: int) -> Row:
    """Measure each way on a text, and a transformer of the same size until it is out of memory."""
    ids, size = _ids(place, 1, tokens), _chunk(place)
    ways: Ways = {"full": _full, "fused": _chunked(size), "own": _unfused(size)}
    row = _measured(place, make(place, "mamba2", name), ways, ids)
    row |= _measured(place, make(place, TRANSFORMER, name), {TRANSFORMER: _full}, ids)
    return row | {"model": name, "tokens": tokens}


def _sizes(place: Place, record: Record) -> None:
    sizes, rows = ([16, 32], [1, 2]) if place.rehearsed else (SIZES, ROWS)
    tokens = 64 if place.rehearsed else SIZED_TOKENS
    makers = {
        f"{name}, batch {batch}, chunks of {size:,}": functools.partial(
            _sized, place, name, batch, size, tokens
        )
        for name in list(_shapes(place))[:2]
        for batch in rows
        for size in sizes
    }
    title = f"Over the chunk size, texts of {tokens:,} tokens, fused"
    record.table(title, ["fused s", "fused MB", "tokens/s"], makers)


def _sized(place: Place, name: str, batch: int, size: int, tokens: int) -> Row:
    ids, model = _ids(place, batch, tokens), make(place, "mamba2", name)
    row = _measured(place, model, {"fused": _chunked(size)}, ids)
    seconds = row["fused s"]
    return row | {"tokens/s": batch * tokens / seconds if isinstance(seconds, float) else "-"}


def _others(place: Place, record: Record) -> None:
    lengths = [32] if place.rehearsed else [4096, 32_768, 131_072]
    makers = {
        f"{name}, {tokens:,} tokens": functools.partial(_other, place, name, tokens)
        for name in OTHERS
        for tokens in lengths
    }
    columns = ["full s", "full MB", "chunks s", "chunks MB"]
    record.table(f"Other models, batch 1, chunks of {_chunk(place):,}", columns, makers)


def _other(place: Place, name: str, tokens: int) -> Row:
    ways: Ways = {"full": _full, "chunks": _chunked(_chunk(place))}
    return _measured(place, make(place, name, name), ways, _ids(place, 1, tokens))


def _exactness(place: Place, record: Record) -> None:
    """Hold chunks to the full pass, by the project's own bound on embeddings."""
    tokens = 96 if place.rehearsed else EXACT_TOKENS
    names = [*_shapes(place), *(() if place.rehearsed else OTHERS)]
    dtypes = [torch.float32] if place.rehearsed else [torch.bfloat16, torch.float32]
    makers = {
        f"{name}, {str(dtype).removeprefix('torch.')}": functools.partial(
            _exact, place, name, dtype, tokens
        )
        for name in names
        for dtype in dtypes
        if (name, dtype) != ("mamba2-7b", torch.float32)
    }
    title = f"Chunks of {_chunk(place):,} against the full pass, {tokens:,} tokens"
    record.table(title, ["largest error", "largest value", "cosine distance"], makers)


def _exact(place: Place, name: str, dtype: torch.dtype, tokens: int) -> Row:
    bound: float = importlib.import_module("support.tolerances").COSINE[dtype]
    model = make(place, name if name in OTHERS else "mamba2", name, dtype)
    ids = _ids(place, 1, tokens)
    full = model(input_ids=ids, use_cache=False).last_hidden_state
    worst, pooled = 0.0, torch.zeros(full.shape[-1], dtype=torch.float64, device=full.device)
    chunks = compat.iter_chunks(model, input_ids=ids, vertical_chunk_size=_chunk(place))
    for start, hidden in chunks:
        whole = full[:, start : start + hidden.shape[1]]
        worst = max(worst, (hidden.float() - whole.float()).abs().max().item())
        pooled += hidden[0].double().sum(0)
    similarity = torch.cosine_similarity(pooled, full[0].double().sum(0), dim=0)
    row: Row = {
        "largest error": worst,
        "largest value": full.abs().max().item(),
        "cosine distance": (1 - similarity).item(),
    }
    if not row["cosine distance"] <= bound:
        row["fault"] = f"the cosine distance of mean pooling is more than {bound}"
    return row


def _launches(place: Place, record: Record) -> None:
    makers = {
        f"{name}, chunk of {size:,}": functools.partial(_launched, place, name, size)
        for name in _shapes(place)
        for size in ([16] if place.rehearsed else [512, CHUNK])
    }
    columns = ["launches", "a layer", "kernels ms", "step ms", "idle"]
    record.table("Launches of a chunk step, fused, batch 1", columns, makers)


def _launched(place: Place, name: str, size: int) -> Row:
    """Count the kernels of a step, and compare their time with the step's."""
    model = make(place, "mamba2", name)
    backbone, family = backbone_of(model)
    ids = _ids(place, 1, size)
    state = family.forward(backbone, ids, 0, None)[1]

    def step() -> None:
        nonlocal state
        state = family.forward(backbone, ids, size, state)[1]

    step()
    seconds = min(_timed(place, step)[0] for _ in range(1 if place.rehearsed else 5))
    kind = torch.profiler.ProfilerActivity
    activities = [kind.CPU, *([] if place.rehearsed else [kind.CUDA])]
    with torch.profiler.profile(activities=activities) as profile:
        _timed(place, step)
    kernels = [one for one in profile.events() if one.device_type.name != "CPU"]
    busy = sum(one.device_time_total for one in kernels) / 1e6
    layers = model.config.num_hidden_layers
    return {
        "launches": len(kernels),
        "a layer": len(kernels) / layers,
        "kernels ms": 1e3 * busy,
        "step ms": 1e3 * seconds,
        "idle": f"{max(1 - busy / seconds, 0):.0%}",
    }


def _graphs(place: Place, record: Record) -> None:
    makers = {
        f"{name}, chunk of {size:,}": functools.partial(_graphed, place, name, size)
        for name in _shapes(place)
        for size in ([16] if place.rehearsed else [512, CHUNK])
    }
    columns = ["eager ms", "graph ms", "largest difference"]
    record.table("The chunk step as a CUDA graph, fused, batch 1", columns, makers)


def _graphed(place: Place, name: str, size: int) -> Row:
    """Compare a captured step with the same step as it is, on the same chunks."""
    if place.rehearsed:
        raise UnavailableError("a CUDA graph needs a GPU")
    model = make(place, "mamba2", name)
    backbone, family = backbone_of(model)
    graphed, state, start = GraphedStep(model, 1, size), None, 0
    worst = 0.0
    for ids in _ids(place, 1, 8 * size).split(size, 1):
        hidden, state = family.forward(backbone, ids, start, state)
        worst = max(worst, (hidden.float() - graphed(ids).float()).abs().max().item())
        start += size
    eager = statistics.median(
        _timed(place, lambda: family.forward(backbone, ids, start, state))[0] for _ in range(5)
    )
    fast = statistics.median(_timed(place, lambda: graphed(ids))[0] for _ in range(5))
    row: Row = {"eager ms": 1e3 * eager, "graph ms": 1e3 * fast, "largest difference": worst}
    return row | ({"fault": "the graph gives other numbers"} if worst else {})


def _shapes(place: Place) -> list[str]:
    return ["tiny"] if place.rehearsed else list(MAMBA2)


def _chunk(place: Place) -> int:
    return 16 if place.rehearsed else CHUNK


@functools.lru_cache(maxsize=2)
def make(
    place: Place, kind: str, like: str, dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """Make a model of a type, of the shape of one in MAMBA2 or OTHERS."""
    if place.rehearsed:
        dtype = torch.float32
    if kind.endswith("(fla)"):
        model = _fla(place, **OTHERS[kind])
    else:
        config = AutoConfig.for_model(kind, **_config(place, kind, like))
        with torch.device(place.device):
            model = AutoModel.from_config(config, dtype=dtype)
    made: PreTrainedModel = model.to(device=place.device, dtype=dtype).eval()
    return made


def _config(place: Place, kind: str, like: str) -> dict[str, Any]:
    if place.rehearsed:
        # The sizes are small for the interpreter.
        small = {"num_heads": 2, "head_dim": 8, "hidden_size": 8, "state_size": 8, "n_groups": 1}
        neox = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
        tiny = CONFIGS.get(kind, neox) | (small if kind == "mamba2" else {})
        return tiny | {"vocab_size": VOCABULARY}
    if kind in OTHERS:
        own = OTHERS[kind] | {"num_hidden_layers": 12, "hidden_size": 768}
        return own | {"vocab_size": VOCABULARY}
    layers, hidden, heads, groups = MAMBA2[like]
    common = {"hidden_size": hidden, "vocab_size": VOCABULARY}
    if kind == TRANSFORMER:
        attention = {"num_attention_heads": hidden // 64, "intermediate_size": 4 * hidden}
        size = {"num_hidden_layers": layers // 2, "max_position_embeddings": max(LENGTHS)}
        return common | attention | size
    own = {"num_hidden_layers": layers, "num_heads": heads, "head_dim": 64, "n_groups": groups}
    return common | own | {"state_size": 128, "rescale_prenorm_residual": False}


def _fla(place: Place, **own: Any) -> Any:
    """Make an RWKV-7 of flash-linear-attention."""
    if place.rehearsed or find_spec("fla") is None:
        # Its kernels ask for a driver where they are interpreted, too.
        raise UnavailableError("it needs flash-linear-attention and a GPU")
    models: Any = importlib.import_module("fla.models")
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "vocab_size": VOCABULARY}
    config = models.RWKV7Config(**own, **sizes)
    with torch.device(place.device):
        return models.RWKV7Model(config)


def _full(model: PreTrainedModel, ids: Tensor) -> None:
    model(input_ids=ids, use_cache=False)


def _chunked(size: int) -> Way:
    def read(model: PreTrainedModel, ids: Tensor) -> None:
        compat.last_hidden_state(model, input_ids=ids, vertical_chunk_size=size)

    return read


def _unfused(size: int) -> Way:
    """Return what reads in chunks through transformers' own path."""

    def read(model: PreTrainedModel, ids: Tensor) -> None:
        with mock.patch.object(mamba2, "_has_kernels", return_value=False), ops.using("released"):
            _chunked(size)(model, ids)

    return read


def _measured(place: Place, model: PreTrainedModel, ways: Ways, ids: Tensor) -> Row:
    """Time the ways in alternation; the first round, which compiles and tunes, is left out."""
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    rounds = 1 if place.rehearsed or ids.numel() > SIZED_TOKENS else 3
    for _ in range(1 + rounds):
        for way, read in ways.items():
            try:
                found[way].append(_timed(place, functools.partial(read, model, ids)))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
    row: Row = {}
    for way, rows in found.items():
        enough = len(rows) == 1 + rounds
        seconds, megabytes = zip(*rows[1:], strict=True) if enough else ((), ())
        row[f"{way} s"] = statistics.median(seconds) if enough else "no memory"
        row[f"{way} MB"] = max(megabytes) if enough and not place.rehearsed else "-"
    return row


def _ids(place: Place, rows: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=generator).to(place.device)


def _timed(place: Place, work: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds, and the peak of newly allocated memory in MB; NaN without a GPU."""
    if place.rehearsed:
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
