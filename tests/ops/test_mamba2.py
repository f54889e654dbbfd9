"""Mamba-2's fused op on a CPU, in plain torch and native: the four laws, and gradients.

It is compared with the float64 recurrence of tests/support/ssd_oracle.py, with the calls of
test_ssd_laws.py.
"""

import importlib.util
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ssd_oracle
from support.ssd_oracle import error
from support.tolerances import KERNEL_SSD, KERNEL_SSD_SLACK, NO_WORSE_FACTOR
from torch.utils._python_dispatch import TorchDispatchMode

from ci.bench import profile_layer
from compat import ops
from compat.ops import compiled, mamba2, mamba2_native
from tests.kernels import test_ssd_laws as laws

NAMES = ("out", "final_states", "final_conv_states")
OPS = SimpleNamespace(ssd_combined=mamba2, check_guards=lambda: None)
F32, BF16 = torch.float32, torch.bfloat16

backends = pytest.mark.parametrize("backend", ["torch", "native"])


@contextmanager
def on(backend):
    """Run without gradients on a backend; yield the list of the native kernels' results."""
    if backend == "native" and compiled.library() is None:
        pytest.skip(compiled.reason())
    served = []

    def spied(*args):
        found = mamba2_native.forward(*args)
        if found is not None:
            served.append(found)
        return found

    with pytest.MonkeyPatch.context() as patch, ops.using(backend), torch.no_grad():
        patch.setattr(mamba2, "accelerated", spied)
        yield served
    assert not served or backend == "native"


def computed(backend, case, leaves=None):
    with on(backend) as served:
        leaves = laws.inputs(case) if leaves is None else leaves
        found = laws.in_pieces(laws.call_kernels, OPS, case, leaves, behind_padding=True)
    # The rest the native kernels leave to plain torch.
    if backend == "native" and case.skip == "head" and case.activation:
        assert len(served) == len(case.splits) + 1
    return dict(zip(NAMES, found, strict=True))


def without_padding(out, ids):
    """Put 0 at padding: the op does so, whatever an MLP beside the scan or a bias would give."""
    if ids is None:
        return out
    padding = (ids < 0).view(*ids.shape, *[1] * (out.ndim - 2))
    return out.masked_fill(padding, 0.0)


@torch.no_grad()
def expected(case):
    case = replace(case, splits=())
    found = laws.in_pieces(laws.call_oracle, None, case, laws.inputs(case), behind_padding=True)
    found = dict(zip(NAMES, found, strict=True))
    return found | {"out": without_padding(found["out"], case.seq_idx)}


def errors(found, want):
    return {name: error(found[name], t) for name, t in want.items()}


def check(backend, case):
    found = errors(computed(backend, case), expected(case))
    assert max(found.values()) <= KERNEL_SSD[case.dtype], found


MIXED = laws.mixed(True)


# The laws.


@backends
@settings(max_examples=40)
@given(
    case=laws.cases(True),
    headdim=st.integers(1, 37),
    dstate=st.integers(1, 35),
    norm=st.sampled_from(["before", "after", None]),
)
def test_laws_for_any_call(backend, case, headdim, dstate, norm):
    """Include sizes that fit no vector."""
    check(backend, replace(case, headdim=headdim, dstate=dstate, norm=norm))


@backends
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("splits", laws.SPLITS, ids=str)
def test_chunking_is_invisible(backend, dtype, splits):
    whole = replace(MIXED, dtype=dtype)
    want = expected(whole)
    full = errors(computed(backend, whole), want)
    for name, found in errors(computed(backend, replace(whole, splits=splits)), want).items():
        assert found <= NO_WORSE_FACTOR * full[name] + KERNEL_SSD_SLACK[dtype], name


@backends
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_padding_is_invisible(backend, poison):
    """Expect no bit of outputs and states to depend on it, and outputs of zero there."""
    leaves = laws.inputs(MIXED)
    own = computed(backend, MIXED, leaves)
    padding = MIXED.seq_idx < 0
    with torch.no_grad():
        leaves["zxbcdt"][padding] = poison
    found = computed(backend, MIXED, leaves)
    assert all(torch.equal(found[name], own[name]) for name in NAMES)
    assert not found["out"][padding].any()


@backends
def test_packing_and_batching_are_invisible(backend):
    leaves = laws.inputs(MIXED)
    batch = computed(backend, MIXED, leaves)
    for row, runs in enumerate(MIXED.rows):
        one = {
            n: t[row : row + 1] if n in (*laws.STATES, "zxbcdt") else t for n, t in leaves.items()
        }
        alone = computed(backend, replace(MIXED, rows=(runs,)), one)
        assert all(error(alone[name][0], batch[name][row]) <= KERNEL_SSD[F32] for name in NAMES)
        end = 0
        for index, (i, count) in enumerate(runs):
            start, end = end, end + count
            if i < 0:
                continue
            # The initial states are the first sequence's.
            first = all(j < 0 for j, _ in runs[:index])
            own = {n: t if first or n not in laws.STATES else t * 0 for n, t in one.items()}
            own["zxbcdt"] = own["zxbcdt"][:, start:end]
            found = computed(backend, replace(MIXED, rows=None, seqlen=count), own)
            assert error(found["out"][0], batch["out"][row, start:end]) <= KERNEL_SSD[F32]


def random_call(batch, seqlen, nheads, headdim, dstate, ngroups, width, dtype=F32):
    conv_dim = nheads * headdim + 2 * ngroups * dstate
    given = {
        "zxbcdt": torch.randn(batch, seqlen, nheads * headdim + conv_dim + nheads),
        "conv1d_weight": torch.randn(conv_dim, width) / 2,
        "conv1d_bias": torch.randn(conv_dim) / 2,
        "rmsnorm_weight": 1 + torch.randn(nheads * headdim) / 4,
        "initial_conv_states": torch.randn(batch, conv_dim, width - 1),
    }
    return {name: t.to(dtype) for name, t in given.items()} | {
        "dt_bias": torch.randn(nheads) - 1,
        "A": -0.02 - 0.2 * torch.rand(nheads),
        "D": torch.randn(nheads),
        "initial_states": torch.randn(batch, nheads, headdim, dstate),
        "headdim": headdim,
        "ngroups": ngroups,
        "norm_before_gate": False,
    }


def called(backend, given, native=True):
    with on(backend) as served:
        found = mamba2.mamba_split_conv1d_scan_combined(
            **given, return_final_states=True, return_final_conv_states=True
        )
    assert bool(served) == (backend == "native" and native)
    return found


def assert_right(backend, given, native=True, dtype=F32):
    with torch.no_grad():
        out, *states = ssd_oracle.fused(**given)
        want = (without_padding(out, given.get("seq_idx")), *states)
    for name, found, exact in zip(NAMES, called(backend, given, native), want, strict=True):
        assert error(found, exact) <= KERNEL_SSD[dtype], name


SHAPES = {
    "longer than a block, width 2": (2, 600, 3, 17, 19, 3, 2),
    "many rows": (70, 40, 2, 16, 8, 1, 3),
    "as in a model": (1, 100, 4, 64, 128, 1, 4),
    "shorter than the convolution": (2, 2, 1, 1, 1, 1, 4),
    "one token": (3, 1, 2, 40, 5, 2, 4),
}


@backends
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(backend, shape, dtype):
    given = random_call(*SHAPES[shape], dtype=dtype)
    batch, seqlen = SHAPES[shape][:2]
    assert_right(backend, given, dtype=dtype)
    ids = (torch.rand(batch, seqlen) < 0.02).int().cumsum(1)
    ids[0, : seqlen // 3] = -1
    ids[-1, seqlen // 2 :] = -1
    assert_right(backend, given | {"seq_idx": ids}, dtype=dtype)


@backends
@pytest.mark.parametrize("width", [1, 5])
def test_widths_that_only_plain_torch_has(backend, width):
    assert_right(backend, random_call(2, 30, 2, 8, 4, 1, width), native=False)


@backends
@pytest.mark.parametrize("rate", [1e-6, 1.0, 50.0, 1e4])
def test_decays_from_none_to_all(backend, rate):
    given = random_call(1, 80, 2, 8, 8, 1, 4)
    assert_right(backend, given | {"A": torch.tensor([-rate, -rate / 7])})


@backends
@pytest.mark.parametrize("limit", [(0.0, 0.05), (0.5, 0.6), (20.0, 40.0)], ids=str)
def test_time_steps_are_clamped(backend, limit):
    given = random_call(1, 80, 2, 8, 8, 1, 4)
    assert_right(backend, given | {"dt_limit": limit, "A": torch.tensor([-0.01, -0.002])})


@backends
def test_large_inputs(backend):
    """Use inputs for which exp over- or underflows in SiLU, and softplus is its argument."""
    given = random_call(1, 40, 2, 8, 8, 1, 4)
    given["zxbcdt"] *= torch.tensor([1.0, 100.0]).repeat(20)[:, None]
    assert_right(backend, given | {"A": torch.tensor([-1e-3, -1e-4])})


@backends
def test_without_biases_norm_or_states(backend):
    given = random_call(2, 30, 2, 8, 4, 1, 4)
    lacks = ("rmsnorm_weight", "initial_states", "initial_conv_states")
    given = {n: t for n, t in given.items() if n not in lacks} | {"conv1d_bias": None}
    assert_right(backend, given)
    with on(backend):
        out = mamba2.mamba_split_conv1d_scan_combined(**given)
    assert torch.equal(out, called(backend, given)[0])


@backends
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_memory_layouts_make_no_difference(backend, dtype):
    given = random_call(2, 30, 2, 8, 4, 2, 4, dtype=dtype)
    own = called(backend, given)
    wide = torch.full((2, 70, given["zxbcdt"].shape[2] + 5), torch.nan, dtype=dtype)
    layouts = {
        "channels not side by side": given["zxbcdt"].transpose(1, 2).contiguous().transpose(1, 2),
        "a part": wide[:, 5:65:2, 3:-2].copy_(given["zxbcdt"]),
    }
    reversed_ = {n: given[n].mT.contiguous().mT for n in ("conv1d_weight", *laws.STATES)}
    strided = {n: given[n].repeat_interleave(2)[::2] for n in ("dt_bias", "A", "D")}
    for zxbcdt in layouts.values():
        found = called(backend, given | reversed_ | strided | {"zxbcdt": zxbcdt})
        for a, b in zip(found, own, strict=True):
            assert error(a, b) <= KERNEL_SSD[dtype]


def test_threads_make_no_difference():
    given = random_call(2, 300, 5, 16, 8, 1, 4)
    own = called("native", given)
    try:
        torch.set_num_threads(3)
        found = called("native", given)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(found, own, strict=True))


# Gradients, which plain torch has.


@settings(max_examples=25)
@given(case=laws.cases(True))
def test_gradients_for_any_call(case):
    found = laws.errors(laws.results(laws.call_kernels, OPS, case), case)
    assert max(found.values()) <= KERNEL_SSD[case.dtype], found


@pytest.mark.parametrize("norm", ["before", "after", None])
def test_gradients_in_float64(norm):
    rows = (((-1, 2), (0, 3), (2, 2)), ((0, 6), (-1, 1)), ((-1, 7),))
    case = laws.Case(
        fused=True, rows=rows, initial=True, conv_states=True, chunk_size=4, dtype=torch.float64,
        norm=norm, headdim=2, dstate=2, d_nonssm=1, outproj=True,
    )  # fmt: skip
    leaves = {n: t.detach().double().requires_grad_() for n, t in laws.inputs(case).items()}
    options = laws.fused_options(case) | {"chunk_size": 4, "seq_idx": case.seq_idx}

    def op(*tensors):
        return mamba2.mamba_split_conv1d_scan_combined(
            **dict(zip(leaves, tensors, strict=True)), **options,
            return_final_states=True, return_final_conv_states=True,
        )  # fmt: skip

    assert torch.autograd.gradcheck(op, tuple(leaves.values()), fast_mode=True)


def test_with_gradients_plain_torch_runs():
    given = random_call(1, 9, 2, 8, 4, 1, 4)
    given["zxbcdt"].requires_grad_()
    with ops.using("native" if compiled.library() else "torch"):
        out = mamba2.mamba_split_conv1d_scan_combined(**given)
    assert torch.autograd.grad(out.sum(), given["zxbcdt"])[0].any()


# The file alone, and its arguments.


def test_the_file_needs_torch_only():
    spec = importlib.util.spec_from_file_location("alone", mamba2.__file__)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    assert alone.accelerated is None
    given = random_call(1, 9, 2, 8, 4, 1, 4)
    found = alone.mamba_split_conv1d_scan_combined(**given)
    assert error(found, ssd_oracle.fused(**given)[0]) <= KERNEL_SSD[F32]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"headdim": None}, "headdim"),
        ({"zxbcdt": torch.zeros(1, 0, 42)}, "no token"),
        ({"activation": "gelu"}, "'gelu'"),
        ({"ngroups": 3}, "3 groups"),
        ({"headdim": 20}, "2 heads of 20"),
        ({"initial_states": torch.zeros(1, 2, 4, 8)}, r"\(1, 2, 8, 4\); found \(1, 2, 4, 8\)"),
        ({"initial_conv_states": torch.zeros(1, 3, 24)}, "initial_conv_states"),
        ({"seq_idx": torch.zeros(1, 8, dtype=torch.int32)}, "seq_idx"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        mamba2.mamba_split_conv1d_scan_combined(**random_call(1, 9, 2, 8, 4, 1, 4) | change)


def test_the_profile_of_a_layer_runs(capsys):
    profile_layer.main(["--tokens", "8", "--rounds", "1"])
    printed = capsys.readouterr().out
    for part in ("the floor", "op, torch", "norm and residual", "torch.bfloat16"):
        assert part in printed


class Written(TorchDispatchMode):
    """Counts the numbers that all operations write, views aside."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for part in found if isinstance(found, tuple | list) else [found]:
            if isinstance(part, torch.Tensor) and not func.is_view:
                self.count += part.numel()
        return found


def test_the_backward_takes_time_in_proportion_to_the_length():
    def written(length):
        zxbcdt = torch.randn(1, length, 2 * 32 + 2 * 8 + 2, requires_grad=True)
        weights = torch.randn(48, 4), torch.randn(48), torch.zeros(2), -torch.ones(2), torch.ones(2)
        out = mamba2.mamba_split_conv1d_scan_combined(zxbcdt, *weights, headdim=16)
        with Written() as numbers:
            out.sum().backward()
        return numbers.count

    assert written(64 * 64) <= 4.2 * written(64 * 16)
