"""The settings and weights that decide the numbers of an output."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from sentence_transformers import SentenceTransformer


def settings_of(model: SentenceTransformer, name: str) -> dict[str, str]:
    """Say what decides the numbers, in words; chunk size and batch size do not.

    Nor does max_seq_length, unless texts are cut there: `Limit` says where they are.
    """
    try:
        release = version("vertical-chunking")
    except PackageNotFoundError:  # a checkout that is not installed
        release = "unknown"
    return {
        "model": name,
        "fingerprint": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "compat": release,
    }


def fingerprint(model: SentenceTransformer) -> str:
    """A hash of the modules' configuration, the vocabulary and a sample of every weight."""
    config: list[Any] = [model.prompts, model.default_prompt_name]
    config += [model.truncate_dim, model.tokenizer.get_vocab()]
    config += [(type(m).__name__, getattr(m, "get_config_dict", dict)()) for m in model]
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for key, weight in model.state_dict().items():
        flat = weight.detach().flatten()
        # Training moves every weight, so that a sample of each tensor tells models apart.
        sample = flat[:: max(1, len(flat) // 1024)].to("cpu", torch.float64)
        digest.update(f"{key} {tuple(weight.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()
