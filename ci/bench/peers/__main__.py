"""Measure what else reads a recurrent model on a CPU: `python -m ci.bench.peers [--readme]`.

Compat, and the peers that are installed, take turns at the same random weights and the same 2,048
tokens of one text; the floor is the matrix products of the model's linear layers. What each gives
for the last token is compared with what compat gives, which shows that the work is the same. A peer
that is not installed, or does not take a model, is named below the table, with the reason.

In an environment of its own, with a C++ compiler (llama-cpp-python is built from its source, for a
quarter of an hour):

    python -m pip install --upgrade pip
    CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" python -m pip install -c ci/constraints.txt \
        -e ".[fla]" --group peers
    python -m ci.bench.peers --readme

The source of llama-cpp-python, which has the converter to GGUF, and an environment with
optimum-intel, which needs an older transformers, are fetched by pip on first use, and stay in the
folder `peers-out`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

import compat
from ci.bench.__main__ import measured
from ci.bench.contenders import HYBRID, RWKV7, SMOKE, Sizes, make_model, projections
from ci.bench.peers import by_llama, by_openvino, by_rwkv
from ci.bench.peers.common import CannotReadError, Peer, Place, Read
from ci.bench.profile_layer import rounds
from ci.tables import markers
from compat import ops

MODELS = {
    "Mamba2 130M": "mamba2",
    "Mamba-1 130M": "mamba",
    "four layers of Qwen3.5 0.8B": HYBRID,
    # Last: fla, which has it, gives the name mamba to a model of its own.
    "four layers of RWKV-7 0.4B": RWKV7,
}
PEERS = (by_rwkv.PEER, by_llama.PEER, by_openvino.PEER)
OURS = "compat"
FLOOR = "floor"
DTYPES = ("float32", "bfloat16")
# The last tokens, which alone give something else; a peer that is not nearer than a part of that
# has not done the same work, or not as well.
LAST, NEAR = 16, 0.3

Found = dict[str, list[float]]


def ours(model: PreTrainedModel, chunk: int, ids: Tensor) -> Tensor:
    """Return the last hidden state (hidden,) of the token ids (1, tokens), by compat."""
    with ops.using(ops.backend()), torch.no_grad():
        found = compat.last_hidden_state(model, input_ids=ids, vertical_chunk_size=chunk)
    return found[0].float()


def distance(model: PreTrainedModel, own: Tensor, theirs: Tensor, logits: bool = False) -> float:
    """Return the cosine distance of other hidden states, or logits, from compat's hidden states."""
    if logits:
        embeddings: Any = model.get_input_embeddings()
        own = embeddings.weight.detach().double() @ own.double()
    return max(1 - float(cosine_similarity(own.double(), theirs.double(), dim=0)), 0.0)


def rows(
    title: str, dtype: str, tokens: int, found: Found, distances: dict[str, float], far: float
) -> list[list[str]]:
    """Return the lines of one model: for compat and each peer; a distance from `far` on is bold."""
    lines = []
    for name in distances:
        over, times = (
            statistics.median(a / b for a, b in zip(found[name], found[other], strict=True))
            for other in (FLOOR, OURS)
        )
        away = f"{distances[name]:.0e}"
        if not distances[name] < far:
            away = f"**{away}**"
        speed = f"{tokens / statistics.median(found[name]):,.0f}"
        lines.append([title, dtype, name, speed, f"{over:.2f}", f"{times:.2f}", away])
    return lines


def compare(
    title: str,
    dtype: str,
    sizes: Sizes,
    tokens: int,
    peers: Iterable[Peer],
    place: Place,
    count: int,
) -> tuple[list[list[str]], list[str]]:
    """Let compat and the peers read in turns; return the lines, and why peers do not take part."""
    model = make_model(MODELS[title], sizes, dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (1, tokens), generator=generator)
    exact = model if dtype == "float32" else deepcopy(model).float()
    own, alone = (ours(exact, place.chunk, part) for part in (ids, ids[:, -LAST:]))
    work: dict[str, Callable[[], Any]] = {
        FLOOR: partial(projections, model, tokens, place.chunk),
        OURS: partial(ours, model, place.chunk, ids),
    }
    far = NEAR * distance(model, own, alone)
    distances = {OURS: distance(model, own, ours(model, place.chunk, ids))}
    left_out = []
    for peer in peers:
        try:
            read: Read = peer.reader(model, place)
            distances[peer.name] = distance(model, own, read(ids), peer.logits)
        except CannotReadError as error:
            left_out.append(f"{peer.name}, {title}, {dtype}: {error}.")
        else:
            work[peer.name] = partial(read, ids)
    with torch.no_grad():
        found = rounds(work, count)
    return rows(title, dtype, tokens, found, distances, far), left_out


def absent(peers: Iterable[Peer]) -> tuple[list[Peer], list[str]]:
    """Return the peers that are installed, and a sentence for each that is not."""
    there, notes = [], []
    for peer in peers:
        if peer.installed():
            there.append(peer)
        else:
            notes.append(f"{peer.name}: not installed.")
    return there, notes


def section(
    lines: Sequence[Sequence[str]],
    notes: Sequence[str],
    peers: Iterable[Peer],
    tokens: int,
    chunk: int,
    smoke: bool,
) -> str:
    """Write the section of RESULTS.md."""
    releases = ", ".join(f"{peer.name} {version(peer.name)}" for peer in peers) or "no peer"
    about = (
        f"{measured('peers', smoke)}, {releases}: {tokens:,} tokens of "
        f"one text, {chunk} at a time (OpenVINO: all at once), random weights. *Over the floor*: "
        "time over that of the matrix products of the linear layers, in torch; *over compat*: over "
        "that of compat, beside which 1 is as fast and more is slower; medians of rounds in turns. "
        "*Away*: cosine distance of what the last token gets from what compat gives it in float32 "
        f"from the same weights; bold where it is not far below that of the last {LAST} tokens "
        "alone, where the work is not the same."
    )
    head = ["model", "dtype", "read by", "tokens/s", "over the floor", "over compat", "away"]
    listed = "\n".join(f"- {note}" for note in notes)
    return markers.section(about, markers.table(head, lines), listed, smoke=smoke).rstrip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table as it grows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [peer.name for peer in PEERS]
    parser.add_argument("--only", nargs="*", choices=names, metavar="PEER", help=", ".join(names))
    parser.add_argument("--models", nargs="+", choices=MODELS.values(), default=MODELS.values())
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--output", type=Path, default=Path("peers-out"), metavar="DIR")
    parser.add_argument("--readme", action="store_true", help="write ci/bench/RESULTS.md, too")
    parser.add_argument("--smoke", action="store_true", help="narrow models, short texts, a round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    sizes, count = (SMOKE, 1) if options.smoke else (Sizes(), options.rounds)
    tokens = sizes.text // 4
    asked = [peer for peer in PEERS if options.only is None or peer.name in options.only]
    peers, notes = absent(asked)
    options.output.mkdir(parents=True, exist_ok=True)
    lines = []
    for title, model_type in MODELS.items():
        if model_type not in options.models:
            continue
        if model_type == RWKV7 and not find_spec("fla"):
            notes.append(f"{title}: flash-linear-attention is not installed.")
            continue
        takes = [peer for peer in peers if model_type in peer.models]
        notes += [f"{peer.name} has no {title}." for peer in peers if peer not in takes]
        for dtype in options.dtypes:
            with ExitStack() as stack:
                scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                threads = torch.get_num_threads()
                place = Place(options.output.resolve(), scratch, stack, threads, sizes.chunk)
                found, left_out = compare(title, dtype, sizes, tokens, takes, place, count)
            for line in found:
                print(*line, sep="  ", flush=True)
            for note in left_out:
                print(note, flush=True)
            lines += found
            notes += left_out
    text = section(lines, notes, peers, tokens, sizes.chunk, options.smoke)
    print(f"\n{text}")
    if options.readme:
        markers.put("peers", text, markers.BENCH)


if __name__ == "__main__":
    main()
