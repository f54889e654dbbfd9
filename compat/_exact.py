"""Whether a model continues exactly from its state: it is asked, by one pass and by chunks.

No signature says what upstream changes beneath it. So when a model is first read in chunks, the
tiny model of its class is run both ways, once for each class and kind of device; the model in hand
is run instead where its class is not that of its type in transformers, or where no tiny model of
it can be made.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple, cast

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from compat import _tiny, ops
from compat._behaviour import shielded
from compat._errors import UnsupportedModelError, VerticalChunkingError
from compat._family import Family

# One row ends with the second chunk, so that rows are selected. 20 tokens are more than the inner
# chunks and windows of the tiny models.
_CHUNKS = ((0, 9), (9, 11), (11, 20))
_LENGTHS = (20, 11)

# In float32 on a CPU, of the largest hidden state. Sums are taken in another order when a text is
# split, and weights of ten times the usual size amplify that: up to 3e-6 was measured. A lost state
# costs 1e-3 and more.
_TOLERANCE = 3e-5
# Elsewhere matrix products may be rounded to some 10 bits: of what it costs to begin each chunk
# anew, in the mean.
_SHARE = 0.25

_lock = threading.RLock()
_classes: dict[tuple[type, str, str], str] = {}
_models: weakref.WeakKeyDictionary[PreTrainedModel, str] = weakref.WeakKeyDictionary()


class _Errors(NamedTuple):
    """How far chunks are from one pass, as a share of the largest hidden state.

    Attributes:
        largest: Over all tokens.
        mean: Over the tokens behind the first chunk.
    """

    largest: float
    mean: float


def require_exact(backbone: PreTrainedModel, family: Family) -> None:
    """Raise unless a model gives in chunks what it gives in one pass.

    Args:
        backbone: The model without its head.
        family: How its state is carried.

    Raises:
        UnsupportedModelError: It does not; the message has the difference, or what was raised.
    """
    key = (type(backbone), backbone.device.type, ops.backend())
    reason = _models.get(backbone, _classes.get(key))
    if reason is None:
        with _lock:
            reason = _ask(backbone, family, key)
    if reason:
        raise UnsupportedModelError(
            f"{type(backbone).__name__} of transformers {transformers.__version__}, which {reason}",
            "a model that gives in chunks what it gives in one pass",
            "encode it without vertical_chunk_size, or try another release: pip install "
            '"transformers>=5.15,<=5.24"',
        )


def _ask(backbone: PreTrainedModel, family: Family, key: tuple[type, str, str]) -> str:
    tiny = _tiny_of(backbone)
    if tiny is not None:
        _classes[key] = reason = _why_not(tiny, family)
    else:
        _models[backbone] = reason = _why_not(backbone, family)
    return reason


def _tiny_of(backbone: PreTrainedModel) -> PreTrainedModel | None:
    """The tiny model of a model's class, on its device; None where there is none."""
    try:
        with shielded():
            tiny: Any = _tiny.build(_tiny.config(backbone.config.model_type))
            tiny = tiny.to(backbone.device)
    except Exception:  # A release whose configuration takes other values: any error.
        return None
    return tiny if type(tiny) is type(backbone) else None


def _why_not(model: PreTrainedModel, family: Family) -> str:
    """In which way a model is not exact in chunks; empty where it is."""
    with shielded(), torch.device(model.device):
        vocabulary = cast(Any, model.get_input_embeddings()).weight.shape[0]
        shape = (len(_LENGTHS), max(_LENGTHS))
        generator = torch.Generator("cpu").manual_seed(0)
        ids = torch.randint(3, vocabulary, shape, generator=generator, device="cpu")
        ids = ids.to(model.device)
        try:
            whole = _in_one_pass(model, ids)
        except Exception:  # It cannot be run at all, here: nothing to be held to.
            return ""
        try:
            found = _errors(_in_chunks(model, family, ids), whole)
        except VerticalChunkingError:
            raise
        except Exception as error:
            said = str(error).partition("\n")[0]
            return f"cannot be read in chunks ({type(error).__name__}: {said})"
        if model.device.type == "cpu" and model.dtype in (torch.float32, torch.float64):
            exact = found.largest <= _TOLERANCE
        else:
            lost = _errors(_in_chunks(model, family, ids, forgetful=True), whole)
            exact = found.mean <= _SHARE * lost.mean
    return "" if exact else f"is off by {found.largest:.1g} of its largest hidden state in chunks"


def _in_one_pass(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Each row alone, by the released code."""
    with ops.using("released"):
        return [
            model(input_ids=row[None, :n], use_cache=False, return_dict=True).last_hidden_state[0]
            for row, n in zip(ids, _LENGTHS, strict=True)
        ]


def _in_chunks(
    model: PreTrainedModel, family: Family, ids: Tensor, forgetful: bool = False
) -> list[Tensor]:
    """All rows together, as the chunk loop does; or each chunk without its state."""
    pieces: list[list[Tensor]] = [[] for _ in _LENGTHS]
    rows, state = list(range(len(_LENGTHS))), None
    for start, end in _CHUNKS:
        alive = [place for place, row in enumerate(rows) if _LENGTHS[row] > start]
        if len(alive) < len(rows) and state is not None:
            state = family.select_rows(state, torch.tensor(alive, device=ids.device))
        rows = [rows[place] for place in alive]
        hidden, state = family.forward(model, ids[rows, start:end], start, state)
        state = None if forgetful else state
        for row, piece in zip(rows, hidden, strict=True):
            pieces[row].append(piece)
    return [torch.cat(row) for row in pieces]


def _errors(found: list[Tensor], whole: list[Tensor]) -> _Errors:
    scale = max(float(row.abs().max()) for row in whole)
    differences = [
        (a.double() - b.double()).abs() / scale for a, b in zip(found, whole, strict=True)
    ]
    behind = torch.cat([row[_CHUNKS[0][1] :] for row in differences])
    return _Errors(max(float(row.max()) for row in differences), float(behind.mean()))
