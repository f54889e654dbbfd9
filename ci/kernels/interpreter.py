"""Run mamba-ssm's Triton kernels on a CPU: load a tree of its sources under Triton's interpreter.

The kernels run as they are. Only what surrounds them is replaced: the package's `__init__`, which
wants a compiled extension; `torch.cuda.device`, which wants a device; and autotuning, which wants a
clock on one. Of each kernel's configurations the one with the smallest blocks is kept, so that
small shapes need more than one block. Memory that upstream allocates with `torch.empty` is filled
with NaN and lies between guard zones; `check_guards` finds writes to those.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MODULES = (
    "ops.triton.k_activations",
    "ops.triton.layernorm_gated",
    "ops.triton.selective_state_update",
    "ops.triton.ssd_bmm",
    "ops.triton.ssd_chunk_scan",
    "ops.triton.ssd_chunk_state",
    "ops.triton.ssd_combined",
    "ops.triton.ssd_state_passing",
)
# Packages that a tree's modules may import, and that must be as before once they are loaded.
_OWN = ("mamba_ssm", "causal_conv1d", "selective_scan_cuda")
_GUARD = 64  # Elements on either side of an allocation.
# Host code spreads heads over this many processors: few, so that small shapes have a loop to run.
_PROCESSORS = 4


def unavailable() -> str | None:
    """Say why the interpreter cannot be used in this process, and the remedy; None where it can."""
    for package in ("triton", "einops"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: pip install {package} (triton is for Linux only)."
    # Triton decides when it decorates its own library, that is at its first import.
    decorated = importlib.import_module("triton.language").cdiv
    interpreter = importlib.import_module("triton.runtime.interpreter")
    if not isinstance(decorated, interpreter.InterpretedFunction):
        return (
            "Triton was imported without its interpreter (TRITON_INTERPRET is"
            f" {os.environ.get('TRITON_INTERPRET')!r}), so its kernels need a GPU. Set"
            " TRITON_INTERPRET=1 in the environment before Python starts."
        )
    return None


def mamba_ssm(
    tree: Path,
    *,
    conv: Any = None,
    selective_scan_cuda: Any = None,
    modules: tuple[str, ...] = (),
) -> SimpleNamespace:
    """Load the Triton ops of a tree of mamba-ssm, to run on CPU tensors.

    Any number of trees can be loaded in one process; none stays in `sys.modules`.

    Args:
        tree: The directory that holds the package `mamba_ssm`.
        conv: The package `causal_conv1d` to use, as `ci.kernels.emulation` loads it: with what it
            exports, and its submodules in the dictionary `modules`; without it `conv_stand_in()`.
        selective_scan_cuda: The extension module that Mamba-1 needs, if it is called.
        modules: More to load than `MODULES`, such as "modules.mamba2".

    Returns:
        The modules, each under the last part of its name (`ssd_combined`, ...); `importing()`, a
        context for calls of functions that import from `mamba_ssm` when they are called;
        `check_guards()`, which raises if a kernel wrote beside what was allocated since the last
        check; `loaded` and `imported`, the same modules and all that they import, by name; `tree`.

    Raises:
        RuntimeError: Triton is missing, or was imported without its interpreter.
        FileNotFoundError: The tree holds no mamba_ssm.
    """
    if reason := unavailable():
        raise RuntimeError(reason)
    _mend_interpreter()
    found = load(tree, conv=conv, selective_scan_cuda=selective_scan_cuda, modules=modules)
    for name, module in found.imported.items():
        for value in vars(module).values() if name.startswith("mamba_ssm.") else ():
            if hasattr(value, "configs") and hasattr(value, "keys"):  # an Autotuner
                value.configs = [smallest(value.configs)]
    return found


@functools.cache
def _mend_interpreter() -> None:
    """Make Triton's interpreter compute bfloat16 as a GPU does, and faster.

    Triton 3.9.0 keeps bfloat16 as uint16: it multiplies the bit patterns as integers, and truncates
    where it should round. Triton 3.6.0 takes a scalar for an array of one number, of which
    numpy 2.4 makes no index.
    """
    module = importlib.import_module("triton.runtime.interpreter")
    tl = importlib.import_module("triton.language")
    builder, handle = module.InterpreterBuilder, module.TensorHandle
    cast_impl, create_dot, binary_op = builder.cast_impl, builder.create_dot, builder.binary_op

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        kinds = src.dtype.scalar, dst_type.scalar
        if kinds == (tl.float32, tl.bfloat16):
            bits = torch.from_numpy(src.data.copy()).bfloat16().view(torch.uint16)
            return handle(bits.numpy(), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            bits = torch.from_numpy(src.data.copy()).view(torch.bfloat16)
            return handle(bits.float().numpy(), tl.float32)
        return cast_impl(self, src, dst_type)

    def dot(self: Any, a: Any, b: Any, d: Any, *args: Any) -> Any:
        a, b = (cast(self, t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return create_dot(self, a, b, d, *args)

    def binary(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if tl.bfloat16 in (lhs.dtype.scalar, rhs.dtype.scalar):
            raise NotImplementedError(f"{op} of bfloat16: Triton's interpreter would compute bits.")
        return binary_op(self, lhs, rhs, op)

    patch_tensor = module._patch_lang_tensor

    def patched_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    module._patch_lang_tensor = patched_tensor  # type: ignore[attr-defined]
    builder.cast_impl, builder.create_dot, builder.binary_op = cast, dot, binary
    # Half of its time is a check that no index exceeds 2**31; shapes here are tiny.
    object.__setattr__(module.interpreter_builder.options, "sanitize_overflow", False)


def load(
    tree: Path,
    *,
    conv: Any = None,
    selective_scan_cuda: Any = None,
    modules: tuple[str, ...] = (),
) -> SimpleNamespace:
    """Load a tree as `mamba_ssm` does, interpreted or not, with all configurations of kernels."""
    package = tree / "mamba_ssm"
    if not (package / "ops" / "triton" / "ssd_combined.py").is_file():
        raise FileNotFoundError(
            f"{tree} holds no mamba_ssm/ops/triton/ssd_combined.py; a tree of mamba-ssm is needed:"
            " `python -m ci.forks sync` builds it."
        )
    root = ModuleType("mamba_ssm")
    root.__path__ = [str(package)]
    table: dict[str, Any] = {"mamba_ssm": root}
    conv = conv_stand_in() if conv is None else conv
    table["causal_conv1d"] = conv
    table |= {f"causal_conv1d.{part}": module for part, module in conv.modules.items()}
    table["selective_scan_cuda"] = selective_scan_cuda or ModuleType("selective_scan_cuda")
    guards: list[tuple[Tensor, int]] = []
    proxy = _Torch(guards)

    @contextlib.contextmanager
    def importing() -> Iterator[None]:
        before = {name: sys.modules.pop(name) for name in list(sys.modules) if _own(name)}
        sys.modules.update(table)
        try:
            yield
        finally:
            # Modules imported meanwhile stay with this tree.
            table.update({name: sys.modules.pop(name) for name in list(sys.modules) if _own(name)})
            sys.modules.update(before)
            for name, module in table.items():
                if name.startswith("mamba_ssm.") and vars(module).get("torch") is torch:
                    vars(module)["torch"] = proxy

    with importing():
        loaded = {
            name.rpartition(".")[2]: importlib.import_module(f"mamba_ssm.{name}")
            for name in (*MODULES, *modules)
        }

    def check_guards() -> None:
        broken = [flat for flat, size in guards if not _guards_hold(flat, size)]
        guards.clear()
        if broken:
            sizes = ", ".join(str(flat.numel() - 2 * _GUARD) for flat in broken)
            raise AssertionError(f"A kernel wrote beside allocations of {sizes} elements.")

    return SimpleNamespace(
        **loaded,
        loaded=loaded,
        imported=table,
        importing=importing,
        check_guards=check_guards,
        tree=tree,
    )


def _own(name: str) -> bool:
    return name.partition(".")[0] in _OWN


def smallest(configs: list[Any]) -> Any:
    """Return the configuration of a `triton.autotune` with the smallest blocks."""
    return min(configs, key=lambda config: math.prod(config.kwargs.values()))


class _Cuda(ModuleType):
    """torch.cuda without a device: its context does nothing, and its processors are few."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")

    def device(self, index: int | None) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def get_device_properties(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(multi_processor_count=_PROCESSORS)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _Torch(ModuleType):
    """torch as a loaded module sees it: no device, and memory from `empty` is poisoned."""

    def __init__(self, guards: list[tuple[Tensor, int]]) -> None:
        super().__init__("torch")
        self.cuda = _Cuda()
        self._guards = guards

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._guarded(torch.empty(*args, **kwargs))

    def empty_like(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._guarded(torch.empty_like(*args, **kwargs))

    def _guarded(self, like: Tensor) -> Tensor:
        flat, view = _between_guards(like)
        self._guards.append((flat, like.numel()))
        return view


def guarded(tensor: Tensor) -> Tensor:
    """Return a copy with the same strides between NaN, so that reads beside it show in results."""
    return _between_guards(tensor)[1].copy_(tensor)


def _between_guards(like: Tensor) -> tuple[Tensor, Tensor]:
    # `empty_like` is dense whatever the strides were, so that an expanded tensor has room too.
    like = torch.empty_like(like)
    flat = torch.full((like.numel() + 2 * _GUARD,), _poison(like.dtype), dtype=like.dtype)
    return flat, flat.as_strided(like.shape, like.stride(), _GUARD)


def _poison(dtype: torch.dtype) -> float:
    return math.nan if dtype.is_floating_point else 101


def _guards_hold(flat: Tensor, size: int) -> bool:
    zones = torch.cat([flat[:_GUARD], flat[_GUARD + size :]])
    return bool((zones.isnan() if flat.is_floating_point() else zones == 101).all())


def conv_stand_in() -> SimpleNamespace:
    """Return a `causal_conv1d` in plain torch that does what the state contract says, no more.

    Tensors are (batch, dim, seqlen), states (batch, dim, width - 1), weight (dim, width), seq_idx
    (batch, seqlen) with -1 for padding, where the output is 0. It has `causal_conv1d_fn`,
    `causal_conv1d_update` and, in `modules`, `cpp_functions` with upstream's signatures.
    """
    functions = SimpleNamespace(
        causal_conv1d_fwd_function=_conv_fwd,
        causal_conv1d_bwd_function=_conv_bwd,
        causal_conv1d_update_function=_conv_update,
    )
    return SimpleNamespace(
        modules={"cpp_functions": functions},
        causal_conv1d_fn=_conv_fn,
        causal_conv1d_update=_conv_step,
    )


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Return output and final states, in float32, differentiable."""
    batch, dim, seqlen = x.shape
    kept = weight.shape[1] - 1
    if seq_idx is None:
        seq_idx = torch.zeros(batch, seqlen, dtype=torch.int32)
    outs, finals = [], []
    for row in range(batch):
        tokens = (seq_idx[row] >= 0).nonzero()[:, 0]
        ids = seq_idx[row, tokens]
        state = x.new_zeros(dim, kept)
        # A row that begins with padding has no place for an initial state.
        if initial_states is not None and (seq_idx[row, 0] >= 0 or not len(tokens)):
            state = initial_states[row]
        # The initial state's columns belong to the sequence of the first token.
        seen = torch.cat([state.float(), x[row].float()[:, tokens]], dim=1)
        ids = torch.cat([ids[:1].expand(kept) if len(ids) else ids.new_zeros(kept), ids])
        y = x.new_zeros(dim, len(tokens), dtype=torch.float32)
        for lag in range(kept + 1):
            earlier = slice(kept - lag, kept - lag + len(tokens))
            same = (ids[earlier] == ids[kept:]).float()
            y = y + weight[:, kept - lag, None].float() * seen[:, earlier] * same
        if bias is not None:
            y = y + bias[:, None].float()
        y = F.silu(y) if silu else y
        outs.append(y.new_zeros(dim, seqlen).index_copy(1, tokens, y))
        last = seen.shape[1] - kept
        finals.append(seen[:, last:] * (ids[last:] == ids[-1:]).float())
    return torch.stack(outs), torch.stack(finals)


def _conv_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    final_states_out: Tensor | None,
    silu_activation: bool,
) -> Tensor:
    out, final = _conv(x, weight, bias, seq_idx, initial_states, silu_activation)
    if final_states_out is not None:
        final_states_out.copy_(final)
    return torch.empty_like(x).copy_(out)


def _conv_bwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor | None,
    return_dinitial_states: bool,
    silu_activation: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    inputs = [x, weight, bias, initial_states]
    leaves = [None if t is None else t.detach().float().requires_grad_() for t in inputs]
    with torch.enable_grad():
        u, w, b, h = leaves
        assert u is not None
        assert w is not None
        out, final = _conv(u, w, b, seq_idx, h, silu_activation)
        loss = (out * dout.float()).sum()
        if dfinal_states is not None:
            loss = loss + (final * dfinal_states.float()).sum()
        # Where all rows begin with padding, no initial state is used.
        used = [t for t in leaves if t is not None]
        grads = iter(torch.autograd.grad(loss, used, materialize_grads=True))
    du, dw, db, dh = [None if t is None else next(grads).to(t.dtype) for t in inputs]
    assert du is not None
    assert dw is not None
    dx = du if dx is None else dx.copy_(du)
    return dx, dw, db, dh if return_dinitial_states else None


def _conv_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu_activation: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> Tensor:
    if cache_seqlens is not None or conv_state_indices is not None:
        raise NotImplementedError(
            "The stand-in for causal_conv1d knows no cache_seqlens and no conv_state_indices; give"
            " the emulated package as `conv`."
        )
    kept = weight.shape[1] - 1
    out, _ = _conv(x, weight, bias, None, conv_state[..., -kept:], silu_activation)
    conv_state.copy_(torch.cat([conv_state, x], dim=-1)[..., -conv_state.shape[-1] :])
    return out.to(x.dtype)


def _conv_step(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    silu = activation in ("silu", "swish")
    if x.dim() == 2:
        return _conv_update(x[..., None], conv_state, weight, bias, silu, None, None)[..., 0]
    return _conv_update(x, conv_state, weight, bias, silu, None, None)


def _conv_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    silu = activation in ("silu", "swish")
    out, final = (t.to(x.dtype) for t in _conv(x, weight, bias, seq_idx, initial_states, silu))
    if not return_final_states:
        return out
    return out, final if final_states_out is None else final_states_out.copy_(final)
