"""The most tokens of a text that the command's model reads; no text is cut unasked."""

from __future__ import annotations

from typing import Any

from sentence_transformers import SentenceTransformer

from compat.families.lookup import backbone_of
from compat.hooks.refusals import route
from compat.hooks.streamed_texts import count as count_streamed
from compat.hooks.streamed_texts import whole
from compat.jobs.documents import Document
from compat.stream.token_ids import TokenIds

# A tokenizer without a limit says 10 ** 30.
_NO_LIMIT = 10**15


class Limit:
    """The most tokens that a model reads of a text, and which texts have more.

    Args:
        model: The model.
        tokens: The limit to set; None keeps what the model's files say.
        truncate: Whether longer texts are to be cut.

    Attributes:
        tokens: The limit, of a text with its prompt and special tokens; None if there is none.
        truncate: Whether longer texts are cut.
        cut: How many tokens each longer text has, by the document's id.
        prompt: What comes before every text.
    """

    def __init__(self, model: SentenceTransformer, tokens: int | None, truncate: bool) -> None:
        self._model = model
        self._first: Any = route(list(model.children()), "document")[0]
        first = self._first
        # A module's own limits of one call, each of which may be the narrowest.
        parts = (getattr(first, "processing_kwargs", None) or {}).values()
        if tokens is not None:
            first.max_seq_length = tokens
            if getattr(first, "document_length", None) is not None:
                first.document_length = tokens
            for part in parts:
                if "max_length" in part:
                    part["max_length"] = tokens
        limits = [first.max_seq_length, getattr(first, "document_length", None)]
        limits += [part.get("max_length") for part in parts]
        self.tokens = min((n for n in limits if n is not None and n < _NO_LIMIT), default=None)
        self.truncate = truncate
        self.cut: dict[str, int] = {}
        names = ("document", "passage", "corpus", model.default_prompt_name)
        # What encode_document takes, in its order.
        self.prompt = next((model.prompts[name] for name in names if name in model.prompts), None)

    def __str__(self) -> str:
        return f"at {self.tokens} tokens" if self.truncate and self.tokens else "nowhere"

    def num_tokens(self, doc: Document) -> int | None:
        """Tokens of the text as the model reads it, without a prompt; None if it is too long."""
        text = whole(doc.text)
        count = self._count(text)
        if self.tokens is None:
            return count
        read = self._count(text, self.prompt) if self.prompt else count
        return self._read(doc, count, read)

    def num_streamed(self, doc: Document, ids: TokenIds) -> int | None:
        """Return `num_tokens` of a text whose ids, with the prompt, the model has read."""
        count = count_streamed(self._first.tokenizer, doc.text) if self.prompt else ids.count
        return self._read(doc, count, ids.count)

    def _read(self, doc: Document, count: int, read: int) -> int | None:
        if not self.admits(doc, read):
            return None
        return count if self.tokens is None else min(count, self.tokens)

    def admits(self, doc: Document, read: int) -> bool:
        """Return whether a text of so many tokens, with its prompt, is embedded; count a long one.

        One that is longer than the limit is where it is to be cut.
        """
        if self.tokens is None or read <= self.tokens:
            return True
        self.cut[doc.id] = read
        return self.truncate

    def problem(self, doc: Document) -> str:
        """Say why the text of a document is not embedded."""
        return (
            f"found {self.cut[doc.id]} tokens, needed at most {self.tokens}: "
            "--max-seq-length raises that, --truncate cuts"
        )

    def summary(self) -> str | None:
        """A line about all texts that were too long; None if none was."""
        if not self.cut:
            return None
        if self.truncate:
            return f"Cut to {self.tokens} tokens, as --truncate says: {len(self.cut)}."
        longest = max(self.cut.values())
        reason = (
            f"The model's limit is {self.tokens}: its attention may not be good beyond"
            if backbone_of(self._first.model)[1].grows
            else f"A recurrent model has no reason for its limit of {self.tokens}"
        )
        return (
            f"Too long: {len(self.cut)}, of up to {longest} tokens. {reason}; "
            f"--max-seq-length {longest} reads them whole."
        )

    def _count(self, text: str, prompt: str | None = None) -> int:
        # One text at a time: a batch would be padded to its longest text. Without `verbose`, the
        # tokenizer would warn of what is counted here.
        options = {"truncation": False, "padding": False, "verbose": False}
        features = self._model.preprocess(
            [text], prompt=prompt, task="document", processing_kwargs={"text": options}
        )
        return int(features["attention_mask"].sum())
