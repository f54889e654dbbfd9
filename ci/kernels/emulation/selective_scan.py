"""Load the selective-scan interface of a mamba-ssm tree on the emulated extension."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ci.kernels.emulation import _build, _load

# Threads of a block and items of a thread, for rows of up to 128, 256, 512, 1024 and more tokens.
SIZES = ((32, 4), (32, 8), (32, 16), (64, 16), (128, 16))

# The tree's static_switch.h instantiates both values of every switch, which takes minutes. Here the
# rarer values, constant B and C and delta without softplus, are built for the smallest block alone.
SWITCHES = """
#pragma once
#define BOOL_SWITCH(COND, NAME, ...) SWITCH_##NAME(COND, NAME, __VA_ARGS__)
#define EITHER(COND, NAME, ...) [&] { \\
    if (COND) { constexpr bool NAME = true; return __VA_ARGS__(); } \\
    constexpr bool NAME = false; return __VA_ARGS__(); }()
#define TRUE_IN_LARGE(COND, NAME, ...) [&] { \\
    if (COND) { constexpr bool NAME = true; return __VA_ARGS__(); } \\
    if constexpr (kNThreads * kNItems > 128) { emulation::fail("not built: " #NAME " = false"); } \\
    else { constexpr bool NAME = false; return __VA_ARGS__(); } }()
#define SWITCH_kIsEvenLen EITHER
#define SWITCH_kHasZ EITHER
#define SWITCH_kIsVariableB TRUE_IN_LARGE
#define SWITCH_kIsVariableC TRUE_IN_LARGE
#define SWITCH_kDeltaSoftplus TRUE_IN_LARGE
"""

# Half the time of compiling the bindings is autograd's headers, which they do not use.
BINDINGS = """
#include <ATen/ATen.h>
#include <torch/csrc/utils/pybind.h>
namespace torch {
using namespace at;
constexpr auto kFloat32 = at::kFloat;
}
static at::Tensor guarded(const at::Tensor &like) {
    const auto load = py::module_::import("ci.kernels.emulation._load");
    return load.attr("_poisoned")(like).cast<at::Tensor>();
}
"""


def _inlined(name: str, texts: Mapping[str, str], csrc: Path, seen: set[str]) -> str:
    """Return the text with its included headers, except selective_scan.h, in their place.

    Then a mutant of a kernel is another .cu, not another header for all sources.
    """

    def include(match: re.Match[str]) -> str:
        if match[1] == "selective_scan.h" or match[1] not in texts:
            return match[0]
        if match[1] in seen:
            return ""
        seen.add(match[1])
        inner = _inlined(match[1], texts, csrc, seen)
        line = texts[name][: match.start()].count("\n") + 2
        return f'#line 1 "{csrc / match[1]}"\n{inner}\n#line {line} "{csrc / name}"'

    return re.sub(r'^[ \t]*#include "([^"]+)"', include, texts[name], flags=re.MULTILINE)


def _only(text: str, sizes: Sequence[tuple[int, int]]) -> str:
    """Return the text without the launches of other block sizes, which raise instead."""

    def launch(match: re.Match[str]) -> str:
        if (int(match[1]), int(match[2])) in sizes:
            return match[0]
        return f'emulation::fail("not built: {match[1]} threads of {match[2]} items");'

    return re.sub(r"selective_scan_\w+_launch<(\d+), (\d+), [^;]*;", launch, text)


def _guarded(text: str) -> str:
    """Return the text of the bindings, with tensors poisoned and between guard zones."""
    pieces, position = [], 0
    for call in re.finditer(r"torch::(?:empty|(zeros))(?:_like)?\(", text):
        end, depth = call.end(), 1
        while depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        zero = ".zero_()" if call[1] else ""
        pieces += [text[position : call.start()], f"guarded({text[call.start() : end]}){zero}"]
        position = end
    return "".join([*pieces, text[position:]])


def extension(
    tree: Path,
    *,
    types: Sequence[tuple[str, str]] = (("float", "float"),),
    sizes: Sequence[tuple[int, int]] = SIZES,
    sanitize: bool = False,
    replace: Mapping[str, str] | None = None,
) -> Path:
    """Compile a tree's csrc/selective_scan with the given instantiations.

    A call of one that was not built raises.

    Args:
        tree: a mamba-ssm source tree.
        types: (input, weight) types: float, at::Half or at::BFloat16 with float or complex_t.
        sizes: (threads, items) of the blocks.
        sanitize: with the address sanitizer and bounds checks; needs `sanitizer_environment`.
        replace: file name to the text that stands in for what the file has, for mutants.

    Returns:
        The path of the shared object.
    """
    csrc = tree / "csrc" / "selective_scan"
    texts = {path.name: path.read_text() for path in sorted(csrc.iterdir())}
    texts |= dict(replace or {})
    # g++ refuses a name that changes its meaning inside a class; nvcc does not.
    texts["reverse_scan.cuh"] = texts["reverse_scan.cuh"].replace(
        "using WarpReverseScan = WarpReverseScan<", "using WarpReverseScan = ::WarpReverseScan<"
    )
    texts["static_switch.h"] = SWITCHES
    stubs = ""
    for name in [name for name in texts if name.endswith(".cu")]:
        wanted = False
        for line, declaration, *pair in re.findall(
            r"^(template (void \w+<([\w:]+), ([\w:]+)>\([^)]*\));)", texts[name], re.MULTILINE
        ):
            if tuple(pair) in types:
                wanted = True
                continue
            texts[name] = texts[name].replace(line, "")
            declaration = declaration.replace("complex_t", "c10::complex<float>")
            stubs += f'template <> {declaration} {{ emulation::fail("not built: these types"); }}\n'
        texts[name] = _only(_inlined(name, texts, csrc, set()), sizes) if wanted else ""
    for name in texts:
        if name.endswith((".cuh", ".h")) and name != "selective_scan.h":
            texts[name] = ""
    bindings = _guarded(texts["selective_scan.cpp"]).replace("#include <torch/python.h>", BINDINGS)
    start = "void set_ssm_params_fwd("
    texts["selective_scan.cpp"] = bindings.replace(start, stubs + start, 1)
    return _build.build("selective_scan_cuda", csrc, list(types), sanitize, texts)


def _module(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def selective_scan(tree: Path, **options: Any) -> ModuleType:
    """Load `mamba_ssm.ops.selective_scan_interface` of a tree, to run on CPU tensors.

    Args:
        tree: a mamba-ssm source tree.
        options: what `extension` takes.

    Returns:
        The tree's module; `selective_scan_cuda` in it is the emulated extension, `mamba_simple` is
        `mamba_ssm.modules.mamba_simple`. Neither has the convolution or the Triton kernels.
    """
    packages = ("mamba_ssm", "mamba_ssm.utils", "mamba_ssm.ops", "mamba_ssm.ops.triton")
    modules: dict[str, ModuleType | None] = {name: ModuleType(name) for name in packages}
    norms = ModuleType("mamba_ssm.ops.triton.layer_norm")
    norms.__dict__.update(
        dict.fromkeys(("_layer_norm_fwd", "RMSNorm", "layer_norm_fn", "rms_norm_fn"))
    )
    modules |= {
        norms.__name__: norms,
        "causal_conv1d": None,
        "mamba_ssm.ops.triton.selective_state_update": None,
        "mamba_ssm.utils.torch": _module(
            "mamba_ssm.utils.torch", tree / "mamba_ssm/utils/torch.py"
        ),
        "selective_scan_cuda": _load.load_extension(
            "selective_scan_cuda", extension(tree, **options)
        ),
    }
    name = "mamba_ssm.ops.selective_scan_interface"
    with _load.modules_replaced(modules, "mamba_ssm"):
        module = _module(name, tree / "mamba_ssm/ops/selective_scan_interface.py")
        sys.modules[name] = module
        simple = _module(
            "mamba_ssm.modules.mamba_simple", tree / "mamba_ssm/modules/mamba_simple.py"
        )
    module.mamba_simple = simple  # type: ignore[attr-defined]
    return module


def when_used(tree: Path) -> ModuleType:
    """The emulated extension for rows of up to 128 tokens, compiled when it is first called."""
    return _WhenUsed(tree)


class _WhenUsed(ModuleType):
    def __init__(self, tree: Path) -> None:
        super().__init__("selective_scan_cuda")
        self._tree = tree

    def __getattr__(self, name: str) -> Any:
        if name not in ("fwd", "bwd"):
            raise AttributeError(name)
        path = extension(self._tree, sizes=SIZES[:1])
        loaded = _load.load_extension("selective_scan_cuda", path)
        for function in ("fwd", "bwd"):
            setattr(self, function, getattr(loaded, function))
        return getattr(loaded, name)
