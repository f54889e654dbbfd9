"""The roadmap, item by item, each with a probe that tells from sources if it is done."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

from ci.forks import behaviour


@dataclass(frozen=True)
class Item:
    """An item of the roadmap, in one library.

    Attributes:
        library: Name of the fork.
        title: What a user gets.
        probe: Tells of a folder with the library's sources whether it is there.
    """

    library: str
    title: str
    probe: Callable[[Path], bool]


def functions(tree: Path, file: str, name: str) -> list[ast.FunctionDef]:
    """The function `name`, or the method `Class.name`, and its overloads, in a file."""
    body: list[ast.stmt] = ast.parse((tree / file).read_text()).body
    *classes, last = name.split(".")
    for wanted in classes:
        body = next(n.body for n in body if isinstance(n, ast.ClassDef) and n.name == wanted)
    return [n for n in body if isinstance(n, ast.FunctionDef) and n.name == last]


def function(tree: Path, file: str, name: str) -> ast.FunctionDef:
    """The function itself, which comes after its overloads."""
    return functions(tree, file, name)[-1]


def takes(file: str, name: str, *parameters: str) -> Callable[[Path], bool]:
    """A probe: the function, and each overload of it, has these parameters."""

    def probe(tree: Path) -> bool:
        return all(
            set(parameters) <= {arg.arg for arg in [*found.args.args, *found.args.kwonlyargs]}
            for found in functions(tree, file, name)
        )

    return probe


def _conv(tree: Path, *, final: bool) -> bool:
    """Run causal_conv1d_ref on a row that continues sequence 3 and then starts sequence 4."""
    import torch

    modules = ["causal_conv1d", "causal_conv1d.cpp_functions", "causal_conv1d_cuda"]
    with patch.dict(sys.modules, {name: MagicMock() for name in modules}):
        interface = tree / "causal_conv1d" / "causal_conv1d_interface.py"
        conv: Any = runpy.run_path(str(interface))["causal_conv1d_ref"]
    x = torch.tensor([[[1.0, 2.0, 4.0, 8.0]]])
    states, weight = torch.tensor([[[16.0, 32.0, 64.0]]]), torch.ones(1, 4)
    seq_idx = torch.tensor([[3, 3, 4, 4]], dtype=torch.int32)
    try:
        out = conv(x, weight, seq_idx=seq_idx, initial_states=states, return_final_states=final)
    except (AssertionError, NotImplementedError, TypeError, ValueError):
        return False
    if final:
        out, state = out
        if state.tolist() != [[[0.0, 4.0, 8.0]]]:
            return False
    return bool(out.tolist() == [[[113.0, 99.0, 4.0, 12.0]]])


def _any_sequence_id(tree: Path) -> bool:
    """The pass over inner chunks does not take the initial state for that of sequence 0."""
    file = "mamba_ssm/ops/triton/ssd_state_passing.py"
    return not any(
        isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == "seq_idx"
        and ast.unparse(node.value) == "0"
        for node in ast.walk(function(tree, file, "_state_passing_fwd_kernel"))
    )


def _continues(tree: Path) -> bool:
    """Mamba2.forward hands a cached call to `step`, for one token, only if it has one token."""
    forward = function(tree, "mamba_ssm/modules/mamba2.py", "Mamba2.forward")
    ifs = [node for node in ast.walk(forward) if isinstance(node, ast.If)]
    around = [node.test for node in ifs if any("self.step(" in ast.unparse(n) for n in node.body)]
    return any(re.search(r"\bseqlen\b|\.shape\b", ast.unparse(test)) for test in around)


def behaves(library: str, title: str) -> Item:
    """An item that is probed by running the sources."""
    return Item(library, title, lambda tree: behaviour.of(library, tree)[title])


SSD = "mamba_ssm/ops/triton/ssd_combined.py"
FUSED = "mamba_split_conv1d_scan_combined"
SCAN = "mamba_ssm/ops/selective_scan_interface.py"

ITEMS = [
    Item("causal-conv1d", "seq_idx with initial_states", partial(_conv, final=False)),
    Item("causal-conv1d", "seq_idx with return_final_states", partial(_conv, final=True)),
    Item("mamba-ssm", "fused op: initial conv states", takes(SSD, FUSED, "initial_conv_states")),
    Item("mamba-ssm", "fused op: final conv states", takes(SSD, FUSED, "return_final_conv_states")),
    Item("mamba-ssm", "initial state for any sequence id", _any_sequence_id),
    Item("mamba-ssm", "Mamba2.forward goes on with several tokens", _continues),
    Item(
        "mamba-ssm",
        "selective_scan_fn(initial_states=)",
        takes(SCAN, "selective_scan_fn", "initial_states"),
    ),
    *(
        behaves("transformers", title)
        for title in (
            "fused op in inference, with a cache",
            "left padding inside the fused op",
            "padding in chunks of one token",
            "time step clamped in chunks of one token",
            "left padding where projections have a bias",
            "Mamba-1 continues from a cached state",
            "bamba continues at the right positions",
            "minimax continues from its cache",
            "recurrent_gemma continues from its cache",
            "rwkv: one token at a time, and padding",
            "xlstm: padding, and rows that end",
        )
    ),
    *(
        behaves("sentence-transformers", title)
        for title in (
            "encode(vertical_chunk_size=)",
            "pooling on a stream of chunks",
            "a default stored with the model",
            "SparseEncoder.encode(vertical_chunk_size=)",
            "MultiVectorEncoder.encode(vertical_chunk_size=)",
            "CrossEncoder.predict(vertical_chunk_size=)",
        )
    ),
]
