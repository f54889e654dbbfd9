"""Measure RWKV-7 on this CPU: `python -m ci.bench.rwkv7`; needs `pip install ".[fla]"`.

A model of RWKV-7's 0.4B shape with four of its layers reads 2,048 tokens in chunks of 512, and is
compared with its matrix products alone, 512 tokens at a time: the floor. With `--peer`, and
`pip install rwkv`, that package reads the same random weights with its CPU strategies. The
contenders take turns, and the medians are shown.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import compat
from ci.bench.contenders import projections
from ci.bench.profile_layer import rounds
from compat import ops

TOKENS, CHUNK, LAYERS, WIDTH = 2048, 512, 4, 1024
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make(dtype: torch.dtype, layers: int = LAYERS, width: int = WIDTH) -> Any:
    """Make a model of fla with random weights, none of which is 0 or 1 as at a start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fla finds no GPU, and RWKV's authors have advice.
        from fla.models import RWKV7Config, RWKV7Model

        config = RWKV7Config(
            vocab_size=256,
            hidden_size=width,
            num_hidden_layers=layers,
            decay_low_rank_dim=64,
            a_low_rank_dim=64,
            v_low_rank_dim=32,
            gate_low_rank_dim=128,
        )
        torch.manual_seed(0)
        model = RWKV7Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3 / parameter.shape[-1] ** 0.5)
    return model.to(dtype)


def read(model: Any, backend: Any, ids: Tensor) -> Tensor:
    """Read through compat's chunk loop, and return the last hidden state."""
    with ops.using(backend):
        found: Tensor = compat.last_hidden_state(model, input_ids=ids, vertical_chunk_size=CHUNK)
    return found


def peer(model: Any, strategy: str) -> Callable[[Tensor], Tensor]:
    """Return a reader of the rwkv package with the model's weights, in chunks; it gives logits."""
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
    from rwkv.model import RWKV

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights"
        torch.save(_renamed(model), f"{path}.pth")
        theirs = RWKV(model=f"{path}", strategy=strategy)

    def run(ids: Tensor) -> Tensor:
        state: Any = None
        logits: Any = None
        for part in ids[0].split(CHUNK):
            logits, state = theirs.forward(part.tolist(), state)
        return torch.as_tensor(logits)

    return run


def _renamed(model: Any) -> dict[str, Tensor]:
    """Return the weights under the names of the rwkv package, with a head that is the identity."""
    first = {"w": "w", "a": "a", "v": "v", "g": "g"}
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        parts = name.replace("layers.", "blocks.").replace("embeddings", "emb").split(".")
        if parts[0] == "norm":
            parts[0] = "ln_out"
        if parts[0] == "blocks":
            norms = {"pre_norm": "ln0", "attn_norm": "ln1", "ffn_norm": "ln2"}
            parts[2] = norms.get(parts[2], {"attn": "att"}.get(parts[2], parts[2]))
            own = parts[3].removesuffix("_lora")
            if parts[3].endswith("_lora") and own in first:
                # x @ w1 -> @ w2 + w0
                order = {"0.weight": "1", "2.weight": "2", "2.bias": "0"}[".".join(parts[5:])]
                value = value if order == "0" else value.T.contiguous()
                value = value.view(1, 1, -1) if order == "0" else value
                parts[3:] = [f"{own}{order}"]
            elif parts[3].endswith("_proj"):
                names = {"r": "receptance", "k": "key", "v": "value", "o": "output"}
                parts[3] = names[parts[3][0]]
            elif parts[3] == "g_norm":
                parts[3] = "ln_x"
            elif parts[3] in ("x_k", "k_k", "k_a"):
                value = value.view(1, 1, -1)
        found[".".join(parts)] = value
    found["head.weight"] = torch.eye(model.config.hidden_size, dtype=model.dtype)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each dtype."""
    parser = argparse.ArgumentParser(prog="python -m ci.bench.rwkv7", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="of which the median is shown")
    parser.add_argument("--peer", action="store_true", help="beside the rwkv package")
    parser.add_argument("--smoke", action="store_true", help="a tiny model; the times say nothing")
    given = parser.parse_args(arguments)
    layers, width, tokens = (2, 128, 64) if given.smoke else (LAYERS, WIDTH, TOKENS)
    ids = torch.randint(3, 256, (1, tokens), generator=torch.Generator().manual_seed(0))
    print(f"{torch.get_num_threads()} threads; {ops.describe()}")
    for name, dtype in DTYPES.items():
        model = make(dtype, layers, width)
        floor = functools.partial(projections, model, tokens, CHUNK)
        work: dict[str, Callable[[], Any]] = {"floor, its matrix products": floor}
        for backend in ("native", "torch"):
            if backend == "torch" or ops.backend() == "native":
                work[backend] = functools.partial(read, model, backend, ids)
        if given.peer:
            strategy = "cpu fp32" if dtype == torch.float32 else "cpu bf16"
            theirs = peer(model, strategy)
            work[f"rwkv, {strategy}"] = functools.partial(theirs, ids)
            difference = theirs(ids).float() - read(model, "torch", ids)[0].float()
            print(f"largest difference from the rwkv package: {difference.abs().max():.2g}")
        with torch.no_grad():
            taken = rounds(work, given.rounds)
        found = {name: statistics.median(seconds) for name, seconds in taken.items()}
        first = next(iter(found.values()))
        print(
            f"\n{tokens} tokens, {layers} layers of {width}, {name}: seconds, and times the floor"
        )
        for contender, value in found.items():
            print(f"{contender:34} {value:8.3f} {value / first:6.2f}")


if __name__ == "__main__":
    main()
