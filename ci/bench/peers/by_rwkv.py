"""Read RWKV-7 with the rwkv package, on its CPU strategies."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ci.bench.contenders import RWKV7
from ci.bench.peers.common import Peer, Place, Read

STRATEGIES = {torch.float32: "cpu fp32", torch.bfloat16: "cpu bf16"}

_NAMES = {
    r"^embeddings\.": "emb.",
    r"^norm\.": "ln_out.",
    r"^layers\.": "blocks.",
    r"\.pre_norm\.": ".ln0.",
    r"\.attn_norm\.": ".ln1.",
    r"\.ffn_norm\.": ".ln2.",
    r"\.attn\.": ".att.",
    r"\.g_norm\.": ".ln_x.",
    r"\.r_proj\.": ".receptance.",
    r"\.k_proj\.": ".key.",
    r"\.v_proj\.": ".value.",
    r"\.o_proj\.": ".output.",
    # x @ w1, a function, @ w2 + w0
    r"_lora\.lora\.0\.weight$": "1",
    r"_lora\.lora\.2\.weight$": "2",
    r"_lora\.lora\.2\.bias$": "0",
}


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return fla's weights of an `RWKV7Model` under the names, and in the layout, of the package.

    The head, which fla's model without one lacks, is the embeddings.
    """
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        own = name
        for old, new in _NAMES.items():
            own = re.sub(old, new, own)
        turned = "_lora.lora." in name and value.ndim == 2
        found[own] = value.T.contiguous() if turned else value
    found["head.weight"] = found["emb.weight"]
    return found


def reader(model: PreTrainedModel, place: Place) -> Read:
    """Return the package's way of reading the model, in chunks, with the state between them."""
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
    path = place.scratch / "weights"
    torch.save(renamed(model.state_dict()), f"{path}.pth")
    with contextlib.redirect_stdout(io.StringIO()):  # It says what it loads.
        from rwkv.model import RWKV

        theirs = RWKV(model=f"{path}", strategy=STRATEGIES[model.dtype])

    def read(ids: Tensor) -> Tensor:
        state: Any = None
        logits: Any = None
        for part in ids[0].split(place.chunk):
            logits, state = theirs.forward(part.tolist(), state)
        found: Tensor = logits.float()
        return found

    return read


PEER = Peer("rwkv", "rwkv", frozenset({RWKV7}), True, reader)
