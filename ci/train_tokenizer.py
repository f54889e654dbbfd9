"""Train the default model's tokenizer: `python -m ci.train_tokenizer`.

A byte-level BPE on the text of `ci.corpus`. It was run once, and its files are committed; on the
same Python and the same `tokenizers` it writes the same bytes again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ci import corpus

FOLDER = Path(__file__).parents[1] / "compat" / "default_model"
VOCABULARY = 8192
END, PAD = "<|endoftext|>", "<|pad|>"


def train() -> PreTrainedTokenizerFast:
    """Train on the topics and the docstrings; every text is given `<|endoftext|>` as its end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        # All 256 bytes are in the vocabulary, so that no text has an unknown token.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    texts = [*corpus.topics().values(), *(text for _, text in corpus.docstrings())]
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    # Last-token pooling reads the state after this token; an empty text consists of it alone.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}",
        pair=f"$A {END} $B:1 {END}:1",
        special_tokens=[(END, tokenizer.token_to_id(END))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def main() -> None:
    """Train, save, and print what came out."""
    tokenizer = train()
    tokenizer.save_pretrained(FOLDER)
    # Without the line breaks and indents the file is half as large.
    tokenizer.backend_tokenizer.save(str(FOLDER / "tokenizer.json"), pretty=False)
    text = corpus.long_text()
    tokens = len(tokenizer(text).input_ids)
    print(f"{len(tokenizer)} entries, {len(text) / tokens:.2f} characters per token, in {FOLDER}")


if __name__ == "__main__":
    main()
