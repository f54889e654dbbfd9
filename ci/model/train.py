"""Train the default model: `python -m ci.model.train`, after `python -m ci.model.data`.

A small Mamba2 learns from a sentence encoder, and from the lines that texts have about themselves.
It begins without layers, as the mean of its tokens' embeddings, which are the teacher's of each
token alone, and learns from short texts and then from long ones. Then layers are added, whose
outputs are zero at first, and it learns from short texts and from long ones again. Each of these
stages continues from its last checkpoint, and a finished stage is not done again: delete
`model-out/train` to begin anew.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import SequentialSampler
from tqdm import tqdm
from transformers import Mamba2Config, Mamba2Model, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from ci.model import teacher
from ci.model.data import CUT, DICTIONARY, OUT, pairs
from compat.families import mamba2_kernels

SEED = 0
VOCABULARY = 16_384
WIDTH, LAYERS = 256, 2
PAD, UNKNOWN, END = "[PAD]", "[UNK]", "[SEP]"
FOLDER = OUT / "train"
WEIGHTS = "model.safetensors"
# The norms' epsilon. It is as large as the embeddings, so that a token's weight in the mean, which
# is the length of its embedding, survives the last norm.
EPSILON = 0.01
NO_LIMIT = VERY_LARGE_INTEGER
# The weights of two losses, beside that of the cosine with the teacher: how alike texts are, and
# which are the nearest. The last number multiplies the cosines for the latter.
ALIKE, RANKED, SCALE = 20, 1, 20
# A token's embedding is some 0.05 long in each direction. A layer adds the products of 512 numbers
# of size 1, so that at the rate of the other weights a step or two would drown the embeddings.
SLOW = {"embeddings": 1e-4, "out_proj": 3e-5}
OTHERS = 15  # Lines that a page's own line has to be told apart from.


# The tokenizer, and the first values of the tokens' embeddings.


def frequencies(texts: Iterable[str]) -> Counter[int]:
    """Count how often each of the teacher's tokens occurs in texts."""
    tokenizer = teacher.tokenizer()
    found: Counter[int] = Counter()
    texts = list(texts)
    for start in tqdm(range(0, len(texts), 1000), desc="tokens", disable=None):
        batch = tokenizer.encode_batch_fast(texts[start : start + 1000], add_special_tokens=False)
        for encoding in batch:
            found.update(encoding.ids)
    return found


def make_tokenizer(counts: Counter[int], kept: Callable[[str], bool]) -> PreTrainedTokenizerFast:
    """Make a WordPiece tokenizer of the teacher's most frequent tokens and all `kept` ones.

    A text ends with `END`.
    """
    vocabulary = teacher.load().tokenizer.get_vocab()
    special = [PAD, UNKNOWN, END]
    others = [t for t in vocabulary if not re.fullmatch(r"\[(unused\d+|[A-Z]+)\]", t)]
    others.sort(key=lambda token: (not kept(token), -counts[vocabulary[token]], token))
    tokens = (special + others)[:VOCABULARY]
    tokenizer = Tokenizer(
        models.WordPiece(
            {token: place for place, token in enumerate(tokens)},
            unk_token=UNKNOWN,
            continuing_subword_prefix="##",
            max_input_chars_per_word=100,
        )
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B:1 {END}:1", special_tokens=[(END, 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        eos_token=END,
        pad_token=PAD,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def is_character(token: str) -> bool:
    """Return whether a token is one character; those are kept, so that few words are unknown."""
    return len(token.removeprefix("##")) == 1


def basis(embeddings: Tensor) -> Tensor:
    """Return the `WIDTH` directions, (384, WIDTH), that keep most of embeddings (texts, 384)."""
    vectors: Tensor = torch.linalg.eigh(embeddings.T @ embeddings).eigenvectors
    return vectors[:, -WIDTH:].flip(1)


@torch.no_grad()
def first_embeddings(tokens: list[str], counts: Counter[int], directions: Tensor) -> Tensor:
    """Return (tokens, WIDTH): the teacher's embedding of each token alone, shorter if frequent.

    A smooth inverse frequency weighs them, as in Arora et al., "A simple but tough-to-beat baseline
    for sentence embeddings" (2017).
    """
    model = teacher.load()
    vocabulary = model.tokenizer.get_vocab()
    places = torch.tensor([vocabulary[token] for token in tokens])
    first, last = vocabulary["[CLS]"], vocabulary["[SEP]"]
    found = []
    for part in tqdm(places.split(512), desc="tokens alone", disable=None):
        ids = torch.stack([torch.full_like(part, first), part, torch.full_like(part, last)], 1)
        features = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found.append(model[1](model[0](features))["sentence_embedding"])
    vectors = torch.cat(found)
    vectors = (vectors - vectors.mean(0)) @ directions
    share = torch.tensor([counts[int(place)] for place in places]) / counts.total()
    weight = 1e-3 / (1e-3 + share)
    weight[:3] = 0.01  # Padding, unknown, end: they have no meaning, but need some length.
    vectors *= weight[:, None] / vectors.norm(dim=1).quantile(0.99)
    # This is the norm's inverse, so that the norm's output is proportional to the vectors.
    rms = 0.8 * vectors.norm(dim=1, keepdim=True).clamp(1e-4, 1.1)
    wanted: Tensor = rms * math.sqrt(EPSILON) / (1 - rms.square()).sqrt()
    return wanted * math.sqrt(WIDTH) * functional.normalize(vectors)


# The model.


def config(layers: int) -> Mamba2Config:
    """Return the configuration of a Mamba2 of so many layers."""
    return Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        expand=2,
        num_heads=8,
        head_dim=64,
        state_size=64,
        n_groups=1,
        chunk_size=64,
        use_bias=False,
        layer_norm_epsilon=EPSILON,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=2,
        dtype="float32",
    )


def make_model(folder: Path, layers: int, tokenizer: Any, weights: dict[str, Tensor]) -> None:
    """Write a model that has these weights; layers without weights add nothing."""
    torch.manual_seed(SEED)
    model: Any = Mamba2Model(config(layers))  # Its layers have no types of their own.
    for layer in model.layers:
        nn.init.zeros_(layer.mixer.out_proj.weight)
    model.load_state_dict(weights, strict=False)
    base = folder / "base"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    modules = [Transformer(str(base)), Pooling(WIDTH, "mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder / "model"))


def backbone(model: SentenceTransformer) -> Any:
    """Return its Mamba2."""
    return model.transformers_model


def run_on_ops(model: SentenceTransformer) -> None:
    """Let the mixers learn on this project's op: texts begin at the first token, padding follows.

    Padding can be ignored, as nothing flows from it back to the tokens.
    """
    for layer in backbone(model).layers:
        layer.mixer.forward = partial(_run_on_ops, layer.mixer)


def _run_on_ops(mixer: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):  # A third faster; weights and states are float32.
        output, _state = mamba2_kernels.portable(mixer, mixer.in_proj(hidden_states), None, None)
        projected: Tensor = mixer.out_proj(output)
    return projected.float()


# Losses and batches.


class Lessons(nn.Module):
    """The loss to the teacher: each text's embedding, and how near the others of the batch are."""

    def __init__(self, model: SentenceTransformer, targets: Tensor) -> None:
        super().__init__()
        self.model = model
        self.targets = [targets]  # A list hides it, as it is not a weight of the loss.

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Compute the loss of features of lines and passages; labels are rows of their targets."""
        embeddings = [self.model(column)["sentence_embedding"] for column in sentence_features]
        found = torch.cat(embeddings)
        wanted = self.targets[0][labels.flatten()].transpose(0, 1).flatten(0, 1)
        cosines, wanted_cosines = found @ found.T, wanted @ wanted.T
        alike = functional.mse_loss(cosines, wanted_cosines)
        ranked = functional.kl_div(
            nearest(cosines), nearest(wanted_cosines), log_target=True, reduction="batchmean"
        )
        return 1 - (found * wanted).sum(1).mean() + ALIKE * alike + RANKED * ranked


def nearest(cosines: Tensor) -> Tensor:
    """Return for each text the log-shares of the others' nearness, (texts, texts)."""
    return (SCALE * cosines).fill_diagonal_(-1e9).log_softmax(1)  # No text is near to itself.


def by_length(rows: list[dict[str, Any]], size: int, times: int = 1) -> list[dict[str, Any]]:
    """Return the rows, `times` over, in batches of about the same length, to need little padding.

    The batches are shuffled, and differ each time.
    """
    draw, found = random.Random(SEED), []
    for _ in range(times):
        lengths = [len(row["text"]) * draw.uniform(0.8, 1.25) for row in rows]
        order = sorted(range(len(rows)), key=lengths.__getitem__)
        starts = list(range(0, len(rows) - size + 1, size))
        draw.shuffle(starts)
        found += [rows[place] for start in starts for place in order[start : start + size]]
    return found


def in_order(dataset: Dataset, **kwargs: Any) -> Any:
    """Make a batch sampler that keeps a dataset's order."""
    return DefaultBatchSampler(SequentialSampler(dataset), **kwargs)


def learn(
    stage: str,
    sets: dict[str, list[dict[str, Any]]],
    losses: Mapping[str, nn.Module],
    batch_size: int,
    rate: float,
    **options: Any,
) -> None:
    """Run a stage with sentence-transformers' trainer, from its last checkpoint if there is one."""
    folder = FOLDER / stage
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=batch_size,
        num_train_epochs=1,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        batch_sampler=in_order,
        dataloader_drop_last=True,
        save_steps=options.pop("save_steps", 100),
        save_total_limit=1,
        logging_steps=10,
        seed=SEED,
        use_cpu=True,
        report_to="none",
        max_grad_norm=1.0,
        **options,
    )
    model: Any = next(iter(losses.values())).model
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset={name: Dataset.from_list(rows) for name, rows in sets.items()},
        loss=dict(losses),
    )
    checkpoints = list((folder / "checkpoints").glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=bool(checkpoints))
    (folder / "loss.json").write_text(json.dumps(trainer.state.log_history))
    model.max_seq_length = NO_LIMIT
    model.save_pretrained(str(folder / "done"))


def targets() -> tuple[Tensor, Tensor]:
    """Return the directions of the student's embeddings, (384, WIDTH), and its targets in them.

    The targets are (lessons, 2, WIDTH): lines and passages.
    """
    taught = torch.from_numpy(teacher.embeddings())
    directions = basis(taught.flatten(0, 1))
    return directions, functional.normalize(taught @ directions, dim=-1)


def short_rows(size: int, lessons: int, times: int) -> dict[str, list[dict[str, Any]]]:
    """Return the data sets of short texts, in batches, each `times` over.

    "taught" has the texts that the teacher has embedded, with the places of the embeddings; "pairs"
    has all lines and beginnings of the texts that they are about.
    """
    taught = [
        {"query": query, "text": text, "label": place}
        for place, (query, text) in enumerate(teacher.lessons())
    ]
    found = [p for p in pairs(OUT, "train") if not p.long and p.source != DICTIONARY]
    random.Random(SEED).shuffle(found)
    rows = [{"query": pair.query, "text": pair.text[:400]} for pair in found]
    return {"taught": by_length(taught, size, lessons), "pairs": by_length(rows, size, times)}


def short_losses(model: SentenceTransformer, taught: Tensor) -> dict[str, nn.Module]:
    """Return the loss for each of the data sets of short texts."""
    return {"taught": Lessons(model, taught), "pairs": MultipleNegativesRankingLoss(model)}


def stage_static(folder: Path) -> None:
    """Train without layers: make the tokenizer, and learn the tokens' embeddings."""
    directions, taught = targets()
    if not (folder / "model").is_dir():
        found = pairs(OUT, "train")
        counts = frequencies([text for p in found if not p.long for text in (p.query, p.text)])
        tokenizer = make_tokenizer(counts, is_character)
        places = tokenizer.get_vocab()
        tokens = sorted(places, key=places.__getitem__)
        weights = {
            "embeddings.weight": first_embeddings(tokens, counts, directions),
            "norm_f.weight": torch.ones(WIDTH),
        }
        make_model(folder, 0, tokenizer, weights)
    model = SentenceTransformer(str(folder / "model"), device="cpu")
    learn("static", short_rows(256, 3, 2), short_losses(model, taught), 256, 3e-3)


def page_rows(size: int, steps: int) -> list[dict[str, Any]]:
    """Cut pages to a length between 500 and 16,000 tokens, each with its line and with others.

    The others are of the same source; they are the hardest to tell from its own.
    """
    draw = random.Random(SEED)
    found = [pair for pair in pairs(OUT, "train") if pair.long]
    lines: dict[str, list[str]] = {}
    for pair in found:
        lines.setdefault(pair.source, []).append(pair.query)
    rows = []
    for pair in found:
        others = [line for line in lines[pair.source] if line != pair.query]
        if len(others) >= OTHERS:
            characters = round(math.exp(draw.uniform(math.log(2_000), math.log(CUT))))
            row = {"text": pair.text[:characters], "query": pair.query}
            named = enumerate(draw.sample(others, OTHERS))
            rows.append(row | {f"other {place}": line for place, line in named})
    draw.shuffle(rows)
    return by_length(rows[: size * steps], size)


def page_loss(model: SentenceTransformer) -> MultipleNegativesRankingLoss:
    """Draw each page nearer to its line than to other lines, and each line likewise."""
    return MultipleNegativesRankingLoss(
        model, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    )


def stage_pages(folder: Path) -> None:
    """Train without layers, on whole pages, to learn which tokens weigh little in a long text."""
    model = SentenceTransformer(str(FOLDER / "static" / "done"), device="cpu")
    learn("pages", {"pages": page_rows(16, 200)}, {"pages": page_loss(model)}, 16, 1e-3)


def stage_context(folder: Path) -> None:
    """Train with layers, on short texts."""
    before = SentenceTransformer(str(FOLDER / "pages" / "done"), device="cpu")
    make_model(folder, LAYERS, before.tokenizer, backbone(before).state_dict())
    model = SentenceTransformer(str(folder / "model"), device="cpu")
    run_on_ops(model)
    sets = {name: rows[: 64 * 512] for name, rows in short_rows(64, 1, 1).items()}
    losses = short_losses(model, targets()[1])
    learn("context", sets, losses, 64, 3e-4, learning_rate_mapping=SLOW)


def stage_long(folder: Path) -> None:
    """Train with layers, on pages."""
    model = SentenceTransformer(str(FOLDER / "context" / "done"), device="cpu")
    run_on_ops(model)
    sets, losses = {"pages": page_rows(4, 120)}, {"pages": page_loss(model)}
    learn("long", sets, losses, 4, 1e-4, save_steps=20, learning_rate_mapping=SLOW)


STAGES = {
    "static": stage_static,
    "pages": stage_pages,
    "context": stage_context,
    "long": stage_long,
}


def plot() -> None:
    """Draw the losses of the stages, each on its own axes: `model-out/loss.png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(STAGES), figsize=(12, 3.5), layout="constrained")
    for axis, stage in zip(axes, STAGES, strict=True):
        path = FOLDER / stage / "loss.json"
        history = json.loads(path.read_text()) if path.is_file() else []
        points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
        axis.plot(*np.array(points or [(0, 0)]).T)
        axis.set(title=stage, xlabel="step", ylabel="loss")
        axis.grid(color="0.9")
    figure.savefig(OUT / "loss.png", dpi=120)
    plt.close(figure)


def put_in_place(done: Path, target: Path) -> None:
    """Write a model with its weights in float16."""
    shutil.copytree(done, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("README.md"))
    for name in ("tokenizer.json", "tokenizer_config.json"):  # Stored as before any padding.
        shutil.copy(FOLDER / "static" / "base" / name, target / name)
    weights = {name: weight.half() for name, weight in load_file(done / WEIGHTS).items()}
    save_file(weights, target / WEIGHTS, {"format": "pt"})


def main() -> None:
    """Train stage by stage."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUT / "model", metavar="DIR")
    output: Path = parser.parse_args().output
    for name, stage in STAGES.items():
        if not (FOLDER / name / "done").is_dir():
            (FOLDER / name).mkdir(parents=True, exist_ok=True)
            stage(FOLDER / name)
            plot()
    put_in_place(FOLDER / "long" / "done", output)
    print(f"The model is in {output}, the losses in {OUT / 'loss.png'}")


if __name__ == "__main__":
    main()
