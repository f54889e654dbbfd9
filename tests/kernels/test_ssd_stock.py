"""Defects of mamba-ssm's SSD kernels in the pinned release, which the patches mend.

Each is a strict expected failure on the stock sources, with the reason. Calls that are right on
both are in `test_ssd_laws.py`.
"""

import functools
import itertools

import pytest
import torch
from support.ssd_oracle import error
from support.tolerances import KERNEL_SSD

from ci.kernels import interpreter
from tests.kernels.test_ssd_laws import (
    BF16,
    PAD,
    PER_TOKEN,
    Case,
    call_oracle,
    check,
    fused_options,
    inputs,
    mixed,
    ops,
    oracle,
    results,
)

ID_0 = "the initial state is taken to belong to sequence 0, in the forward and in the backward pass"
DECAYS = "dt at padding decays the state on its way to the first token"
FORGETS = (
    "the exported state is that of the row's last column, which is padding: zero, or padding's"
)
NO_CONV_STATE = "the fused op has no conv state, neither in nor out"
MLP = "the backward pass of the fused op with d_nonssm expects both a norm and an out_proj"
VARLEN = "the initial state is dropped where the first sequence ends in the first inner chunk"
REF_GROUPS = "the reference normalizes over all channels, the op over those of a group"
REF_MLP = "the reference knows no d_nonssm, and takes its channels for the state's"
REF_STATES = "the reference has no seq_idx and no states"

WRONG_VALUE = AssertionError
RAISES = {
    NO_CONV_STATE: TypeError,
    MLP: (UnboundLocalError, RuntimeError),
    REF_MLP: RuntimeError,  # The convolution raises it, as its weight does not fit.
    REF_STATES: TypeError,
}

WRONG = {
    "one sequence, id 5": (ID_0, Case(rows=(((5, 20),), ((5, 20),)), initial=True)),
    "large ids, packed": (
        ID_0,
        Case(rows=(((2**30, 20), (2**31 - 1, 17)), ((7, 37),)), initial=True),
    ),
    "in pieces, the second of which continues sequence 1": (
        ID_0,
        Case(rows=(((0, 5), (1, 32)), ((0, 20), (1, 17))), splits=(16,)),
    ),
    "left padding": (
        DECAYS,
        Case(rows=(((PAD, 5), (0, 15)), ((PAD, 15), (0, 5))), initial=True),
    ),
    "left padding over an inner chunk": (
        DECAYS,
        Case(rows=(((PAD, 16), (0, 4)), ((PAD, 18), (0, 2))), initial=True),
    ),
    "right padding": (FORGETS, Case(rows=(((0, 15), (PAD, 5)), ((0, 17), (PAD, 3))))),
    "right padding over inner chunks": (
        FORGETS,
        Case(rows=(((0, 4), (PAD, 33)), ((0, 16), (PAD, 21)))),
    ),
    "a row without a token": (
        FORGETS,
        Case(rows=(((PAD, 20),), ((PAD, 20),)), initial=True),
    ),
    "bf16, left padding and id 3": (
        ID_0,
        Case(rows=(((PAD, 5), (3, 15)), ((PAD, 15), (3, 5))), initial=True, dtype=BF16),
    ),
    "fused, conv states": (
        NO_CONV_STATE,
        Case(fused=True, norm="after", conv_states=True, initial=True),
    ),
    "fused, id 5": (
        ID_0,
        Case(fused=True, norm="before", rows=(((5, 12), (6, 8)), ((5, 20),)), initial=True),
    ),
    "fused, right padding": (
        FORGETS,
        Case(fused=True, norm="after", rows=(((0, 15), (PAD, 5)), ((0, 17), (PAD, 3)))),
    ),
    "fused, MLP, no out_proj": (MLP, Case(fused=True, norm="after", d_nonssm=4)),
    "fused, MLP, no norm": (MLP, Case(fused=True, d_nonssm=4, outproj=True)),
    "fused, MLP, neither": (MLP, Case(fused=True, d_nonssm=4)),
}
FAST = {"one sequence, id 5", "left padding", "right padding", "fused, conv states"}


def stock_and_patched(wrong: dict):
    """Return parameters (source, ...): a strict expected failure on stock, plain on patched."""
    params = []
    for name, (reason, *values) in wrong.items():
        slow = [] if name in FAST else [pytest.mark.slow]
        fails = pytest.mark.xfail(
            strict=True, reason=reason, raises=RAISES.get(reason, WRONG_VALUE)
        )
        params += [
            pytest.param("stock", *values, id=f"stock-{name}", marks=[*slow, fails]),
            pytest.param("patched", *values, id=f"patched-{name}", marks=slow),
        ]
    return params


@pytest.mark.parametrize(("source", "case"), stock_and_patched(WRONG))
def test_wrong_on_stock(source, case):
    check(source, case)


def varlen_errors(source: str, cu_seqlens: list[int], initial: bool) -> list[float]:
    """Return the error of each sequence's `return_varlen_states`, against the sequence alone."""
    bounds = list(itertools.pairwise(cu_seqlens))
    rows = (tuple((i, end - start) for i, (start, end) in enumerate(bounds)),)
    case = Case(rows=rows, initial=initial)
    leaves = {name: t.detach() for name, t in inputs(case).items()}
    *_, states = ops(source).ssd_combined.mamba_chunk_scan_combined(
        **leaves,
        chunk_size=case.chunk_size,
        seq_idx=case.seq_idx,
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
        dt_softplus=True,
        return_varlen_states=True,
    )
    found = []
    for index, (start, end) in enumerate(bounds):
        alone = {n: t[:, start:end] if n in PER_TOKEN else t for n, t in leaves.items()}
        if index:
            alone.pop("initial_states", None)
        found.append(error(states[index], oracle.scan(**alone, dt_softplus=True)[1][0]))
    return found


@pytest.mark.parametrize("source", ["stock", "patched"])
@pytest.mark.parametrize("initial", [False, True])
def test_varlen_states_decay_from_their_own_start(source, initial):
    """Begin and end sequences anywhere in an inner chunk.

    The decay of a state counts from its sequence's first token, and is read there, not at the inner
    chunk's beginning.
    """
    found = varlen_errors(source, [0, 20, 21, 32, 40, 55], initial)
    assert max(found) <= KERNEL_SSD[torch.float32]


@pytest.mark.parametrize(
    ("source", "cu_seqlens"),
    stock_and_patched({"short": (VARLEN, [0, 5, 20]), "one chunk": (VARLEN, [0, 16, 32])}),
)
def test_varlen_state_of_a_short_first_sequence(source, cu_seqlens):
    assert max(varlen_errors(source, cu_seqlens, initial=True)) <= KERNEL_SSD[torch.float32]


@functools.cache
def with_references(source: str):
    """Load a tree with its reference functions.

    They call Mamba-1's CUDA kernel; here they call its reference.
    """
    loaded = interpreter.mamba_ssm(ops(source).tree, modules=("ops.selective_scan_interface",))
    mamba1 = loaded.selective_scan_interface
    mamba1.selective_scan_fn = mamba1.selective_scan_ref
    return loaded


def call_reference(loaded, case: Case, given: dict, seq_idx) -> list[torch.Tensor]:
    """Return output and, where the case has them, final SSM and conv states."""
    kwargs = {"chunk_size": case.chunk_size, "dt_limit": case.dt_limit}
    kwargs |= given | fused_options(case)
    if case.conv_states:
        kwargs |= {"seq_idx": seq_idx}
        kwargs |= {"return_final_states": True, "return_final_conv_states": True}
    with loaded.importing():
        found = loaded.ssd_combined.mamba_split_conv1d_scan_ref(**kwargs)
    return list(found) if case.conv_states else [found]


def check_reference(source: str, case: Case) -> None:
    def want(*args):
        return call_oracle(*args)[: None if case.conv_states else 1]

    found = results(call_reference, with_references(source), case)
    for name, exact in results(want, None, case).items():
        assert error(found[name].detach(), exact.detach()) <= KERNEL_SSD[case.dtype], name


@pytest.mark.slow
@pytest.mark.parametrize("source", ["stock", "patched"])
def test_the_reference_is_right(source):
    check_reference(source, Case(fused=True, norm="after", outproj=True, dt_limit=(0.1, 0.5)))


@pytest.mark.parametrize(
    ("source", "case"),
    stock_and_patched(
        {
            "groups": (REF_GROUPS, Case(fused=True, norm="after", ngroups=2)),
            "MLP": (REF_MLP, Case(fused=True, norm="after", d_nonssm=4, outproj=True)),
            "states": (REF_STATES, mixed(True)),
        }
    ),
)
def test_reference_wrong_on_stock(source, case):
    check_reference(source, case)
