"""Load the command's model and try it on one word, or say in one line why it cannot be used."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedModel

import compat
from compat.default_model import WEIGHTS_LABEL, load_default_model
from compat.errors import UnsupportedModelError, VerticalChunkingError
from compat.installed.patches import Held

WORD = "word"


def load_model(path: str | None, dtype: str, device: str | None) -> SentenceTransformer:
    """Load a model that can embed; without a path, the default one.

    Raises:
        VerticalChunkingError: There is no such device or model, or the model is broken, is too
            large, or does not read in chunks.
    """
    _check_device(device)
    kwargs = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    try:
        if path is None:
            model = load_default_model(device=device, model_kwargs=kwargs)
        else:
            with _weights_that_lack(path):
                model = SentenceTransformer(path, device=device, model_kwargs=kwargs)
    except VerticalChunkingError:
        raise
    except Exception as error:
        raise _not_loaded(path or "the default model", error) from error
    _try(model, path or "the default model")
    return model


def label(path: str | None) -> str | None:
    """Return the line about the default model for stderr; None for any other model."""
    return f"Default model, {WEIGHTS_LABEL}" if path is None else None


def is_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the memory of the machine or its device was too small."""
    # On a CPU, torch raises a plain RuntimeError.
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator" in str(error)


def too_little_memory() -> VerticalChunkingError:
    """Return the error for a command that does not have room for even one chunk."""
    return VerticalChunkingError(
        "too little memory",
        "room for the model and for one chunk of a batch",
        "give a smaller --vertical-chunk-size or --batch-size, or another --dtype or --device",
    )


def in_short(error: BaseException) -> str:
    """Return an error's kind and its first sentence, on one line."""
    sentence = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    text = textwrap.shorten(sentence, 200, placeholder=" ...")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _check_device(device: str | None) -> None:
    if device is None:
        return
    reason = ""
    try:
        # The device "meta" accepts numbers and returns none.
        torch.zeros(1, device=torch.device(device)).cpu()
        return
    except Exception as error:
        cause, reason = error, str(error).split("\n")[0].rstrip(".")
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    # For an unknown name, torch lists all names that it knows.
    found = f"--device {device}" + (f" ({reason})" if len(reason) < 100 else "")
    raise VerticalChunkingError(
        found,
        f"a device that this machine has: {', '.join(there)}",
        "give one of these, or leave --device out",
    ) from cause


def _not_loaded(path: str, error: Exception) -> VerticalChunkingError:
    """Say why a model cannot be loaded, and what helps."""
    from safetensors import SafetensorError

    if is_of_memory(error):
        return too_little_memory()
    if isinstance(error, SafetensorError):
        return VerticalChunkingError(
            f"{path} with broken weights ({in_short(error)})",
            "whole .safetensors files",
            "copy or download the model again",
        )
    try:
        found = _what_is_there(Path(path)) or f"which cannot be loaded ({in_short(error)})"
    except OSError as closed:
        found = f"which cannot be read ({closed.strerror})"
    if "mismatched_sizes" in str(error):
        found = "where weights have other shapes than config.json says"
    return VerticalChunkingError(
        f"{path}, {found}",
        "the folder of a model that SentenceTransformer.save wrote",
        "give --model such a folder",
    )


@contextmanager
def _weights_that_lack(path: str) -> Iterator[None]:
    """Raise where a file lacks weights; the release would warn and fill them with random numbers.

    Raises:
        VerticalChunkingError: Weights are missing; the message names some of them.
    """
    released: Any = vars(PreTrainedModel)["from_pretrained"].__func__
    missing: set[str] = set()

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        model, info = released(cls, *args, **kwargs | {"output_loading_info": True})
        missing.update(info["missing_keys"])
        return (model, info) if kwargs.get("output_loading_info") else model

    with Held(lambda: [(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))]):
        yield
    if missing:
        some = ", ".join(sorted(missing)[:3]) + (", ..." if len(missing) > 3 else "")
        raise VerticalChunkingError(
            f"{path}, whose files lack {len(missing)} of the model's weights ({some})",
            "all weights: the model would embed with random numbers in their place",
            "copy or download the model again, or save it again",
        )


def _what_is_there(path: Path) -> str | None:
    """Say why this cannot be the folder of a model; None if it can."""
    if not path.exists():
        return "which does not exist"
    if not path.is_dir():
        return "which is not a folder"
    if not any((path / name).exists() for name in ("config.json", "modules.json")):
        return "a folder without config.json and modules.json"
    return None


def _try(model: SentenceTransformer, path: str) -> None:
    """Let the model read one word, since a failure here would happen for every text."""
    try:
        _need_no_padding_token(model, path)
        with compat.vertical_chunking():
            model.encode_document([WORD], vertical_chunk_size=1)
    except UnsupportedModelError as error:
        raise VerticalChunkingError(
            f"{path}, {error.found}",
            "a recurrent model; `python -m compat status --models` lists all that can be read",
            "give --model one of these",
        ) from error
    except VerticalChunkingError as error:
        if "without vertical_chunk_size" not in error.remedy:
            raise
        # The command has no other way than chunks.
        remedy = "give --model another model"
        raise type(error)(f"{path}, {error.found}", error.needed, remedy) from error
    except Exception as error:
        if is_of_memory(error):
            raise too_little_memory() from error
        if isinstance(error, ValueError) and "makes no token" in str(error):
            if set(model.tokenizer.get_vocab()) - set(model.tokenizer.all_special_tokens):
                return  # The tokenizer may have tokens for other texts.
            raise VerticalChunkingError(
                f"{path}, with a tokenizer of special tokens alone",
                "the files of the tokenizer beside those of the model",
                "save the model again with its tokenizer, or copy tokenizer.json there",
            ) from error
        raise VerticalChunkingError(
            f"{path}, which cannot read one word on {model.device} in {model.dtype} "
            f"({in_short(error)})",
            "a model that can",
            "give another --device, --dtype or --model; --traceback shows where it fails",
        ) from error


def _need_no_padding_token(model: SentenceTransformer, path: str) -> None:
    """Let another special token stand for padding, since no embedding depends on it."""
    tokenizer: Any = getattr(model, "tokenizer", None)
    if tokenizer is None or getattr(tokenizer, "pad_token", "") is not None:
        return
    if not (special := tokenizer.all_special_tokens):
        raise VerticalChunkingError(
            f"{path}, with a tokenizer that has no padding token and no other special token",
            "any token to fill the shorter texts of a batch with; the model does not read it",
            "set tokenizer.pad_token to a token of its vocabulary, and save the model again",
        )
    tokenizer.pad_token = tokenizer.eos_token or special[0]
