"""Evaluate the default model on text that it never saw: `python -m ci.model.evaluate`.

Beside it stand its teacher, which reads 256 tokens, the teacher over windows of the whole text, and
BM25. Each line is to find its text: `python -m ci.model.data` has kept pages for this, and a whole
source. A table in Markdown is printed, and `model-out/evaluation.json` written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tqdm import tqdm

import compat
from ci import readme
from ci.model import teacher
from ci.model.data import HELD_OUT, OUT, Pair, pairs
from compat._default_model import FOLDER, load_default_model

CHUNK = 512
SHORT, LONG = 1200, 80  # So many pairs of a kind are used, at most.
TOKENS = (2_000, 100_000)  # Of a long text, by the student's tokenizer.
WINDOW = 254  # Tokens; the teacher adds two.
# A fact and a question; nothing of it is in the texts around it.
NEEDLES = [
    ("The lighthouse keeper feeds his parrot with blueberries.", "What does the parrot eat?"),
    ("My grandmother was born in a village near Lisbon.", "Where was grandmother born?"),
    ("The red bicycle is parked behind the bakery.", "Where is the bicycle?"),
    ("Penguins cannot fly, but they swim very well.", "Which birds are good swimmers?"),
    ("The concert was cancelled because of the thunderstorm.", "Why was there no concert?"),
    ("The soup needs two onions and a spoon of paprika.", "How is the soup cooked?"),
    ("Our train to Vienna leaves from platform nine.", "When and where does the train depart?"),
    ("The patient should take the medicine after breakfast.", "When to take the medicine?"),
]
LENGTHS, DEPTHS = (1_000, 4_000, 16_000), (0.1, 0.5, 0.9)

Scores = Callable[[list[str], list[str]], np.ndarray]
"""Queries and texts to (queries, texts), the larger the better."""


def by_embeddings(
    queries: Callable[[list[str]], np.ndarray], texts: Callable[[list[str]], np.ndarray]
) -> Scores:
    """Cosines of embeddings."""
    return lambda q, t: np.asarray(queries(q) @ texts(t).T)


def by_words(queries: list[str], texts: list[str]) -> np.ndarray:
    """BM25, as bm25s has it."""
    found = bm25s.BM25()
    found.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    words = bm25s.tokenize(queries, stopwords="en", return_ids=False, show_progress=False)
    # A query without words is told nothing by them.
    return np.stack([found.get_scores(w) if w else np.zeros(len(texts)) for w in words])


class Teacher:
    """The teacher's embeddings, which are kept between calls of this program."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        # In bfloat16: what it finds is the same, and it takes half of the time.
        self._model = teacher.load(model_kwargs={"dtype": torch.bfloat16})

    def beginnings(self, texts: list[str]) -> np.ndarray:
        """Of 256 tokens of each."""
        digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        path = self._folder / f"{digest[:16]}.npy"
        if not path.is_file():
            cut = [text[: 20 * WINDOW] for text in texts]
            found = self._model.encode(cut, convert_to_tensor=True, show_progress_bar=None)
            np.save(path, found.float().numpy())
        return np.asarray(np.load(path))

    def windows(self, texts: list[str]) -> np.ndarray:
        """The mean of the windows of each, of norm 1."""
        tokenizer = self._model.tokenizer.backend_tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()  # Its file pads to 128 tokens, which are at no place of the text.
        parts, owners = [], []
        for place, text in enumerate(texts):
            offsets = tokenizer.encode(text, add_special_tokens=False).offsets
            for start in range(0, len(offsets), WINDOW):
                end = min(start + WINDOW, len(offsets)) - 1
                parts.append(text[offsets[start][0] : offsets[end][1]])
                owners.append(place)
        found = np.zeros((len(texts), 384), np.float32)
        places = {part: place for place, part in enumerate(dict.fromkeys(parts))}
        embeddings = self.beginnings(list(places))  # Haystacks have most windows in common.
        np.add.at(found, owners, embeddings[[places[part] for part in parts]])
        return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True))


def measures(scores: np.ndarray) -> dict[str, float]:
    """What is found where text i is the one for query i; (texts, texts).

    Of texts with the same score, the one that is asked for comes last: a model that sees no
    difference has found nothing.
    """
    rounded = scores.round(6)
    ranks = (rounded >= rounded.diagonal()[:, None]).sum(1)
    return {
        "ndcg@10": float(np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0).mean()),
        "recall@10": float((ranks <= 10).mean()),
        "recall@1": float((ranks == 1).mean()),
    }


def some(found: list[Pair], most: int) -> list[Pair]:
    """At most so many, always the same ones, in no order; one of each line and each text."""
    unique = {pair.query.lower(): pair for pair in found}
    unique = {pair.text: pair for pair in unique.values()}
    return sorted(unique.values(), key=lambda p: hashlib.sha256(p.query.encode()).digest())[:most]


def haystacks(tokenizer: Any, text: str, length: int, depth: float) -> list[str]:
    """A text of so many tokens, once for each needle, with it at that depth."""
    offsets = tokenizer.backend_tokenizer.encode(text).offsets
    end, middle = (offsets[round(share * length)][0] for share in (1, depth))
    middle = text.rindex(" ", 0, middle)
    return [f"{text[:middle]} {fact}{text[middle:end]}" for fact, _ in NEEDLES]


def tasks(model: SentenceTransformer) -> dict[str, tuple[list[str], list[str]]]:
    """For each task its lines, and the text for each."""
    kept = pairs(OUT, "test")
    out = {True: "source never seen", False: "pages never seen"}
    found = {}
    for long, most in ((False, SHORT), (True, LONG)):
        for held, name in out.items():
            of = [p for p in kept if p.long == long and (p.source in HELD_OUT) == held]
            if long:
                of = [p for p in some(of, 4 * most) if _is_long(model, p.text)]
            of = some(of, most)
            kind = "long texts" if long else "short texts"
            found[f"{kind}, {name}"] = ([p.query for p in of], [p.text for p in of])
    source = "\n\n".join(text for text in found["long texts, source never seen"][1])
    for length in LENGTHS:
        for depth in DEPTHS:
            texts = haystacks(model.tokenizer, source[: 10 * length], length, depth)
            name = f"needle in {length:,} tokens, at {depth:.0%}"
            found[name] = ([question for _, question in NEEDLES], texts)
    return found


def _is_long(model: SentenceTransformer, text: str) -> bool:
    return TOKENS[0] <= len(model.tokenizer(text)["input_ids"]) <= TOKENS[1]


def evaluate(model: SentenceTransformer, folder: Path) -> dict[str, dict[str, Any]]:
    """For each task and each model what it finds."""
    from_teacher = Teacher(folder / "teacher-evaluated")
    compat.enable_vertical_chunking()

    def encode(size: int | None) -> Callable[[list[str]], np.ndarray]:
        return lambda texts: np.asarray(
            model.encode(texts, batch_size=4, vertical_chunk_size=size), np.float64
        )

    contenders: dict[str, Scores] = {
        "this model, in chunks": by_embeddings(encode(None), encode(CHUNK)),
        "this model, in one pass": by_embeddings(encode(None), encode(None)),
        "teacher, 256 tokens": by_embeddings(from_teacher.beginnings, from_teacher.beginnings),
        "teacher, over windows": by_embeddings(from_teacher.beginnings, from_teacher.windows),
        "BM25": by_words,
    }
    found: dict[str, dict[str, Any]] = {}
    for task, (queries, texts) in tqdm(tasks(model).items(), desc="tasks", disable=None):
        found[task] = {"texts": len(texts)}
        for name, scores in contenders.items():
            found[task][name] = measures(scores(queries, texts))
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """In Markdown: nDCG@10 and recall@10, and for the needles how often the right text is first."""
    names = [name for name in next(iter(found.values())) if name != "texts"]

    def lines(tasks: Sequence[str], keys: Sequence[str]) -> list[str]:
        head = ["", "texts", *names]
        rows = [head, ["---"] * len(head)]
        for task in tasks:
            cells = [" / ".join(f"{found[task][name][key]:.4f}" for key in keys) for name in names]
            rows.append([task, str(found[task]["texts"]), *cells])
        return ["| " + " | ".join(row) + " |" for row in rows]

    needles = [task for task in found if task.startswith("needle")]
    others = [task for task in found if task not in needles]
    text = ["nDCG@10 / recall@10:", "", *lines(others, ["ndcg@10", "recall@10"]), ""]
    text += ["How often the text with the fact is the first of all:", ""]
    return "\n".join(text + lines(needles, ["recall@1"]))


def main() -> None:
    """Evaluate, print the table and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, metavar="DIR", help="the default model by default")
    parser.add_argument("--readme", action="store_true", help="write README.md and the card, too")
    options = parser.parse_args()
    path: Path | None = options.model
    model = SentenceTransformer(str(path), device="cpu") if path else load_default_model()
    found = evaluate(model, OUT)
    (OUT / "evaluation.json").write_text(json.dumps(found, indent=1))
    print(text := table(found))
    if options.readme:
        for file in (readme.README, FOLDER / "README.md"):
            readme.put("evaluation", text, file)


if __name__ == "__main__":
    main()
