"""Readers as files: tensors and their header in safetensors, and whom they belong to."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from compat.errors import VerticalChunkingError
from compat.stream.tokenizer import describe

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

FORMAT = 1
"""The version of the file's format."""

# Their releases decide numbers, or how a state is laid out.
_LIBRARIES = (
    "torch",
    "transformers",
    "sentence-transformers",
    "vertical-chunking",
    "mamba-ssm",
    "causal-conv1d",
    "flash-linear-attention",
    "xlstm",
)
_AGAIN = "read the text again"


def identity(model: SentenceTransformer) -> dict[str, str]:
    """Say what the numbers of a state depend on, each under its name; all weights are hashed."""
    inner: Any = model.transformers_model
    config = _without(inner.config.to_dict(), "_name_or_path", "transformers_version", "dtype")
    modules = [
        # Where texts are cut stands in the reader's own header.
        (type(m).__name__, _without(getattr(m, "get_config_dict", dict)(), "max_seq_length"))
        for m in model
    ]
    own = {
        "weights": _hash(_bytes_of(sorted(model.state_dict().items()))),
        "configuration": _hash_of([config, modules, model.truncate_dim]),
        # Padding and truncation, which each call sets, stand before the added tokens.
        "tokenizer": _hash_of(
            describe(model.tokenizer.backend_tokenizer).partition('"added_tokens"')[2]
        ),
        "dtype": _name_of(model.dtype),
    }
    return own | {library: _release(library) for library in _LIBRARIES}


def check_same(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise where two identities differ.

    Raises:
        VerticalChunkingError: They do; the message names all that differs.
    """
    differing = [name for name in own if saved.get(name) != own[name]]
    if differing:
        said = ", ".join(f"{name} ({saved.get(name)}, now {own[name]})" for name in differing)
        raise VerticalChunkingError(
            f"a saved state of which this differs: {said}",
            "the model, settings and libraries that it was saved with",
            f"load it with those, or {_AGAIN}",
        )


def write(
    path: str | PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> None:
    """Write tensors and a header to a file, which is there whole or not at all."""
    # Parts of one storage would be written apart from one another anyway.
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    said = {"reader": json.dumps(header), "card": _card(plain, header)}
    metadata = {"format": str(FORMAT), **said, "sha256": _hash_of_file(said, plain)}
    place = Path(path)
    handle, name = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(save(plain, metadata))
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(place)
    except BaseException:
        with suppress(FileNotFoundError):
            Path(name).unlink()
        raise


def read(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write` has written: the tensors, and the header.

    Raises:
        OSError: There is no such file.
        VerticalChunkingError: The file is torn, no reader's, or of another format.
    """
    with Path(path).open("rb"):  # Which names the path where there is no such file.
        pass
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _torn(path, str(error)) from error
    digest, release = metadata.pop("sha256", None), metadata.pop("format", None)
    if release != str(FORMAT) or not {"reader"} <= metadata.keys() <= {"reader", "card"}:
        raise VerticalChunkingError(
            f"{path}, which has the format {release or 'of something else'}",
            f"a file that Reader.save wrote, of format {FORMAT}",
            _AGAIN,
        )
    if _hash_of_file(metadata, tensors) != digest:
        raise _torn(path, "its sha256 differs")
    header: dict[str, Any] = json.loads(metadata["reader"])
    return tensors, header


def _torn(path: str | PathLike[str], how: str) -> VerticalChunkingError:
    return VerticalChunkingError(
        f"{path}, which is torn or no file of safetensors ({how})",
        "a whole file, as Reader.save wrote it",
        _AGAIN,
    )


def _card(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """Say in Markdown what a file holds, and what it belongs to."""
    table = [
        f"| {name} | {' x '.join(map(str, tensor.shape))} | {_name_of(tensor.dtype)} |"
        for name, tensor in tensors.items()
    ]
    own = [f"| {name} | {value} |" for name, value in header["identity"].items()]
    lines = [
        f"# The state of a model behind {header['start']:,} tokens of a text",
        "",
        "Written by `compat.Reader.save`. `compat.Reader.load(path, model)` goes on from it, with "
        "a model that has the same:",
        "",
        *("| | |", "|---|---|", *own),
        "",
        "`state.` is the model's state, by the names of `Reader.state()`; `pooling.` has what the "
        "pooling has added up. The text's end, which is not read yet, is in the metadata.",
        "",
        *("| tensor | shape | dtype |", "|---|---|---|", *table),
    ]
    return "\n".join(lines) + "\n"


def _name_of(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _hash_of_file(said: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    texts = [said[name].encode() for name in ("reader", "card") if name in said]
    return _hash([*texts, *_bytes_of(sorted(tensors.items()))])


def _without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


def _bytes_of(tensors: Iterable[tuple[str, Tensor]]) -> Iterable[Any]:
    """The bytes of tensors, and in front of each its name, dtype and shape; nothing is copied."""
    for name, tensor in tensors:
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy()


def _hash(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _hash_of(value: Any) -> str:
    return _hash([json.dumps(value, sort_keys=True, default=str).encode()])


def _release(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"
