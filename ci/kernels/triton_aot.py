"""Compile mamba-ssm's Triton kernels ahead of time, without a device, and compare two trees.

    python -m ci.kernels.triton_aot [--all] [--first] [--target sm_80 …] [STOCK PATCHED]

Every kernel of the files in which the trees differ (`--all`: of all files) is compiled for sm_80,
sm_90 and gfx942, in the configuration with the smallest blocks (`--first`: the first, which has
large ones), for a typical Mamba-2 in bfloat16: without flags ("plain"), with all that the stock
kernel has ("stock's"), and with those that the patches add ("all"). The report is a Markdown table
of registers, bytes of stack (where registers are spilled to) and shared memory, before → after.
Exit status 1 if a kernel does not compile.

A signature is guessed from the names of the parameters, so the numbers show the cost of a patch,
not that of a tuned launch.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ci import forks
from ci.kernels import interpreter

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# Parameters that are no tensors; all others that are neither strides nor compile-time are pointers.
COUNT = re.compile(
    r"batch|seqlen|nheads\w*|ngroups|nchunks|chunk_size|hdim|dim|dstate|ncols|rows_per_program|[KMN]"
)
FLOAT = re.compile(r"eps|dt_min|dt_max")
# Pointers that are not bfloat16, by the start of the parameter's name.
INDEX = re.compile(r"seq_idx|cu_seqlens|state_batch_indices|last_token|first_token")
FLOAT32 = re.compile(
    r"d?d?A(_|$)|d?dA_|dd?t(_|$)|[dD]?D(_|$)|d?cb_|states_|final_|d?initstates|dfinal|Mean|Rstd|D[WB]$"
)
# Values that a launch sets for headdim 64, dstate 128 and inner chunks of 256, and switches that
# are no features. Any other compile-time parameter is a flag, off or on.
CONSTANTS: dict[str, Any] = {
    "BLOCK_N": 1024,
    "BLOCK_SIZE_CHUNK": 256,
    "BLOCK_SIZE_DSTATE": 128,
    "BLOCK_SIZE_K": 64,
    "BLOCK_SIZE_M": 64,
    "BLOCK_SIZE_N": 64,
    "DETERMINISTIC_REDUCTION": False,
    "D_HAS_HDIM": False,
    "IS_RMS_NORM": True,
    "IS_TRITON_22": True,
    "NORM_BEFORE_GATE": False,
    "TIE_HDIM": False,
    "dot_dtype": "bfloat16",
}
# Flags that a kernel refuses in combination with its others, and that upstream never sets.
REFUSED = {"_chunk_scan_bwd_dcb_kernel": {"HAS_DDA_CS"}}


Pick = Callable[[list[Any]], Any]


def first(configs: list[Any]) -> Any:
    """Return the first configuration."""
    return configs[0]


def kernels(tree: Path) -> dict[tuple[str, str], Any]:
    """Return every kernel of a tree, as its decorators left it, by (file, name)."""
    jit = importlib.import_module("triton.runtime").JITFunction
    return {
        (module, name): value
        for module, loaded in interpreter.load(tree).loaded.items()
        for name, value in vars(loaded).items()
        if isinstance(function(value), jit) and name.endswith(("_kernel", "_wip", "_old"))
        if function(value).__module__ == loaded.__name__
    }


def function(kernel: Any) -> Any:
    """Return the function under autotune and heuristics."""
    while hasattr(kernel, "fn") and (hasattr(kernel, "configs") or hasattr(kernel, "values")):
        kernel = kernel.fn
    return kernel


def tuned(kernel: Any, pick: Pick) -> Any:
    """Return one of the configurations of a kernel; None where it has none."""
    while kernel is not None and not hasattr(kernel, "configs"):
        kernel = getattr(kernel, "fn", None)
    return kernel and pick(kernel.configs)


def flags(kernel: Any) -> set[str]:
    """Return the compile-time parameters that switch a feature on."""
    config = tuned(kernel, first)
    known = CONSTANTS.keys() | (config.kwargs.keys() if config else set())
    known |= REFUSED.get(function(kernel).__name__, set())
    return {p.name for p in function(kernel).params if p.is_constexpr} - known


def compiled(kernel: Any, on: set[str], target: str, pick: Pick) -> dict[str, int]:
    """Return registers, stack and shared memory of one kernel with these flags on."""
    triton = importlib.import_module("triton")
    compiler = importlib.import_module("triton.compiler")
    fn, config = function(kernel), tuned(kernel, pick)
    # This is a part of Triton's cache key: otherwise a kernel that only moved is compiled again.
    fn.starting_line_number = 0
    constants = CONSTANTS | {"dot_dtype": importlib.import_module("triton.language").bfloat16}
    names = [p.name for p in fn.params]
    constants = {name: name in on for name in names} | constants | (config.kwargs if config else {})
    signature, constexprs, attrs = {}, {}, {}
    for index, param in enumerate(fn.params):
        name = param.name
        following = names[index + 1].split("_")[:2] if index + 1 < len(names) else []
        if param.is_constexpr:
            signature[name], constexprs[name] = "constexpr", constants[name]
        elif name.startswith("stride_") and name.split("_")[:2] != following:
            signature[name], constexprs[name] = "constexpr", 1  # The last axis is contiguous.
        elif FLOAT.fullmatch(name):
            signature[name] = "fp32"
        else:
            signature[name] = _type(name)
            # Triton finds this for aligned tensors, and for sizes that are multiples of 16.
            attrs[(index,)] = [["tt.divisibility", 16]]
    source = compiler.ASTSource(fn, signature, constexprs, attrs)
    backend = importlib.import_module("triton.backends.compiler").GPUTarget(*TARGETS[target])
    options = {"enable_fp_fusion": True}  # The default; if unset, Triton 3.9 warns of a change.
    if config:
        options |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    result = triton.compile(source, target=backend, options=options)
    found = _cuda_usage(result.asm) if target.startswith("sm_") else _hip_usage(result.asm)
    return found | {"shared": result.metadata.shared}


def _type(name: str) -> str:
    if name.startswith("stride_") or COUNT.fullmatch(name):
        return "i32"
    if INDEX.match(name):
        return "*i32"
    return "*fp32" if FLOAT32.match(name) else "*bf16"


def _cuda_usage(asm: dict[str, Any]) -> dict[str, int]:
    nvidia = importlib.import_module("triton.backends.nvidia")
    tool = Path(str(nvidia.__file__)).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        printed = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    return {
        "registers": _number(r"REG:(\d+)", printed),
        "stack": _number(r"STACK:(\d+)", printed),
    }


def _hip_usage(asm: dict[str, Any]) -> dict[str, int]:
    text = asm["amdgcn"]
    return {
        "registers": _number(r"\.vgpr_count:\s*(\d+)", text),
        "stack": _number(r"\.private_segment_fixed_size:\s*(\d+)", text),
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if not found:
        raise ValueError(f"No {pattern!r} in what the compiler says:\n{text[-500:]}")
    return int(found[1])


def report(
    stock: Path, patched: Path, targets: list[str], pick: Pick, everything: bool
) -> tuple[str, bool]:
    """Return the table as Markdown, and whether everything compiled."""
    before, after = kernels(stock), kernels(patched)
    title = " | ".join(f"{t}: registers, stack bytes, shared KiB" for t in targets)
    lines = [f"| kernel | flags | {title} |", "|---" * (2 + len(targets)) + "|"]
    right = True
    for (module, name), kernel in after.items():
        file = Path("mamba_ssm", "ops", "triton", f"{module}.py")
        if not everything and (stock / file).read_bytes() == (patched / file).read_bytes():
            continue
        old = before.get((module, name))
        old_flags = flags(old) if old else set()
        variants = {"plain": set(), "stock's": old_flags, "all": flags(kernel)}
        if not old_flags:
            del variants["stock's"]
        if variants["all"] in (set(), old_flags):
            del variants["all"]
        for label, on in variants.items():
            cells = []
            for target in targets:
                earlier = _cell(old, on, target, pick) if old and on <= old_flags else "none"
                later = _cell(kernel, on, target, pick)
                # A kernel that Triton could not compile before either is Triton's own matter.
                right &= not later.startswith("fails") or later == earlier
                cells.append(later if earlier == later else f"{earlier} → {later}")
                print(f"{name} {label} {target}: {cells[-1]}", file=sys.stderr, flush=True)
            lines.append(f"| {module}.{name} | {label} | {' | '.join(cells)} |")
    return "\n".join(lines), right


def _cell(kernel: Any, on: set[str], target: str, pick: Pick) -> str:
    try:
        found = compiled(kernel, on, target, pick)
    except Exception as error:  # Any error of the compiler is the result.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"fails: {lines[-1][:150]}"
    return f"{found['registers']}, {found['stack']}, {found['shared'] / 1024:.3g}"


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ci.kernels.triton_aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trees", nargs="*", type=Path, metavar="TREE", help="two, or the forks'")
    parser.add_argument("--all", action="store_true", help="also files that are the same in both")
    parser.add_argument("--first", action="store_true", help="the first configuration of each")
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    options = parser.parse_args()
    if len(options.trees) not in (0, 2):
        parser.error("give two trees, before and after, or none for the fork's")
    if interpreter.unavailable() is None:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled. Unset it.")
    stock, patched = options.trees or (forks.stock("mamba-ssm"), forks.patched("mamba-ssm"))
    table, right = report(
        stock,
        patched,
        options.target or list(TARGETS),
        first if options.first else interpreter.smallest,
        options.all,
    )
    print(table)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
