"""The embedder that is used when no model is named: a small Mamba2 in this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

FOLDER = Path(__file__).parent
WEIGHTS_LABEL = "trained on English documentation; its limits are in compat/default_model/README.md"


def load_default_model(**kwargs: Any) -> SentenceTransformer:
    """Load the default embedder: a Mamba2 with mean pooling and vectors of 256 numbers, of norm 1.

    The state of the caller's random number generators does not change.

    Args:
        **kwargs: Passed on to `SentenceTransformer`, such as `device` or `model_kwargs`.
    """
    with torch.random.fork_rng(devices=[]):  # transformers draws while it loads weights.
        return SentenceTransformer(str(FOLDER), **kwargs)
