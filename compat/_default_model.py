"""The embedder that is used when no model is named: a small Mamba2 in `compat/default_model`."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModel

FOLDER = Path(__file__).parent / "default_model"
WEIGHTS = "model.safetensors"
SEED = 0

DEFAULT_MODEL_IS_TRAINED = (FOLDER / WEIGHTS).is_file()
"""Whether the folder holds weights; where it does not, they are drawn from `SEED`."""

WEIGHTS_LABEL = (
    "weights: trained"
    if DEFAULT_MODEL_IS_TRAINED
    else f"weights: random, from seed {SEED}: the embeddings carry no meaning yet"
)


def load_default_model(**kwargs: Any) -> SentenceTransformer:
    """Load the default embedder: Mamba2, last-token pooling, vectors of 256 numbers of norm 1.

    The same weights come out in every process, and the caller's random numbers are not touched.

    Args:
        **kwargs: Passed on to `SentenceTransformer`, such as `device` or `model_kwargs`.
    """
    # Not only the drawing: transformers draws random numbers while it loads weights, too.
    with torch.random.fork_rng(devices=[]):
        if DEFAULT_MODEL_IS_TRAINED:
            return SentenceTransformer(str(FOLDER), **kwargs)
        # With weights beside it the folder is a model like any other, and is loaded like one.
        with TemporaryDirectory() as folder:
            shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
            save_file(_random_weights(), Path(folder) / WEIGHTS, {"format": "pt"})
            return SentenceTransformer(folder, **kwargs)


def _random_weights() -> dict[str, torch.Tensor]:
    # Not torch.manual_seed, which would seed the caller's GPUs as well.
    torch.default_generator.manual_seed(SEED)
    config = AutoConfig.from_pretrained(FOLDER)
    with torch.device("cpu"):  # Whatever the default device is: the numbers differ on another.
        model = AutoModel.from_config(config, dtype=torch.float32)
    weights: dict[str, torch.Tensor] = model.state_dict()
    return weights
