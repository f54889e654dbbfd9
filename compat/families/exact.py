"""Check that a model continues exactly from its state: run it in one pass and in chunks.

No signature tells what upstream has changed beneath it. So when a model is first read in chunks,
the tiny model of its class is run both ways, once for each class and kind of device. In three cases
the tiny model does not stand for the model in hand, which is then run itself, with 20 tokens: its
class or that of a layer is not transformers' or torch's own; a module has a forward of its own or
weights of another kind; or no tiny model can be made.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from compat import ops
from compat.errors import UnsupportedModelError, VerticalChunkingError
from compat.families import tiny_models
from compat.families.base import Family
from compat.installed.behaviour import in_eval_mode, shielded

# One row ends with the second chunk, so that row selection is exercised. The 20 tokens are more
# than the inner chunks and windows of the tiny models.
_CHUNKS = ((0, 9), (9, 11), (11, 20))
_LENGTHS = (20, 11)

# In float32 on a CPU, as a share of the largest hidden state. Splitting a text changes the order in
# which sums are taken, and weights of ten times the usual size amplify that: up to 3e-6 was
# measured. A lost state costs 1e-3 and more.
_TOLERANCE = 3e-5
# On other devices matrix products may be rounded to some 10 bits. There the mean error is compared
# with the mean error of a run that begins each chunk without its state.
_SHARE = 0.25

# The packages whose classes of modules the tiny models are made of.
_OWN = ("torch", "transformers", "kernels")


class Verdicts:
    """Answers to a question about models, each asked once: of a class, or of the model in hand.

    Args:
        ask: Is given a model without its head and how its state is carried; says in which way the
            model fails, and returns an empty str where it does not.
    """

    def __init__(self, ask: Callable[[PreTrainedModel, Family], str]) -> None:
        self._ask = ask
        self._lock = threading.RLock()
        self.classes: dict[tuple[type, str, str], str] = {}
        # For each model, the parts that it consisted of when it was asked, and the verdict.
        self.models: weakref.WeakKeyDictionary[PreTrainedModel, tuple[object, str]]
        self.models = weakref.WeakKeyDictionary()

    def of(self, backbone: PreTrainedModel, family: Family) -> str:
        """Return the verdict on a model, which is asked where nothing is known of it."""
        key = (type(backbone), backbone.device.type, ops.backend())
        own = _is_own(backbone)
        made_of: object = key if own else (_parts(backbone), *key)
        known, reason = self.models.get(backbone, (made_of, None))
        if known != made_of or reason is None:
            reason = self.classes.get(key) if own else None
        if reason is not None:
            return reason
        with self._lock:
            tiny = _tiny_of(backbone) if own else None
            reason = self._ask(tiny or backbone, family)
            if tiny is not None:
                self.classes[key] = reason
            else:
                self.models[backbone] = made_of, reason
        return reason

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Pass over the names of classes of which a model was asked, with the answers."""
        yield from ((cls.__name__, reason) for (cls, *_), reason in self.classes.items())
        yield from ((type(model).__name__, reason) for model, (_, reason) in self.models.items())


class _Errors(NamedTuple):
    """The distance of chunks from one pass, as a share of the largest hidden state.

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
        UnsupportedModelError: The outputs differ, or the model raises; the message
            has the difference or the error.
    """
    _require_independence(backbone)
    if reason := verdicts.of(backbone, family):
        installed = f"transformers {transformers.__version__}"
        raise UnsupportedModelError(
            f"{type(backbone).__name__} with {installed}, which {reason}",
            "a model that gives the same in chunks as in one pass",
            "encode it without vertical_chunk_size, or try another release: pip install "
            '"transformers>=5.15,<=5.24"',
        )


def asked() -> dict[str, str]:
    """Return the verdict on each class or model checked: empty where it is exact, else why not."""
    return dict(verdicts)


def _parts(backbone: PreTrainedModel) -> tuple[object, ...]:
    """Return what a model consists of, to compare it with another time."""
    return tuple((id(m), type(m), "forward" in vars(m)) for m in backbone.modules())


def _is_own(backbone: PreTrainedModel) -> bool:
    """Return whether the tiny model of its class stands for this model, whatever was done to it."""
    modules = all(
        type(m).__module__.partition(".")[0] in _OWN and "forward" not in vars(m)
        for m in backbone.modules()
    )
    return modules and all(type(p) is nn.Parameter for p in backbone.parameters())


def _require_independence(backbone: PreTrainedModel) -> None:
    """Raise where the output of a token depends on the tokens that are run with it."""
    for name, module in backbone.named_modules():
        kind = type(module)
        scaled = kind.__module__.startswith("torch.ao.nn.quantized.dynamic")
        if scaled or kind.__name__ == "Linear8bitLt":  # LLM.int8() of bitsandbytes.
            raise UnsupportedModelError(
                f"a {type(backbone).__name__} whose {name} is a {kind.__module__}.{kind.__name__}, "
                "which scales its inputs over all that runs together",
                "a model whose tokens do not depend on how a text is cut",
                "quantize its weights only, load it in bfloat16, or encode without "
                "vertical_chunk_size",
            )


def _tiny_of(backbone: PreTrainedModel) -> PreTrainedModel | None:
    """Return the tiny model of a model's class, on its device; None where there is none."""
    try:
        with shielded():
            tiny: Any = tiny_models.build(tiny_models.config(backbone.config.model_type))
            tiny = tiny.to(backbone.device)
    except Exception:  # A release may take other configuration values, and raise anything.
        return None
    return tiny if type(tiny) is type(backbone) else None


def _why_not(model: PreTrainedModel, family: Family) -> str:
    """Say in which way a model is not exact in chunks; empty where it is."""
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    with shielded(), device, in_eval_mode(model):
        vocabulary = cast(Any, model.get_input_embeddings()).weight.shape[0]
        shape = (len(_LENGTHS), max(_LENGTHS))
        generator = torch.Generator("cpu").manual_seed(0)
        ids = torch.randint(3, vocabulary, shape, generator=generator, device="cpu")
        ids = ids.to(device)
        try:
            whole = _in_one_pass(model, ids)
        except Exception:  # The model cannot be run here at all, so nothing can be compared.
            return ""
        try:
            found = _errors(_in_chunks(model, family, ids), whole)
        except VerticalChunkingError:
            raise
        except Exception as error:
            said = str(error).partition("\n")[0]
            return f"cannot be read in chunks ({type(error).__name__}: {said})"
        if device.type == "cpu" and model.dtype in (torch.float32, torch.float64):
            exact = found.largest <= _TOLERANCE
        else:
            lost = _errors(_in_chunks(model, family, ids, forgetful=True), whole)
            exact = found.mean <= _SHARE * lost.mean
    return "" if exact else f"is off by {found.largest:.1g} of its largest hidden state in chunks"


def _in_one_pass(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Run each row alone, by the released code."""
    with ops.using("released"):
        return [
            model(input_ids=row[None, :n], use_cache=False, return_dict=True).last_hidden_state[0]
            for row, n in zip(ids, _LENGTHS, strict=True)
        ]


def _in_chunks(
    model: PreTrainedModel, family: Family, ids: Tensor, forgetful: bool = False
) -> list[Tensor]:
    """Run all rows together, as the chunk loop does; if `forgetful`, each chunk without a state."""
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


verdicts = Verdicts(_why_not)
