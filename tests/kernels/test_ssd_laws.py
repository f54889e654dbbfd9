"""The four laws for mamba-ssm's SSD kernels, forward and backward, run by Triton's interpreter.

A `Case` is a call of `mamba_chunk_scan_combined` or `mamba_split_conv1d_scan_combined` on packed,
padded rows. It is compared with the float64 recurrence of `ssd_oracle.py`, in which every law is
plain to see. Memory beside an input is NaN, and so is memory that a kernel allocates without
filling it.
"""

import collections
import functools
import importlib
import itertools
import math
import sys
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support import ssd_oracle as oracle
from support.ssd_oracle import error
from support.tolerances import KERNEL_SSD, KERNEL_SSD_SLACK, NO_WORSE_FACTOR
from torch.utils._python_dispatch import TorchDispatchMode

from ci import forks
from ci.kernels import interpreter

PAD = -1
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """A call. `rows` are (id, number of tokens) in order; None is a call without `seq_idx`.

    With `splits` the call is made piece by piece, and each piece continues from the states that the
    one before exported. `conv_states` asks for what only the patched fused op has.
    """

    fused: bool = False
    rows: tuple[tuple[tuple[int, int], ...], ...] | None = None
    seqlen: int = 20
    splits: tuple[int, ...] = ()
    initial: bool = False
    conv_states: bool = False
    chunk_size: int = 16
    nheads: int = 2
    headdim: int = 4
    dstate: int = 4
    ngroups: int = 1
    dtype: torch.dtype = torch.float32
    skip: str | None = "head"  # D is per head, per "channel", or absent.
    dt_limit: tuple[float, float] = (0.0, math.inf)
    dt_given: bool = False  # The scan gets dt itself, without bias and softplus.
    z: bool = False
    norm: str | None = None  # The gated RMSNorm comes "before" or "after" the gate.
    d_nonssm: int = 0
    outproj: bool = False
    activation: str | None = "silu"
    seed: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Return (batch, seqlen)."""
        if self.rows is None:
            return 2, self.seqlen
        return len(self.rows), sum(count for _, count in self.rows[0])

    @property
    def seq_idx(self) -> torch.Tensor | None:
        """Return int32 (batch, seqlen), or None."""
        if self.rows is None:
            return None
        ids = [[i for i, count in row for _ in range(count)] for row in self.rows]
        return torch.tensor(ids, dtype=torch.int32)


def inputs(case: Case) -> dict[str, torch.Tensor]:
    """Make the leaves of the call, in the dtypes in which a model has them.

    Decay is slow, 0.3 to 0.9 over an inner chunk, so that a state that is lost or wrong shows.
    """
    torch.manual_seed(case.seed)
    batch, seqlen = case.shape
    heads, headdim, dstate, groups = case.nheads, case.headdim, case.dstate, case.ngroups
    dim = heads * headdim
    conv_dim = dim + 2 * groups * dstate
    model: dict[str, torch.Tensor] = {"A": -0.02 - 0.2 * torch.rand(heads)}
    if not (case.dt_given and not case.fused):
        model["dt_bias"] = torch.randn(heads) - 1
    if case.skip:
        model["D"] = torch.randn(heads) if case.skip == "head" else torch.randn(heads, headdim)
    if case.initial:
        model["initial_states"] = torch.randn(batch, heads, headdim, dstate)
    if case.fused:
        width = 2 * case.d_nonssm + dim + conv_dim + heads
        typed = {
            "zxbcdt": torch.randn(batch, seqlen, width),
            "conv1d_weight": torch.randn(conv_dim, 4) / 2,
            "conv1d_bias": torch.randn(conv_dim) / 2,
        }
        if case.initial and case.conv_states:
            # causal-conv1d asks for this layout: channels last.
            typed["initial_conv_states"] = torch.randn(batch, 3, conv_dim).transpose(1, 2)
        if case.norm:
            typed["rmsnorm_weight"] = 1 + torch.randn(dim) / 4
        if case.outproj:
            typed["outproj_weight"] = torch.randn(5, case.d_nonssm + dim) / 3
            typed["outproj_bias"] = torch.randn(5)
    else:
        typed = {
            "x": torch.randn(batch, seqlen, heads, headdim),
            "dt": torch.randn(batch, seqlen, heads),
            "B": torch.randn(batch, seqlen, groups, dstate),
            "C": torch.randn(batch, seqlen, groups, dstate),
        }
        if case.dt_given:
            typed["dt"] = torch.rand(batch, seqlen, heads)
        if case.z:
            typed["z"] = torch.randn(batch, seqlen, heads, headdim)
    typed = {name: t.to(case.dtype) for name, t in typed.items()}
    return {name: interpreter.guarded(t).requires_grad_() for name, t in (typed | model).items()}


def call_kernels(ops, case: Case, given: dict, seq_idx) -> list[torch.Tensor]:
    """Return output, final SSM states and, where the case has them, final conv states."""
    kwargs = {"chunk_size": case.chunk_size, "seq_idx": seq_idx, "dt_limit": case.dt_limit}
    kwargs |= {"return_final_states": True} | given
    if not case.fused:
        return list(
            ops.ssd_combined.mamba_chunk_scan_combined(**kwargs, dt_softplus=not case.dt_given)
        )
    kwargs |= fused_options(case)
    if case.conv_states:
        kwargs["return_final_conv_states"] = True
    return list(ops.ssd_combined.mamba_split_conv1d_scan_combined(**kwargs))


def call_oracle(_, case: Case, given: dict, seq_idx) -> list[torch.Tensor]:
    """Return the same as `call_kernels`, by the float64 recurrence."""
    kwargs = {"seq_idx": seq_idx, "dt_limit": case.dt_limit} | given
    if not case.fused:
        return list(oracle.scan(**kwargs, dt_softplus=not case.dt_given))
    found = oracle.fused(**kwargs, **fused_options(case))
    return list(found if case.conv_states else found[:2])


def fused_options(case: Case) -> dict:
    return {
        "headdim": case.headdim,
        "ngroups": case.ngroups,
        "activation": case.activation,
        "norm_before_gate": case.norm != "after",
    }


PER_TOKEN = ("x", "dt", "B", "C", "z", "zxbcdt")
STATES = ("initial_states", "initial_conv_states")


def in_pieces(
    call, ops, case: Case, leaves: dict, behind_padding: bool = False
) -> list[torch.Tensor]:
    """Make `call` piece by piece, and join the results.

    The kernels have no place for the convolution's state of a row that begins with padding, and
    drop it; what takes it, `behind_padding`, is given it.
    """
    seq_idx = case.seq_idx
    bounds = [0, *case.splits, case.shape[1]]
    states: dict[str, torch.Tensor] = {n: leaves[n] for n in STATES if n in leaves}
    if seq_idx is not None and "initial_conv_states" in states and not behind_padding:
        begins = (seq_idx[:, 0] != PAD) | (seq_idx == PAD).all(1)
        states["initial_conv_states"] = leaves["initial_conv_states"] * begins[:, None, None]
    outs, last_id = [], None
    for start, end in itertools.pairwise(bounds):
        ids = None if seq_idx is None else seq_idx[:, start:end]
        given = {n: t[:, start:end] if n in PER_TOKEN else t for n, t in leaves.items()} | states
        if ids is not None and last_id is not None:
            # It is the caller's part of the contract that a sequence starting in this piece starts
            # from zeros. A piece without a token hands the state on.
            first = torch.stack([(r[r >= 0][:1] if (r >= 0).any() else r[:1] - 1)[0] for r in ids])
            keep = (first == last_id) | (first < 0) | (last_id < 0)
            for name, t in states.items():
                given[name] = t * keep.view(-1, *[1] * (t.dim() - 1)).to(t.dtype)
        out, *final = call(ops, case, given, ids)
        outs.append(out)
        states = dict(zip(STATES, final, strict=False))
        if ids is not None:
            before = torch.full((len(ids),), PAD) if last_id is None else last_id
            last_id = torch.maximum(before, ids.max(dim=1).values)
    return [torch.cat(outs, dim=1), *states.values()]


def results(
    call, ops, case: Case, leaves: dict | None = None, padding: bool = False
) -> dict[str, torch.Tensor]:
    """Return output, final states, and the gradient of every input, by name.

    Output at padding counts, and gets a gradient, with `padding` only; otherwise it is taken for
    zero.
    """
    leaves = inputs(case) if leaves is None else leaves
    out, *final = in_pieces(call, ops, case, leaves)
    if ops is not None:
        assert out.dtype == case.dtype
        assert [t.dtype for t in final] == [torch.float32, case.dtype][: len(final)]
        ops.check_guards()
    if case.rows is not None and not padding:
        is_token = (case.seq_idx != PAD).view(*case.shape, *[1] * (out.dim() - 2))
        out = torch.where(is_token, out, torch.zeros_like(out))
    named = dict(zip(("out", "final_states", "final_conv_states"), [out, *final], strict=False))
    torch.manual_seed(case.seed + 1)
    # The loss is in float64 all through, so that it adds no error.
    loss = sum(
        (t.double() * torch.randn(t.shape, dtype=torch.float64)).sum() for t in named.values()
    )
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    else:  # The recurrence of rows without a token depends on nothing.
        grads = [torch.zeros_like(leaf) for leaf in leaves.values()]
    if ops is not None:
        ops.check_guards()
    return named | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


@functools.cache
def ops(source: str):
    """Load the Triton ops of the stock or patched tree, with plain torch for the convolution."""
    if reason := interpreter.unavailable():
        pytest.skip(reason)
    tree = forks.sources("mamba-ssm", source)
    return interpreter.mamba_ssm(tree)


@functools.lru_cache(64)
def expected(case: Case) -> dict[str, torch.Tensor]:
    whole = replace(case, splits=())
    return {n: t.detach() for n, t in results(call_oracle, None, whole).items()}


def errors(found: dict, case: Case) -> dict[str, float]:
    want = expected(case)
    term = max([1.0, *(want[f"d{n}"].abs().max().item() for n in PER_TOKEN if f"d{n}" in want)])
    return {n: error(found[n], t, term if n.startswith("d") else 1.0) for n, t in want.items()}


@functools.lru_cache(64)
def computed(source: str, case: Case) -> dict[str, torch.Tensor]:
    return {n: t.detach() for n, t in results(call_kernels, ops(source), case).items()}


def check(source: str, case: Case) -> None:
    """Compare the results of the kernels of `source` with the oracle's for the unsplit rows."""
    found = errors(computed(source, case), case)
    bound = KERNEL_SSD[case.dtype]
    wrong = {name: e for name, e in found.items() if not e <= bound}
    assert not wrong, f"above {bound:g}: " + ", ".join(f"{n} {e:.2g}" for n, e in wrong.items())


# Calls that upstream gets right today, and must in future. The first few belong to every run.
TODAY = {
    "scan, packed, initial state": Case(rows=(((0, 20), (1, 9)), ((0, 3), (7, 26))), initial=True),
    "fused, packed, initial state": Case(
        fused=True, rows=(((0, 20), (1, 5)), ((0, 25),)), initial=True, norm="before", ngroups=2
    ),
    "fused, MLP, out_proj": Case(fused=True, norm="after", d_nonssm=4, outproj=True),
    "scan, bf16": Case(initial=True, z=True, dtype=BF16),
    "scan in pieces": Case(seqlen=37, initial=True, splits=(5, 16)),
    "scan": Case(seqlen=37),
    "scan, packed": Case(rows=(((0, 5), (1, 12), (2, 1), (3, 19)), ((4, 16), (5, 16), (9, 5)))),
    "scan, left padding": Case(rows=(((PAD, 5), (3, 15)), ((PAD, 18), (0, 2)))),
    "scan, z, D per channel, groups": Case(
        z=True, skip="channel", ngroups=2, nheads=4, headdim=5, dstate=7
    ),
    "scan, dt given and limited, no D": Case(dt_given=True, dt_limit=(0.3, 0.6), skip=None),
    "scan, several blocks": Case(
        rows=(((0, 33), (1, 1), (2, 36)), ((0, 70),)), chunk_size=64, headdim=40, initial=True
    ),
    "scan, wide state": Case(dstate=144, initial=True),
    "scan, one token": Case(seqlen=1, initial=True),
    "fused, left padding": Case(
        fused=True, rows=(((PAD, 5), (3, 15)), ((PAD, 18), (0, 2))), norm="after", skip="channel"
    ),
    "fused, no norm, limited": Case(fused=True, outproj=True, dt_limit=(0.1, 0.5), skip="channel"),
    "fused, no activation, bf16": Case(fused=True, norm="before", activation=None, dtype=BF16),
}
TODAY_PARAMS = [
    pytest.param(case, id=name, marks=[pytest.mark.slow] if index > 3 else [])
    for index, (name, case) in enumerate(TODAY.items())
]


@pytest.mark.parametrize("case", TODAY_PARAMS)
@pytest.mark.parametrize("source", ["stock", "patched"])
def test_todays_calls_are_right(source, case):
    check(source, case)


@pytest.mark.parametrize("case", [p for p in TODAY_PARAMS if "left padding" not in p.id])
def test_the_patches_change_no_bit_of_todays_calls(case):
    before, after = dict(computed("stock", case)), computed("patched", case)
    if case.dtype == BF16:
        # A patch says so: the gradient of a float32 state is no longer rounded to bfloat16.
        state, wanted = before.pop("dinitial_states", None), expected(case).get("dinitial_states")
        assert state is None or error(after["dinitial_states"], wanted) <= error(state, wanted)
    differ = [name for name in before if not torch.equal(before[name], after[name])]
    assert not differ


# Rows with all that the contract knows: sequences that end in, at, and after an inner chunk, ids of
# any size, padding at either end, over a whole inner chunk and piece, and over a whole row.
MIXED = (
    ((PAD, 18), (7, 5), (8, 6), (PAD, 3)),
    ((5, 16), (2**30, 4), (2**31 - 1, 12)),
    ((PAD, 32),),
    ((1, 9), (PAD, 23)),
)
# Whole inner chunks; none at all, with a piece of one token.
SPLITS = [(16,), (22, 23)]


def mixed(fused: bool, **options) -> Case:
    if fused:
        # One head is used: two take twice the time, and the scan's cases have them.
        options = {"nheads": 1, "headdim": 8, "norm": "after", "conv_states": True} | options
        options["fused"] = True
    return Case(rows=MIXED, initial=True, **options)


@pytest.mark.parametrize("splits", [SPLITS[1], pytest.param(SPLITS[0], marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(BF16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("fused", [False, True], ids=["scan", "fused"])
def test_chunking_is_invisible(fused, dtype, splits):
    """Expect pieces to be right, and no worse than one; so too the gradients through the states."""
    case = mixed(fused, dtype=dtype)
    check("patched", case)
    pieces = replace(case, splits=splits)
    check("patched", pieces)
    full = errors(computed("patched", case), case)
    for name, found in errors(computed("patched", pieces), pieces).items():
        assert found <= NO_WORSE_FACTOR * full[name] + KERNEL_SSD_SLACK[dtype], name


@pytest.mark.parametrize("fused", [False, True], ids=["scan", "fused"])
def test_padding_is_invisible(fused):
    """Expect padding to change no bit of outputs, states and gradients.

    A gradient that comes in there changes none either, as the output is zero.
    """
    case = mixed(fused)
    leaves = inputs(case)
    with torch.no_grad():
        for name, t in leaves.items():
            if name in PER_TOKEN:
                t[case.seq_idx == PAD] *= -5
    other = results(call_kernels, ops("patched"), case, leaves, padding=True)
    differ = [n for n, t in computed("patched", case).items() if not torch.equal(t, other[n])]
    assert not differ
    for name in PER_TOKEN:
        if name in leaves:
            assert not other[f"d{name}"][case.seq_idx == PAD].any()


@pytest.mark.parametrize("fused", [False, True], ids=["scan", "fused"])
def test_rows_without_padding_launch_what_the_release_does(fused):
    """Count torch's ops and the kernels, forward and backward, with `seq_idx`."""
    case = Case(fused=fused, rows=(((0, 20),),), initial=True, norm="after" if fused else None)
    assert launches("patched", case) == launches("stock", case)


def launches(source: str, case: Case) -> collections.Counter[str]:
    """Count by name what a call launches beside the interpreter's own copies."""
    found: collections.Counter[str] = collections.Counter()
    executor = importlib.import_module("triton.runtime.interpreter").GridExecutor
    released, inside = executor.__call__, [0]

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found[str(func)] += not inside[0]
            return func(*args, **(kwargs or {}))

    def launch(self, *args, **kwargs):
        found[self.fn.__name__] += 1
        inside[0] += 1
        try:
            return released(self, *args, **kwargs)
        finally:
            inside[0] -= 1

    leaves = inputs(case)
    loaded = ops(source)
    with mock.patch.object(executor, "__call__", launch), Count():
        out, *final = call_kernels(loaded, case, leaves, case.seq_idx)
        torch.autograd.grad(
            [out, *final], list(leaves.values()), [torch.ones_like(t) for t in (out, *final)]
        )
    loaded.check_guards()
    assert found["_chunk_scan_fwd_kernel"] == 1
    return +found


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True], ids=["scan", "fused"])
def test_packing_and_batching_are_invisible(fused):
    """Compare a sequence in a packed, padded batch with what the kernels give for it alone."""
    case = mixed(fused)
    leaves = inputs(case)
    out, *final = in_pieces(call_kernels, ops("patched"), case, leaves)
    for row, runs in enumerate(MIXED):
        end = 0
        alone = None
        for index, (i, count) in enumerate(runs):
            start, end = end, end + count
            if i == PAD:
                continue
            # The initial states are the first sequence's, but for the convolution's behind padding.
            first = {"initial_states": all(j == PAD for j, _ in runs[:index])}
            first["initial_conv_states"] = index == 0
            given = {
                n: t[row : row + 1, start:end]
                if n in PER_TOKEN
                else (t[row : row + 1] if first[n] else torch.zeros_like(t[:1]))
                if n in STATES
                else t
                for n, t in leaves.items()
            }
            y, *alone = call_kernels(ops("patched"), case, given, None)
            assert error(out[row, start:end], y[0]) <= KERNEL_SSD[case.dtype]
        for name, batched, single in zip(STATES, final, alone or [], strict=False):
            assert error(batched[row], single[0]) <= KERNEL_SSD[case.dtype], name
        if alone is None:
            for name, batched in zip(STATES, final, strict=False):
                assert torch.equal(batched[row], leaves[name][row]), name


@st.composite
def cases(draw, fused: bool) -> Case:
    """Draw any small call that the contract allows."""
    seqlen = draw(st.integers(1, 40))

    def row():
        left = draw(st.just(0) | st.integers(0, seqlen))
        right = draw(st.just(0) | st.integers(0, seqlen - left))
        tokens = seqlen - left - right
        cuts = draw(st.sets(st.integers(1, max(tokens - 1, 1)), max_size=3)) if tokens > 1 else []
        bounds = [0, *sorted(cuts), tokens]
        current, runs = draw(st.sampled_from([0, 0, 1, 7, 2**30])), [(PAD, left)]
        for start, end in itertools.pairwise(bounds):
            runs.append((current, end - start))
            current += draw(st.integers(1, 3))
        return (*runs, (PAD, right))

    rows = tuple(row() for _ in range(draw(st.integers(1, 3))))
    splits = draw(st.sets(st.integers(1, seqlen - 1), max_size=2)) if seqlen > 1 else ()
    nheads, ngroups = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]))
    case = Case(
        fused=fused,
        rows=draw(st.sampled_from([rows, rows, rows, None])),
        seqlen=seqlen,
        splits=tuple(sorted(splits)),
        initial=draw(st.booleans()),
        conv_states=fused,
        chunk_size=draw(st.sampled_from([16, 16, 32])),
        nheads=nheads,
        ngroups=ngroups,
        # causal-conv1d takes a multiple of 8 channels.
        headdim=draw(st.sampled_from([8, 16] if fused else [4, 5, 8, 16])),
        dstate=draw(st.sampled_from([4, 12, 16] if fused else [4, 7, 16])),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, BF16])),
        skip=draw(st.sampled_from(["head", "channel"] if fused else ["head", "channel", None])),
        dt_limit=draw(st.sampled_from([(0.0, math.inf), (0.2, 0.7)])),
        seed=draw(st.integers(0, 99)),
    )
    if not fused:
        return replace(case, z=draw(st.booleans()), dt_given=draw(st.booleans()))
    return replace(
        case,
        norm=draw(st.sampled_from(["before", "after"])),
        d_nonssm=draw(st.sampled_from([0, 4])),
        outproj=draw(st.booleans()),
        activation=draw(st.sampled_from(["silu", None])),
    )


def any_case(fused: bool):
    """Draw fewer cases than elsewhere, without shrinking, as an example takes some seconds."""

    def decorate(test):
        test = settings(
            max_examples=settings().max_examples // 4,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )(test)
        return pytest.mark.slow(given(case=cases(fused))(test))

    return decorate


@any_case(fused=False)
def test_laws_for_any_scan(case):
    check("patched", case)


@any_case(fused=True)
def test_laws_for_any_fused_op(case):
    check("patched", case)


@any_case(fused=True)
def test_the_oracle_goes_on_from_its_states(case):
    case = replace(case, dtype=torch.float32)
    found, whole = results(call_oracle, None, case), expected(case)
    # Gradients are rounded to the dtype of the inputs, once for each piece.
    for name, value in whole.items():
        assert error(found[name].detach(), value) < (1e-6 if name.startswith("d") else 1e-12), name


@pytest.mark.slow
def test_laws_with_the_convolution_emulated(emulated_conv):
    """Run the fused op with causal-conv1d's own kernels, patched, in place of plain torch."""
    conv = emulated_conv("patched")
    both = interpreter.mamba_ssm(ops("patched").tree, conv=conv)
    case = mixed(True)
    found = errors(results(call_kernels, both, case), case)
    assert max(found.values()) <= KERNEL_SSD[case.dtype], found


# The foundations of the tests.


def test_two_trees_in_one_process_and_neither_in_sys_modules():
    stock, patched = ops("stock"), ops("patched")
    assert stock.ssd_combined is not patched.ssd_combined
    assert stock.ssd_combined.__file__ != patched.ssd_combined.__file__
    assert not [m for m in sys.modules if m.startswith(("mamba_ssm", "causal_conv1d"))]


def test_a_write_beside_an_allocation_is_found():
    stock = ops("stock")
    buffer = stock.ssd_combined.torch.empty(3, 5)
    assert buffer.isnan().all()
    stock.check_guards()
    buffer = stock.ssd_combined.torch.empty(3, 5)
    buffer.as_strided((16,), (1,), buffer.storage_offset())[15] = 0.0
    with pytest.raises(AssertionError, match="of 15 elements"):
        stock.check_guards()


def test_the_stand_in_for_the_convolution_keeps_the_contract():
    case = mixed(True)
    leaves = inputs(case)
    x = leaves["zxbcdt"][..., : leaves["conv1d_weight"].shape[0]]
    given = [x, leaves["conv1d_weight"], leaves["conv1d_bias"], leaves["initial_conv_states"]]
    # A row that begins with padding has no place for an initial state.
    begins = (case.seq_idx[:, 0] != PAD) | (case.seq_idx == PAD).all(1)
    begun = given[3] * begins[:, None, None]
    want = oracle.conv(*given[:3], initial_states=begun, seq_idx=case.seq_idx)
    cotangents = [torch.randn_like(t) for t in want]
    grads = torch.autograd.grad(want, given, cotangents)
    x, w, b, h = (t.detach() for t in given)
    functions = interpreter.conv_stand_in().modules["cpp_functions"]
    final = torch.empty_like(h)
    out = functions.causal_conv1d_fwd_function(
        x.transpose(1, 2), w, b, case.seq_idx, h, final, True
    )
    dx, *rest = functions.causal_conv1d_bwd_function(
        x.transpose(1, 2), w, b, cotangents[0].transpose(1, 2), case.seq_idx, h, cotangents[1],
        None, True, True,
    )  # fmt: skip
    found = [out.transpose(1, 2), final, dx.transpose(1, 2), *rest]
    for got, exact in zip(found, [*want, *grads], strict=True):
        assert error(got, exact.detach()) < KERNEL_SSD[torch.float32]
