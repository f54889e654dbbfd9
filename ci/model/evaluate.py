"""Evaluate the default model on text that it never saw: `python -m ci.model.evaluate`.

It is compared with its teacher, which reads 256 tokens, with the teacher over windows of the whole
text, and with BM25. Each line has to find its text: `python -m ci.model.data` has kept pages for
this, and a whole source. The program prints a table in Markdown, and writes
`model-out/evaluation-test.json`.

To compare ways of training, use `--validation`, which takes other pages and another source.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import bm25s
import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tqdm import tqdm

import compat
from ci.model import teacher
from ci.model.data import OUT, SIDES, Pair, Split, pairs
from ci.tables import markers
from compat.default_model import load_default_model

CHUNK = 512
SHORT, LONG = 1200, 80  # The most pairs of each kind.
TOKENS = (2_000, 100_000)  # Of a long text; tokens are the teacher's, here and below.
WINDOW = 254  # In tokens; the teacher adds two.
# A fact and a question for it; the texts around it contain nothing of it.
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
AMONG = 40  # A text with a fact is among at most this many texts.

Scores = Callable[[list[str], list[str]], np.ndarray]
"""Queries and texts to (queries, texts), the larger the better."""


def by_embeddings(
    queries: Callable[[list[str]], np.ndarray], texts: Callable[[list[str]], np.ndarray]
) -> Scores:
    """Score by the cosines of embeddings."""
    return lambda q, t: np.asarray(queries(q) @ texts(t).T)


def by_words(queries: list[str], texts: list[str]) -> np.ndarray:
    """Score by BM25, as bm25s has it."""
    found = bm25s.BM25()
    found.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    words = bm25s.tokenize(queries, stopwords="en", return_ids=False, show_progress=False)
    # A query without words scores 0 for all texts.
    return np.stack([found.get_scores(w) if w else np.zeros(len(texts)) for w in words])


class Teacher:
    """The teacher's tokens, and its embeddings, which are kept between runs of this program."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        # bfloat16 finds the same and takes half of the time.
        self._model = teacher.load(model_kwargs={"dtype": torch.bfloat16})
        self._tokenizer = teacher.tokenizer()

    def places(self, text: str) -> list[tuple[int, int]]:
        """Return the beginning and end of each token of a text."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return [(int(start), int(end)) for start, end in encoding.offsets]

    def beginnings(self, texts: list[str]) -> np.ndarray:
        """Return the embeddings of the first 256 tokens of each text."""
        digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        path = self._folder / f"{digest[:16]}.npy"
        if not path.is_file():
            cut = [text[: 20 * WINDOW] for text in texts]
            found = self._model.encode(cut, convert_to_tensor=True, show_progress_bar=None)
            np.save(path, found.float().numpy())
        return np.asarray(np.load(path))

    def windows(self, texts: list[str]) -> np.ndarray:
        """Return the mean of the windows of each text, of norm 1."""
        parts, owners = [], []
        for owner, text in enumerate(texts):
            places = self.places(text)
            for start in range(0, len(places), WINDOW):
                end = min(start + WINDOW, len(places)) - 1
                parts.append(text[places[start][0] : places[end][1]])
                owners.append(owner)
        found = np.zeros((len(texts), 384), np.float32)
        numbers = {part: number for number, part in enumerate(dict.fromkeys(parts))}
        embeddings = self.beginnings(list(numbers))  # Haystacks share most of their windows.
        np.add.at(found, owners, embeddings[[numbers[part] for part in parts]])
        return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True))


def measures(scores: np.ndarray) -> dict[str, float]:
    """Measure how well text i is found for query i, from scores (queries, texts).

    Of texts with the same score, the wanted one counts as the last: a model that sees no difference
    has found nothing.
    """
    rounded = scores.round(6)
    ranks = (rounded >= rounded.diagonal()[:, None]).sum(1)
    return {
        "ndcg@10": float(np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0).mean()),
        "recall@10": float((ranks <= 10).mean()),
        "recall@1": float((ranks == 1).mean()),
    }


class Task(NamedTuple):
    """Lines and texts: text i is for line i, and more texts may follow."""

    queries: list[str]
    texts: list[str]


def some(found: list[Pair], most: int) -> list[Pair]:
    """Return at most `most` pairs, always the same and shuffled; one for each line and text."""
    unique = {pair.query.lower(): pair for pair in found}
    unique = {pair.text: pair for pair in unique.values()}
    return sorted(unique.values(), key=lambda p: hashlib.sha256(p.query.encode()).digest())[:most]


def tasks(from_teacher: Teacher, split: Split) -> dict[str, Task]:
    """Return lines and the texts that they are about, of sources and pages never seen."""
    low, high = TOKENS
    found = {}
    for kind, long, most in (("short texts", False, SHORT), ("long texts", True, LONG)):
        for name, apart in (("source never seen", True), ("pages never seen", False)):
            of = [p for p in pairs(OUT, split) if p.long == long and (p.source in SIDES) == apart]
            if long:
                some_more = some(of, 4 * most)
                of = [p for p in some_more if low <= len(from_teacher.places(p.text)) <= high]
            of = some(of, most)
            found[f"{kind}, {name}"] = Task([p.query for p in of], [p.text for p in of])
    return found


def needles(from_teacher: Teacher, texts: list[str]) -> dict[str, Task]:
    """Return questions for facts in long texts: in copies of one text, and each in another text."""
    questions = [question for _, question in NEEDLES]
    one = "\n\n".join(texts)
    found = {}
    for length in LENGTHS:
        cuts = [beginning(from_teacher, text, length) for text in texts]
        around = {
            "copies of a text": [beginning(from_teacher, one, length)] * len(NEEDLES),
            "different texts": [text for text in cuts if text][:AMONG],
        }
        for name, among in around.items():
            for depth in DEPTHS:
                with_facts = [
                    with_fact(text, fact, depth)
                    for text, (fact, _) in zip(among, NEEDLES, strict=False)
                ]
                task = Task(questions, with_facts + among[len(NEEDLES) :])
                found[f"{name}, {length:,} tokens, at {depth:.0%}"] = task
    return found


def beginning(from_teacher: Teacher, text: str, length: int) -> str:
    """Return the first `length` tokens of a text; nothing if the text has fewer."""
    places = from_teacher.places(text[: 20 * length])
    return text[: places[length - 1][1]] if len(places) >= length else ""


def with_fact(text: str, fact: str, depth: float) -> str:
    """Put a fact into a text after this share of it, between two words."""
    before = text[: round(depth * len(text))].rpartition(" ")[0]
    return f"{before} {fact}{text[len(before) :]}"


def evaluate(model: SentenceTransformer, folder: Path, split: Split) -> dict[str, dict[str, Any]]:
    """Return what each model finds in each task."""
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
    todo = tasks(from_teacher, split)
    if split == "test":
        of_source, of_pages = (
            todo[f"long texts, {name} never seen"] for name in ("source", "pages")
        )
        todo |= needles(from_teacher, of_pages.texts + of_source.texts)
    found: dict[str, dict[str, Any]] = {}
    for task, (queries, texts) in tqdm(todo.items(), desc="tasks", disable=None):
        found[task] = {"texts": len(texts)}
        for name, scores in contenders.items():
            found[task][name] = measures(scores(queries, texts))
    return found


SECTIONS = {
    " never seen": ("nDCG@10 / recall@10:", ["ndcg@10", "recall@10"]),
    "copies of a text, ": (
        "A fact in one of some copies of a long text: how often this copy is the first of them:",
        ["recall@1"],
    ),
    "different texts, ": (
        "A fact in one of some different long texts: how often this text is the first, "
        "and among the first ten:",
        ["recall@1", "recall@10"],
    ),
}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Write the results in Markdown, in sections."""
    names = [name for name in next(iter(found.values())) if name != "texts"]
    text: list[str] = []
    for word, (title, keys) in SECTIONS.items():
        rows = [["", "texts", *names], ["---"] * (2 + len(names))]
        for task in (task for task in found if word in task):
            cells = [" / ".join(f"{found[task][name][key]:.4f}" for key in keys) for name in names]
            rows.append([task, str(found[task]["texts"]), *cells])
        if len(rows) > 2:
            text += [title, "", *("| " + " | ".join(row) + " |" for row in rows), ""]
    return "\n".join(text).strip()


def main() -> None:
    """Evaluate, print the table and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, metavar="DIR", help="the default model by default")
    parser.add_argument("--validation", action="store_true", help="on what is kept to choose by")
    parser.add_argument("--readme", action="store_true", help="write the card, too")
    options = parser.parse_args()
    path: Path | None = options.model
    model = SentenceTransformer(str(path), device="cpu") if path else load_default_model()
    split: Split = "validation" if options.validation else "test"
    found = evaluate(model, OUT, split)
    (OUT / f"evaluation-{split}.json").write_text(json.dumps(found, indent=1))
    print(text := table(found))
    if options.readme:
        markers.put("evaluation", text, markers.EVALUATION)


if __name__ == "__main__":
    main()
