"""Small SentenceTransformers with a real fast tokenizer, made on the spot."""

from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
from support.families import tiny_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,:"


TOKEN_WISE = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}

# Modules behind the Transformer of a tiny model, by what is special about them.
PIPELINES = {
    "normalize": lambda: [Pooling(32, "mean"), Normalize()],
    "dense behind": lambda: [Pooling(32, "lasttoken"), Dense(32, 7)],
    "layer norm behind": lambda: [Pooling(32, "mean"), LayerNorm(32)],
    "dense before": lambda: [Dense(32, 9, **TOKEN_WISE), Pooling(9, ("max", "mean"))],
    "normalize before": lambda: [Normalize("token_embeddings"), Pooling(32, "weightedmean")],
    "all of them": lambda: [
        Dense(32, 12, use_residual=True, **TOKEN_WISE),
        Normalize("token_embeddings"),
        Pooling(12, ("cls", "mean_sqrt_len_tokens")),
        Dense(24, 16),
        Normalize(),
    ],
}


def character_tokenizer(padding_side="right", end_of_text=False):
    """Make a token of each character (64 ids); `end_of_text` adds a last token to every text."""
    names = ["<pad>", "<end>", "<unk>", *ALPHABET]
    backend = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if end_of_text:
        backend.post_processor = processors.TemplateProcessing(
            single="$A <end>", special_tokens=[("<end>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        padding_side=padding_side,
    )


def word_tokenizer(end_of_text=False):
    """Make a BPE of 64 ids with some merges, which leaves spaces out; emoji are unknown."""
    letters = [*ALPHABET.replace(" ", "")]
    merges = [("a", "b"), ("c", "d"), ("ab", "cd"), ("t", "h"), ("th", "e"), ("e", "r")]
    names = ["<pad>", "<end>", "<unk>", *letters, *(a + b for a, b in merges)]
    vocabulary = {name: index for index, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if end_of_text:
        backend.post_processor = processors.TemplateProcessing(
            single="$A <end>", special_tokens=[("<end>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )


def save_checkpoint(
    folder,
    model_type="mamba2",
    *,
    padding_side="right",
    end_of_text=False,
    dtype=torch.float32,
    tokenizer=None,
) -> str:
    """Save a tiny transformers model with its tokenizer, as `SentenceTransformer` loads it."""
    folder = Path(folder)
    tiny_model(model_type, dtype=dtype).save_pretrained(folder)
    (tokenizer or character_tokenizer(padding_side, end_of_text)).save_pretrained(folder)
    return str(folder)


def embedder(checkpoint, *modules, pooling="mean", include_prompt=True) -> SentenceTransformer:
    """Make a model of a Transformer and `modules`, or a Pooling where there are none."""
    transformer = Transformer(checkpoint)
    if not modules:
        width = transformer.get_embedding_dimension()
        modules = (Pooling(width, pooling, include_prompt=include_prompt),)
    return SentenceTransformer(modules=[transformer, *modules], device="cpu")


def text(length: int, seed: int = 0) -> str:
    """Return random characters; the first and last are letters."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + length)
    picks = torch.randint(26, (length,), generator=generator).tolist()
    return "".join(ALPHABET[i] for i in picks)


def record_sizes(model):
    """Return a list that grows by the number of tokens that the model reads at a time."""
    sizes = []
    embeddings = model.transformers_model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _, args: sizes.append(args[0].numel()))
    return sizes


def record_widths(model):
    """Return a list that grows by the width of every batch of tokens that the model reads."""
    widths = []
    embeddings = model.transformers_model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    return widths
