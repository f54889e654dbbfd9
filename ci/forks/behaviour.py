"""Run the sources of transformers and sentence-transformers, for the roadmap.

    python -m ci.forks.behaviour LIBRARY

runs the library that comes first on the path, on the tests' tiny models, in float32, and prints a
JSON object: each item of the roadmap, and whether it holds. compat's hooks are off.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Where a library's package is in its sources.
PACKAGES = {"transformers": "src", "sentence-transformers": "."}

# What a model does that has not what is asked for: other numbers, or one of many errors.
NOT_SO = (
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


@functools.cache
def of(library: str, tree: Path) -> dict[str, bool]:
    """Say what holds of the sources in `tree`, found in a process of its own."""
    path = [str(tree / PACKAGES[library]), str(ROOT), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        # ci.forks imports this module, which -m warns of.
        [sys.executable, "-W", "ignore::RuntimeWarning:runpy", "-m", __name__, library],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, bool] = json.loads(run.stdout.splitlines()[-1])
    return found


def holds(check: Callable[[], object]) -> bool:
    """Return whether a check neither raises nor returns False."""
    try:
        return check() is not False
    except NOT_SO:
        return False


def transformers() -> dict[str, bool]:
    """Chunks through a model's own cache against each row alone in one pass."""
    released: Any = importlib.import_module("tests.laws.test_released")  # Needs pytest.
    several, single, drop = released.SEVERAL, released.SINGLE, released.DROP
    padded, padded_single = released.PADDED, released.PADDED_SINGLE
    everything = [several, single, drop, padded, padded_single]
    cases = {
        "Mamba-1 continues from a cached state": [
            (name, case)
            for name in ("mamba", "falcon_mamba", "jamba", "zamba")
            for case in (several, drop, padded)
        ],
        "recurrent_gemma continues from its cache": [("recurrent_gemma", c) for c in everything],
        "minimax continues from its cache": [("minimax", c) for c in (several, drop, padded)],
        "rwkv: one token at a time, and padding": [
            ("rwkv", case) for case in (single, padded, padded_single)
        ],
        "xlstm: padding, and rows that end": [("xlstm", c) for c in (drop, padded, padded_single)],
        "padding in chunks of one token": [
            (name, padded_single) for name in ("mamba2", "falcon_h1", "qwen3_next", "lfm2")
        ],
        "time step clamped in chunks of one token": [
            ("mamba2", released.LIMIT),
            ("nemotron_h", single),
            ("zamba2", single),
        ],
        "left padding where projections have a bias": [
            (name, released.PADDED_BIAS) for name in ("mamba", "mamba2", "falcon_h1", "lfm2")
        ],
    }
    check = released.test_released_models_in_chunks
    found = {
        title: all(holds(functools.partial(check, *case)) for case in own)
        for title, own in cases.items()
    }
    return found | {
        "fused op in plain torch": holds(_fused_in_torch),
        "fused op in inference, with a cache": holds(functools.partial(_fused, several)),
        "left padding inside the fused op": holds(functools.partial(_fused, padded))
        and holds(functools.partial(_fused, released.PADDED_BIAS, use_bias=True)),
        "bamba continues at the right positions": holds(_bamba_without_positions),
    }


def _fused(case: str, **settings: Any) -> bool:
    """Mamba2 with an op that takes the states, as its kernel, against itself without."""
    import torch

    families: Any = importlib.import_module("support.families")
    kernel: Any = importlib.import_module("support.fused_op")
    released: Any = importlib.import_module("tests.laws.test_released")
    right: float = importlib.import_module("support.tolerances").CHUNKED[torch.float32]
    how = released.CASES[case]
    model = families.tiny_model("mamba2", **settings)
    ids, left = families.tokens(3, sum(how["sizes"])), how.get("left", [0, 0, 0])
    with kernel.in_place() as calls:
        found = released.in_chunks(model, ids, **how)
    if not calls:
        return False
    with torch.no_grad():
        errors = [
            (hidden[n:] - model(row[None, n:], use_cache=False)[0][0]).abs().max()
            for row, hidden, n in zip(ids, found, left, strict=True)
        ]
    return bool(max(errors) <= right)


def _fused_in_torch() -> bool:
    """Mamba2 in one pass, with compat's op in plain torch where a kernel would be installed."""
    import torch

    families: Any = importlib.import_module("support.families")
    kernel: Any = importlib.import_module("support.fused_op")
    right: float = importlib.import_module("support.tolerances").CHUNKED[torch.float32]
    model, ids = families.tiny_model("mamba2"), families.tokens(2, 16)
    with torch.no_grad():
        own = model(ids, use_cache=False).last_hidden_state
        with kernel.in_place() as calls:
            found = model(ids, use_cache=False).last_hidden_state
    return bool(calls) and bool((found - own).abs().max() <= right)


def _bamba_without_positions() -> bool:
    import torch

    from compat.installed.recurrent_cache import state_argument, state_of

    families: Any = importlib.import_module("support.families")
    right: float = importlib.import_module("support.tolerances").CHUNKED[torch.float32]
    model, ids = families.tiny_model("bamba"), families.tokens(2, 16)
    with torch.no_grad():
        whole = model(ids, use_cache=False).last_hidden_state
        state = {state_argument(model.forward): state_of(model(ids[:, :9], use_cache=True))}
        rest = model(ids[:, 9:], use_cache=True, **state).last_hidden_state
    return bool((rest - whole[:, 9:]).abs().max() <= right)


def sentence_transformers() -> dict[str, bool]:
    """A text of 40 tokens in chunks of 8, on a tiny Mamba2 with mean pooling."""
    import torch
    from sentence_transformers import SentenceTransformer

    embedders: Any = importlib.import_module("support.embedders")
    right: float = importlib.import_module("support.tolerances").CHUNKED[torch.float32]
    text = embedders.text(40)
    with tempfile.TemporaryDirectory() as folder:
        model = embedders.embedder(embedders.save_checkpoint(Path(folder, "mamba2")))
        whole = model.encode(text, convert_to_tensor=True)

        def chunked(model: SentenceTransformer, method: str = "encode", **options: Any) -> bool:
            # The first time, a model is asked whether it goes on exactly.
            getattr(model, method)("a", **options)
            widths = embedders.record_widths(model)
            found = getattr(model, method)(text, convert_to_tensor=True, **options)
            return max(widths) <= 8 and bool((found - whole).abs().max() <= right)

        def streamed() -> bool:
            seen: list[Any] = []
            model[1].register_forward_pre_hook(
                lambda _, args: seen.append(args[0].get("token_embeddings"))
            )
            model.encode(text, vertical_chunk_size=8)
            return not any(isinstance(tokens, torch.Tensor) for tokens in seen)

        def stored() -> bool:
            model.vertical_chunk_size = 8
            model.save_pretrained(str(Path(folder, "stored")))
            return chunked(SentenceTransformer(str(Path(folder, "stored")), device="cpu"))

        return {
            "encode(vertical_chunk_size=)": all(
                holds(functools.partial(chunked, model, method, vertical_chunk_size=8))
                for method in ("encode", "encode_query", "encode_document")
            ),
            "pooling on a stream of chunks": holds(streamed),
            "a default stored with the model": holds(stored),
        } | {
            title: holds(functools.partial(check, str(Path(folder, "mamba2")), text))
            for title, check in _ENCODERS.items()
        }


def _sparse(checkpoint: str, text: str) -> bool:
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder

    modules = [Transformer(checkpoint), Pooling(32), SparseAutoEncoder(32)]
    model = SparseEncoder(modules=modules, device="cpu")
    return _same(
        model.encode(text, vertical_chunk_size=8).to_dense(), model.encode(text).to_dense()
    )


def _multi_vector(checkpoint: str, text: str) -> bool:
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    modules = [Transformer(checkpoint), MultiVectorMask()]
    model: Any = MultiVectorEncoder(modules=modules, device="cpu")
    return _same(*(model.encode(text, **size) for size in ({"vertical_chunk_size": 8}, {})))


def _cross(checkpoint: str, text: str) -> bool:
    """A language model that scores, which `predict` would read whole without a word."""
    import torch
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder.modules import LogitScore
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(checkpoint)
    transformer = Transformer(checkpoint, transformer_task="text-generation")
    model = CrossEncoder(modules=[transformer, LogitScore(5, 7)], device="cpu")
    activation, widths = torch.nn.Identity(), []
    whole = model.predict([(text, text)], activation_fn=activation)
    embeddings = transformer.model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    found = model.predict([(text, text)], activation_fn=activation, vertical_chunk_size=8)
    return max(widths) < 2 * len(text) and _same(found, whole)


def _same(found: Any, wanted: Any) -> bool:
    import torch

    right: float = importlib.import_module("support.tolerances").CHUNKED[torch.float32]
    found, wanted = torch.as_tensor(found), torch.as_tensor(wanted)
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= right)


_ENCODERS = {
    "SparseEncoder.encode(vertical_chunk_size=)": _sparse,
    "MultiVectorEncoder.encode(vertical_chunk_size=)": _multi_vector,
    "CrossEncoder.predict(vertical_chunk_size=)": _cross,
}


def main(library: str) -> None:
    """Print what holds of the library that can be imported."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sys.path.append(str(ROOT / "tests"))
    checks = {"transformers": transformers, "sentence-transformers": sentence_transformers}
    print(json.dumps(checks[library]()))


if __name__ == "__main__":
    main(sys.argv[1])
