"""Make the calls of the kernels that are measured: their inputs of each shape and mode."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CONV, SSD, SCAN = "causal_conv1d_fn", "mamba_split_conv1d_scan_combined", "selective_scan_fn"
FIRST, PACKED = "channel-first", "seq_idx"
INITIAL, FINAL = "initial states", "final states"
CONV_STATES, STATES = "conv states", "states"
_SEQUENCES = 8  # Of a packed row.


@dataclass(frozen=True)
class Case:
    """A call that is measured.

    Attributes:
        op: One of the three functions.
        shape: (batch, dim, seqlen); of the fused op (batch, seqlen, nheads).
        modes: What is asked for beyond the plain call.
        headdim: Of the fused op.
        dstate: Of the fused op and of the scan.
        chunk_size: Of the fused op.
    """

    op: str
    shape: tuple[int, int, int]
    modes: tuple[str, ...] = ()
    headdim: int = 64
    dstate: int = 128
    chunk_size: int = 256

    @property
    def name(self) -> str:
        """The shape and the modes."""
        heads = f" of {self.headdim}" if self.op == SSD else ""
        return ", ".join([f"{self.shape}{heads}".replace(" ", ""), *(self.modes or ("plain",))])


def _conv(shapes: Iterable[tuple[int, int, int]]) -> list[Case]:
    modes = [(), (FIRST,), (PACKED,), (INITIAL,), (FINAL,), (INITIAL, FINAL), (PACKED, INITIAL)]
    modes.append((PACKED, INITIAL, FINAL))
    return [Case(CONV, shape, one) for shape in shapes for one in modes]


def _ssd(shapes: Iterable[tuple[int, int, int]], **sizes: int) -> list[Case]:
    modes = [(), (PACKED,), (STATES,), (PACKED, STATES), (STATES, CONV_STATES)]
    modes.append((PACKED, STATES, CONV_STATES))
    return [Case(SSD, shape, one, **sizes) for shape in shapes for one in modes]


def _scan(shapes: Iterable[tuple[int, int, int]], dstate: int) -> list[Case]:
    modes = [(), (FINAL,), (INITIAL, FINAL)]
    return [Case(SCAN, shape, one, dstate=dstate) for shape in shapes for one in modes]


CASES = [
    *_conv([(1, 4352, 2048), (8, 4352, 4096), (1, 1792, 131_072), (1, 4352, 128), (1, 4352, 129)]),
    *_ssd([(8, 4096, 24), (8, 4096, 64), (1, 32_768, 24), (1, 32_768, 64)]),
    *_scan([(8, 1536, 2048), (1, 5120, 16_384)], 16),
]
TINY = [
    *_conv([(1, 32, 20)]),
    *_ssd([(1, 20, 2)], headdim=8, dstate=8, chunk_size=16),
    *_scan([(1, 4, 20)], 3),
]

Work = tuple[dict[str, Tensor], Callable[[dict[str, Tensor]], tuple[Tensor, ...]]]
"""Inputs that have a gradient, by name, and what gives the outputs of a call on them."""


def work(case: Case, device: str, dtype: torch.dtype) -> Work:
    """Make random inputs for a case, and the call."""

    def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device, dtype=of)

    return {CONV: _conv_work, SSD: _ssd_work, SCAN: _scan_work}[case.op](case, device, normal)


def _seq_idx(batch: int, seqlen: int, device: str) -> Tensor:
    ids = torch.arange(seqlen, device=device) * _SEQUENCES // seqlen
    return ids.to(torch.int32).expand(batch, seqlen).contiguous()


def _conv_work(case: Case, device: str, normal: Callable[..., Tensor]) -> Work:
    batch, dim, seqlen = case.shape
    fn = importlib.import_module("causal_conv1d").causal_conv1d_fn
    is_first = FIRST in case.modes
    x = normal(batch, dim, seqlen) if is_first else normal(batch, seqlen, dim).transpose(1, 2)
    inputs = {"x": x, "weight": normal(dim, 4), "bias": normal(dim)}
    kwargs: dict[str, Any] = {"activation": "silu", "return_final_states": FINAL in case.modes}
    if PACKED in case.modes:
        kwargs["seq_idx"] = _seq_idx(batch, seqlen, device)
    if INITIAL in case.modes:
        inputs["initial_states"] = normal(batch, 3, dim).transpose(1, 2)
    return inputs, lambda inputs: _tuple(fn(**inputs, **kwargs))


def _ssd_work(case: Case, device: str, normal: Callable[..., Tensor]) -> Work:
    batch, seqlen, nheads = case.shape
    fn = importlib.import_module(
        "mamba_ssm.ops.triton.ssd_combined"
    ).mamba_split_conv1d_scan_combined
    dim = nheads * case.headdim
    channels = dim + 2 * case.dstate
    inputs = {
        "zxbcdt": normal(batch, seqlen, dim + channels + nheads),
        "conv1d_weight": normal(channels, 4),
        "conv1d_bias": normal(channels),
        "dt_bias": normal(nheads, of=torch.float32),
        "A": -normal(nheads, of=torch.float32).exp(),
        "D": normal(nheads, of=torch.float32),
        "rmsnorm_weight": normal(dim),
    }
    kwargs: dict[str, Any] = {
        "chunk_size": case.chunk_size,
        "headdim": case.headdim,
        "norm_before_gate": False,
        "return_final_states": STATES in case.modes,
    }
    if PACKED in case.modes:
        kwargs["seq_idx"] = _seq_idx(batch, seqlen, device)
    if STATES in case.modes:
        state = (batch, nheads, case.headdim, case.dstate)
        inputs["initial_states"] = normal(*state, of=torch.float32)
    if CONV_STATES in case.modes:
        inputs["initial_conv_states"] = normal(batch, 3, channels).transpose(1, 2)
        kwargs["return_final_conv_states"] = True
    return inputs, lambda inputs: _tuple(fn(**inputs, **kwargs))


def _scan_work(case: Case, device: str, normal: Callable[..., Tensor]) -> Work:
    batch, dim, seqlen = case.shape
    module = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    inputs = {
        "u": normal(batch, dim, seqlen),
        "delta": normal(batch, dim, seqlen),
        "A": -normal(dim, case.dstate, of=torch.float32).exp(),
        "B": normal(batch, case.dstate, seqlen),
        "C": normal(batch, case.dstate, seqlen),
        "D": normal(dim, of=torch.float32),
        "z": normal(batch, dim, seqlen),
        "delta_bias": normal(dim, of=torch.float32),
    }
    kwargs: dict[str, Any] = {"delta_softplus": True, "return_last_state": FINAL in case.modes}
    if INITIAL in case.modes:
        inputs["initial_states"] = normal(batch, dim, case.dstate, of=torch.float32)
    return inputs, lambda inputs: _tuple(module.selective_scan_fn(**inputs, **kwargs))


def _tuple(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)
