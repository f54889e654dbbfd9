"""Mamba-1's scan of `compat.ops`, in torch and native, against a float64 recurrence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.selective_scan_oracle import selective_scan_oracle
from support.tolerances import KERNEL_SELECTIVE_SCAN, error
from torch.utils._python_dispatch import TorchDispatchMode

from compat import ops
from compat.ops import mamba1
from compat.ops.mamba1 import selective_scan_fn

FEW = settings().max_examples // 2
SEQUENCES = ("u", "delta", "B", "C", "z")


def inputs(
    batch=2,
    dim=5,
    seqlen=20,
    dstate=4,
    *,
    seed=0,
    groups=(None, None),
    dtype=torch.float32,
    less=(),
):
    """Make arguments of the scan; groups of B and C: None for no such axis, 0 for constant."""
    random = torch.Generator().manual_seed(seed)

    def randn(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=random).to(dtype)

    def weight(count):
        shapes = {None: (batch, dstate, seqlen), 0: (dim, dstate)}
        return randn(*shapes.get(count, (batch, count, dstate, seqlen)), dtype=dtype)

    found = {
        "u": randn(batch, dim, seqlen, dtype=dtype),
        "delta": randn(batch, dim, seqlen, dtype=dtype),
        "A": -randn(dim, dstate).exp(),
        "B": weight(groups[0]),
        "C": weight(groups[1]),
        "D": randn(dim),
        "z": randn(batch, dim, seqlen, dtype=dtype),
        "delta_bias": randn(dim),
        "delta_softplus": True,
        "initial_states": randn(batch, dim, dstate),
    }
    return {name: value for name, value in found.items() if name not in less}


def exact(arguments):
    return selective_scan_oracle(**to(torch.float64, arguments))


def to(dtype, arguments):
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


@torch.no_grad()
def scan(arguments):
    return selective_scan_fn(**arguments, return_last_state=True)


def share(found, wanted):
    """Return the largest error as a share of the largest value."""
    return error(found, wanted) / wanted.abs().max().item()


def check(found, wanted, dtype=torch.float32):
    (out, last), (wanted_out, wanted_last) = found, wanted
    assert out.dtype == dtype
    assert last.dtype == torch.float32
    assert share(out, wanted_out) <= KERNEL_SELECTIVE_SCAN[dtype]
    assert share(last, wanted_last) <= KERNEL_SELECTIVE_SCAN[torch.float32]


def part(arguments, begin, end):
    return {
        name: value[..., begin:end] if name in SEQUENCES and value.ndim > 2 else value
        for name, value in arguments.items()
    }


@pytest.mark.usefixtures("backend")
class TestLaws:
    @settings(max_examples=FEW)
    @given(
        shape=st.tuples(*(st.integers(1, n) for n in (3, 40, 150, 20))),
        groups=st.tuples(*[st.sampled_from([None, 1, 2, 0])] * 2),
        less=st.sets(st.sampled_from(["D", "z", "delta_bias", "initial_states"])),
        cuts=st.sets(st.integers(1, 149), max_size=3),
        seed=st.integers(0, 9),
    )
    def test_chunking_is_invisible(self, shape, groups, less, cuts, seed):
        batch, dim, seqlen, dstate = shape
        dim += dim % 2 if 2 in groups else 0
        arguments = inputs(batch, dim, seqlen, dstate, seed=seed, groups=groups, less=less)
        pieces, rest = [], dict(arguments)
        ends = [*sorted(cut for cut in cuts if cut < seqlen), seqlen]
        for begin, end in zip([0, *ends], ends, strict=False):
            out, rest["initial_states"] = scan(part(rest, begin, end))
            pieces.append(out)
        check((torch.cat(pieces, -1), rest["initial_states"]), exact(arguments))

    @pytest.mark.parametrize("dstate", [1, 16, 64, 257])
    @pytest.mark.parametrize("dim", [1, 33])
    @pytest.mark.parametrize("seqlen", [1, 2, 63, 64, 65, 129])
    def test_any_size(self, dim, seqlen, dstate):
        arguments = inputs(1, dim, seqlen, dstate)
        check(scan(arguments), exact(arguments))

    @pytest.mark.parametrize("seqlen", [1, 100])
    def test_batching_is_invisible(self, seqlen):
        arguments = inputs(4, 7, seqlen)
        row = {
            name: value[2:3] if name in (*SEQUENCES, "initial_states") else value
            for name, value in arguments.items()
        }
        out, last = scan(arguments)
        check((out[2:3], last[2:3]), exact(row))

    @pytest.mark.parametrize("seqlen", [1, 2, 100])
    @pytest.mark.parametrize("groups", [(None, None), (2, 2), (0, None)])
    def test_bfloat16(self, seqlen, groups):
        arguments = inputs(2, 6, seqlen, 16, groups=groups, dtype=torch.bfloat16)
        check(scan(arguments), exact(arguments), torch.bfloat16)

    def test_a_row_without_a_token_hands_its_state_on(self):
        arguments = inputs(seqlen=0)
        out, last = scan(arguments)
        assert out.shape == (2, 5, 0)
        assert torch.equal(last, arguments["initial_states"])

    def test_the_initial_state_is_left_as_it_was(self):
        arguments = inputs()
        before = arguments["initial_states"].clone()
        scan(arguments)
        assert torch.equal(arguments["initial_states"], before)


def channels_last(x):
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def sliced(x):
    wide = torch.full((*x.shape[:-2], 2 * x.shape[-2] + 1, 3 * x.shape[-1] + 1), float("nan"))
    view = wide.to(x.dtype)[..., 1::2, 1::3]
    view.copy_(x)
    return view


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", [channels_last, sliced])
def test_views_are_read_as_they_lie(view, dtype):
    arguments = inputs(2, 32, 70, groups=(2, None), dtype=dtype)
    viewed = arguments | {name: view(arguments[name]) for name in (*SEQUENCES, "A")}
    viewed["initial_states"] = view(arguments["initial_states"])
    viewed["D"] = torch.stack([arguments["D"]] * 2, 1)[:, 0]
    for found, wanted in zip(scan(viewed), scan(arguments), strict=True):
        assert share(found, wanted.double()) <= KERNEL_SELECTIVE_SCAN[dtype]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("step", [0.0, 1e-6, 50.0, 1e4])
def test_steps_of_any_length(step):
    """Use decays of 1, and decays that underflow, within a block and from one to the next."""
    arguments = inputs(2, 9, 200, 16, less={"delta_bias"}) | {"delta_softplus": False}
    arguments["delta"] = arguments["delta"].abs() * step
    arguments["delta"][..., 77] = 0.5
    check(scan(arguments), exact(arguments))


@pytest.mark.usefixtures("backend")
def test_softplus_of_any_argument():
    arguments = inputs(1, 8, 60, 4)
    arguments["delta"] = torch.linspace(-110, 110, 480).view(1, 8, 60)
    arguments["A"] = -torch.rand(8, 4) * 1e-3  # Otherwise only long steps are seen.
    arguments["delta_bias"] = torch.zeros(8)
    out, last = scan(arguments)
    wanted, wanted_last = exact(arguments)
    # Channels are compared one by one, as the steps of one are 1e-40 and those of another 100.
    for channel in range(8):
        assert share(out[:, channel], wanted[:, channel]) <= KERNEL_SELECTIVE_SCAN[torch.float32]
    assert share(last, wanted_last) <= KERNEL_SELECTIVE_SCAN[torch.float32]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_channel_and_after_its_token(value):
    arguments = inputs(1, 40, 90, 16)
    wanted, _ = scan(arguments)
    arguments["u"][0, 17, 50] = value
    found, last = scan(arguments)
    touched = torch.zeros(1, 40, 90, dtype=torch.bool)
    touched[0, 17, 50:] = True
    assert torch.equal(~found.isfinite(), touched)
    assert not last[0, 17].isfinite().any()
    assert torch.equal(found[~touched], wanted[~touched])


@pytest.mark.parametrize("groups", [(None, None), (2, 0)])
@pytest.mark.parametrize("seqlen", [1, 5])
@pytest.mark.parametrize("piece", [24, 10**6])  # Of two tokens, and of all.
def test_gradients_in_float64(monkeypatch, groups, seqlen, piece):
    monkeypatch.setattr(mamba1, "_PIECE", piece)
    arguments = to(torch.float64, inputs(2, 2, seqlen, 3, groups=groups))
    names = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    values = [arguments[name].requires_grad_() for name in names]

    def run(*given):
        return selective_scan_fn(
            **dict(zip(names, given, strict=True)), delta_softplus=True, return_last_state=True
        )

    assert torch.autograd.gradcheck(run, values)


@pytest.mark.usefixtures("backend")
def test_where_a_gradient_is_wanted_there_is_one():
    arguments = inputs()
    arguments["u"].requires_grad_()
    found, _ = selective_scan_fn(**arguments, return_last_state=True)
    exactly = to(torch.float64, arguments | {"u": arguments["u"].detach()})
    exactly["u"].requires_grad_()
    wanted, _ = selective_scan_oracle(**exactly)
    found.square().sum().backward()
    wanted.square().sum().backward()
    grad = exactly["u"].grad
    assert share(arguments["u"].grad, grad) <= KERNEL_SELECTIVE_SCAN[torch.float32]


class Largest(TorchDispatchMode):
    """A mode that finds the largest tensor that torch makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, tuple | list) else [made]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.untyped_storage().size() // value.itemsize)
        return made


@pytest.mark.parametrize("grad", [False, True])
def test_the_states_of_a_long_text_never_exist_at_one_time(monkeypatch, grad):
    """Count without the native kernel, which keeps none."""
    arguments = inputs(1, 8, 500, 32)
    monkeypatch.setattr(mamba1, "_PIECE", 8 * 32 * 10)
    arguments["u"].requires_grad_(grad)
    with ops.using("torch"), Largest() as largest:
        out = selective_scan_fn(**arguments)
        if grad:
            out.sum().backward()
    longest = max(arguments[name].numel() for name in SEQUENCES)  # B and C, (32, 500).
    assert largest.numel <= longest
    assert longest < 8 * 500 * 32 / 4


def test_native_is_not_given_what_it_cannot_read(backend):
    """Give other dtypes, and tensors without data; the result is that of torch."""
    arguments = to(torch.float64, inputs())
    out, last = scan(arguments)
    wanted, wanted_last = exact(arguments)
    assert out.dtype == last.dtype == torch.float64
    assert max(error(out, wanted), error(last, wanted_last)) <= 1e-12
    meta = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in inputs().items()}
    assert scan(meta)[0].shape == (2, 5, 20)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"A": torch.ones(5, 4, dtype=torch.complex64)}, "A must be real"),
        ({"delta": torch.ones(2, 5, 21)}, r"delta must be of shape \(2, 5, 20\)"),
        ({"z": torch.ones(2, 6, 20)}, "z must be of shape"),
        ({"D": torch.ones(6)}, "D must be of shape"),
        ({"B": torch.ones(2, 3, 20)}, r"B must be of shape \(2, 4, 20\)"),
        ({"C": torch.ones(2, 3, 4, 20)}, "C must have groups that divide dim 5; found 3"),
        ({"initial_states": torch.ones(2, 4, 5)}, "initial_states must be of shape"),
    ],
)
def test_shapes_that_do_not_fit(change, says):
    with pytest.raises(ValueError, match=says):
        scan(inputs() | change)
