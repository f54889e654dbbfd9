"""Hold what the peers share: what a peer is, and a model as they take it, with a head."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear
from transformers import AutoModelForCausalLM, PreTrainedModel

Read = Callable[[Tensor], Tensor]
"""Reads token ids (1, tokens), and returns what the model gives for the last of them, in float32:
the hidden state (hidden,) after the last norm, or its logits (vocabulary,)."""


class CannotReadError(Exception):
    """Raised by a peer that does not take a model; the message says why."""


@dataclass(frozen=True)
class Place:
    """Tell a peer with what, and how, it works."""

    tools: Path  # A folder that stays: what is downloaded or installed once.
    scratch: Path  # An empty one, which is deleted when the stack is closed.
    stack: ExitStack  # Takes what is to be done when the peer has read.
    threads: int
    chunk: int  # The most tokens that are read at once.


@dataclass(frozen=True)
class Peer:
    """A package that reads a model of transformers, or of fla, with its own code."""

    name: str  # On PyPI.
    package: str  # As it is imported.
    models: frozenset[str]  # The model types that it has.
    logits: bool  # Whether it gives logits, with the embeddings as the head, or hidden states.
    reader: Callable[[PreTrainedModel, Place], Read]

    def installed(self) -> bool:
        """Say whether the package can be imported."""
        return importlib.util.find_spec(self.package) is not None


def causal(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model under a head for language modelling, which is a copy of its embeddings."""
    embeddings: Any = model.get_input_embeddings()
    with torch.device("meta"):
        whole: Any = AutoModelForCausalLM.from_config(model.config)
    vocabulary, width = embeddings.weight.shape
    whole.lm_head = Linear(width, vocabulary, bias=False, device="meta")
    whole.lm_head.weight = torch.nn.Parameter(embeddings.weight.detach().clone())
    setattr(whole, whole.base_model_prefix, model)
    found: PreTrainedModel = whole.eval()
    return found


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """Write the model with its head into a folder, unless it is there, and return that."""
    if not folder.exists():
        causal(model).save_pretrained(folder)
    return folder


def run(command: Sequence[str | Path], what: str) -> None:
    """Run a command in silence.

    Raises:
        CannotReadError: It failed; the message says what was tried, and has its last line.
    """
    done = subprocess.run([f"{word}" for word in command], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()
        raise CannotReadError(f"{what} failed: {said[-1]}")
