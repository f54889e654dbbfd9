"""Defects of the released causal-conv1d, which its patches mend.

Each is a strict expected failure on the release, so that it shows when upstream has mended it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.conv_oracle import causal_conv1d as oracle
from support.tolerances import KERNEL_CONV, KERNEL_CONV_SUMMED

from ci import forks
from ci.kernels import emulation

ROOT = Path(__file__).parents[2]


def released(reason, **kind):
    """Parametrise `conv` by the release, where `reason` fails, and the patched sources."""
    # To compile the release, too, takes a minute: `nox -s test-kernels` does.
    marks = [pytest.mark.slow, pytest.mark.xfail(strict=True, reason=reason, **kind)]
    return pytest.mark.parametrize(
        "conv", [pytest.param("stock", marks=marks), "patched"], indirect=True
    )


@pytest.fixture
def conv(request, emulated_conv):
    return emulated_conv(request.param)


def channel_last(*shape, dtype=torch.float32):
    """Return normal noise (batch, dim, seqlen) with stride 1 along dim."""
    batch, dim, seqlen = shape
    return torch.randn(batch, seqlen, dim).to(dtype).transpose(1, 2)


def parameters(dim, width=4):
    return torch.randn(dim, width, requires_grad=True), torch.randn(dim, requires_grad=True)


def check(got, expected, dtype, weights=()):
    """Compare outputs or gradients; those numbered in `weights` are sums over tokens."""
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        rtol, atol = KERNEL_CONV_SUMMED if number in weights else KERNEL_CONV[dtype]
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol)


@released("channel first: the previous block is not read where less than a vector is left")
@pytest.mark.parametrize(
    ("seqlen", "dtype"),
    [(513, torch.float32), (515, torch.float32), (1025, torch.float32), (1031, torch.bfloat16)],
)
def test_gradients_of_a_channel_first_row_that_ends_shortly_after_a_block(conv, seqlen, dtype):
    x = torch.randn(1, 2, seqlen).to(dtype).requires_grad_()
    weight, bias = parameters(2)
    dout = torch.randn_like(x)
    out = conv.causal_conv1d_fn(x, weight, bias, activation="silu")
    expected, _ = oracle(x, weight, bias, silu=True)
    got = torch.autograd.grad(out, (x, weight, bias), dout)
    check(got, torch.autograd.grad(expected, (x, weight, bias), dout.double()), dtype, (1, 2))


@released("the offset of a block of channels into the gradient leaves out its stride")
@pytest.mark.parametrize(
    ("dim", "dtype"), [(40, torch.float32), (72, torch.float16), (72, torch.bfloat16)]
)
def test_gradient_of_final_states_may_have_any_strides(conv, dim, dtype):
    x = channel_last(2, dim, 10, dtype=dtype).requires_grad_()
    weight, _ = parameters(dim)
    _, final = conv.causal_conv1d_fn(x, weight, return_final_states=True)
    (dx,) = torch.autograd.grad(final.sum(), x)
    expected = torch.zeros_like(x)
    expected[..., -3:] = 1
    assert torch.equal(dx, expected)


READS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from ci.kernels import emulation
torch.set_num_threads(1)
conv = emulation.causal_conv1d(Path(sys.argv[2]), sanitize=True, types=[("float", "float")])
print("loaded", flush=True)
for seqlen in (1, 2, 3):
    for dim in (8, 40):
        x = torch.randn(2, seqlen, dim).transpose(1, 2).requires_grad_()
        state = torch.randn(2, 3, dim).transpose(1, 2).requires_grad_()
        weight = torch.randn(dim, 4)
        rows = torch.tensor([[0] * seqlen, [-1] * seqlen], dtype=torch.int32)
        for ids in (None, rows) if sys.argv[3] else (None,):
            out, final = conv.causal_conv1d_fn(
                x, weight, seq_idx=ids, initial_states=state, return_final_states=True)
            gradients = torch.randn_like(out), torch.randn_like(final)
            torch.autograd.grad((out, final), (x, state), gradients)
print("done", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    [
        pytest.param(
            "stock",
            marks=pytest.mark.xfail(
                strict=True, reason="dfinal_states is read for channels beyond the last"
            ),
        ),
        "patched",
    ],
)
def test_no_read_past_the_gradient_of_final_states(source):
    tree = forks.sources("causal-conv1d", source)
    try:
        environment = os.environ | emulation.sanitizer_environment()
    except emulation.Unavailable as reason:
        pytest.skip(str(reason))
    patched = "1" if source == "patched" else ""
    done = subprocess.run(
        [sys.executable, "-c", READS, str(ROOT), str(tree), patched],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if "loaded" not in done.stdout:
        raise RuntimeError(done.stderr)  # It is neither of the two results.
    assert "AddressSanitizer" not in done.stderr, done.stderr
    assert "done" in done.stdout, done.stderr


@released("the output gradient at padding is taken for that of a token")
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("seqlen", [20, 150])
def test_no_gradient_comes_from_padding(conv, seqlen, silu):
    x = channel_last(3, 40, seqlen).requires_grad_()
    weight, bias = parameters(40)
    seq_idx = torch.zeros(3, seqlen, dtype=torch.int32)
    seq_idx[0, -7:] = -1
    seq_idx[1, :9] = -1
    seq_idx[2] = -1
    dout = torch.randn_like(x)
    out = conv.causal_conv1d_fn(
        x, weight, bias, seq_idx=seq_idx, activation="silu" if silu else None
    )
    expected, _ = oracle(x, weight, bias, seq_idx=seq_idx, silu=silu)
    check([out], [expected], torch.float32)
    got = torch.autograd.grad(out, (x, weight, bias), dout)
    expected = torch.autograd.grad(expected, (x, weight, bias), dout.double())
    check(got, expected, torch.float32, (1, 2))


@released("x that is expanded along time is taken for channel first")
def test_x_may_be_expanded_along_time(conv):
    x = torch.randn(2, 16, 1).expand(2, 16, 20)
    weight, bias = parameters(16)
    out = conv.causal_conv1d_fn(x, weight, bias)
    check([out], [oracle(x, weight, bias)[0]], torch.float32)


@released("vectors are loaded from any address", raises=RuntimeError)
@pytest.mark.parametrize("start", [0, 1])
def test_channel_first_rows_need_not_be_aligned(conv, start):
    x = torch.randn(2, 3, 513)[..., start : start + 512].requires_grad_()
    dout = torch.randn(2, 3, 513)[..., 1 - start : 513 - start]
    weight, bias = parameters(3)
    out = conv.causal_conv1d_fn(x, weight, bias)
    expected, _ = oracle(x, weight, bias)
    check([out], [expected], torch.float32)
    got = torch.autograd.grad(out, (x, weight, bias), dout)
    expected = torch.autograd.grad(expected, (x, weight, bias), dout.double())
    check(got, expected, torch.float32, (1, 2))


@released("vectors are loaded from any address", raises=AssertionError)
def test_channel_last_x_that_is_not_aligned_is_refused(conv):
    x = torch.randn(2, 20, 24)[..., 1:17].transpose(1, 2)
    with pytest.raises(RuntimeError, match=r"multiples of 16 bytes.* copy it"):
        conv.causal_conv1d_fn(x, parameters(16)[0])


@released("vectors are loaded from any address, odd strides are refused", raises=RuntimeError)
@pytest.mark.parametrize("view", [(25, 0), (24, 1)])
def test_output_gradient_need_not_be_aligned(conv, view):
    channels, start = view
    x = channel_last(2, 16, 20).requires_grad_()
    weight, bias = parameters(16)
    dout = torch.randn(2, 20, channels)[..., start : start + 16].transpose(1, 2)
    out = conv.causal_conv1d_fn(x, weight, bias)
    expected, _ = oracle(x, weight, bias)
    got = torch.autograd.grad(out, (x, weight, bias), dout)
    expected = torch.autograd.grad(expected, (x, weight, bias), dout.double())
    check(got, expected, torch.float32, (1, 2))


STATES = {
    "contiguous": lambda: torch.randn(2, 16, 3),
    "odd strides": lambda: torch.randn(2, 3, 17)[..., :16].transpose(1, 2),
    "odd start": lambda: torch.randn(2, 3, 24)[..., 1:17].transpose(1, 2),
    "every second": lambda: torch.randn(2, 16, 6)[..., ::2],
}


@released(
    "states are loaded as vectors, and only channel last", raises=(RuntimeError, AssertionError)
)
@pytest.mark.parametrize("layout", STATES)
def test_states_may_have_any_layout(conv, layout):
    x = channel_last(2, 16, 20).requires_grad_()
    weight, bias = parameters(16)
    initial = STATES[layout]().requires_grad_()
    given = STATES[layout]()
    out, final = conv.causal_conv1d_fn(
        x,
        weight,
        bias,
        initial_states=initial,
        return_final_states=True,
        final_states_out=given,
    )
    expected_out, expected_final = oracle(x, weight, bias, initial_states=initial)
    check([out, given], [expected_out, expected_final], torch.float32)
    inputs = (x, initial, weight, bias)
    gradients = torch.randn_like(out), torch.randn_like(final)
    got = torch.autograd.grad((out, final), inputs, gradients)
    expected = torch.autograd.grad(
        (expected_out, expected_final), inputs, [g.double() for g in gradients]
    )
    check(got, expected, torch.float32, (2, 3))


@released("a copy of initial_states is not seen to need a gradient", raises=RuntimeError)
def test_the_gradient_of_initial_states_survives_their_copy(conv):
    initial = torch.randn(2, 16, 2)[..., ::2].requires_grad_()
    x, (weight, bias) = channel_last(2, 16, 20), parameters(16, width=2)
    out = conv.causal_conv1d_fn(x, weight, bias, initial_states=initial)
    expected, _ = oracle(x, weight, bias, initial_states=initial)
    got = torch.autograd.grad(out.sum(), initial)
    check(got, torch.autograd.grad(expected.sum(), initial), torch.float32)


@released("states are taken for overwritten ones in backward", raises=AssertionError)
def test_states_may_be_updated_in_place(conv):
    x, states = channel_last(2, 16, 150).requires_grad_(), channel_last(2, 16, 3)
    weight, bias = parameters(16)
    expected, expected_final = oracle(x, weight, bias, initial_states=states.clone(), silu=True)
    out, _ = conv.causal_conv1d_fn(
        x,
        weight,
        bias,
        initial_states=states,
        return_final_states=True,
        final_states_out=states,
        activation="silu",
    )
    check([out, states], [expected, expected_final], torch.float32)
    got = torch.autograd.grad(out.sum(), (x, weight, bias))
    check(got, torch.autograd.grad(expected.sum(), (x, weight, bias)), torch.float32, (1, 2))


@released("one token is taken for channel first", raises=(RuntimeError, AssertionError))
@pytest.mark.parametrize("cut", [False, True])
def test_one_token_with_states(conv, cut):
    x = torch.randn(2, 16, 8)[..., 4:5] if cut else torch.randn(2, 16, 1)
    x.requires_grad_()
    initial = channel_last(2, 16, 3).requires_grad_()
    weight, bias = parameters(16)
    got = conv.causal_conv1d_fn(x, weight, bias, initial_states=initial, return_final_states=True)
    expected = oracle(x, weight, bias, initial_states=initial)
    check(got, expected, torch.float32)
    inputs = (x, initial, weight, bias)
    gradients = [torch.randn_like(t) for t in got]
    got = torch.autograd.grad(got, inputs, gradients)
    expected = torch.autograd.grad(expected, inputs, [g.double() for g in gradients])
    check(got, expected, torch.float32, (2, 3))


@released("an empty grid is launched", raises=RuntimeError)
@pytest.mark.parametrize(("batch", "seqlen"), [(0, 5), (2, 0)])
def test_nothing_to_do(conv, batch, seqlen):
    x = channel_last(batch, 16, seqlen).requires_grad_()
    initial = channel_last(batch, 16, 3).requires_grad_()
    weight, bias = parameters(16)
    out, final = conv.causal_conv1d_fn(
        x, weight, bias, initial_states=initial, return_final_states=True
    )
    assert out.shape == x.shape
    assert torch.equal(final, initial)
    dfinal = torch.randn_like(final)
    dx, dinitial, dweight = torch.autograd.grad((out, final), (x, initial, weight), (out, dfinal))
    assert dx.shape == x.shape
    assert torch.equal(dinitial, dfinal)
    assert not dweight.any()


@released("offsets wrap around at 2^32 elements", raises=BaseException)
def test_offsets_that_do_not_fit_are_refused(conv, tmp_path):
    # This is a file with a hole: 8 GiB of addresses, no memory.
    size = 2**32 + 8 * 16
    storage = torch.from_file(str(tmp_path / "hole"), shared=True, size=size, dtype=torch.bfloat16)
    x = storage.as_strided((2, 8, 16), (2**32, 1, 8))
    x[1] = 1
    with pytest.raises(RuntimeError, match=r"32 bits.* split the batch"):
        conv.causal_conv1d_fn(x, parameters(8)[0])


@released("final states are refused with seq_idx", raises=AssertionError)
def test_final_states_with_seq_idx(conv):
    x = channel_last(2, 40, 150)
    weight, bias = parameters(40)
    seq_idx = torch.full((2, 150), 7, dtype=torch.int32)
    seq_idx[0, 60:70], seq_idx[0, 70:] = 8, -1
    seq_idx[1, 149:] = 9
    got = conv.causal_conv1d_fn(x, weight, bias, seq_idx=seq_idx, return_final_states=True)
    check(got, oracle(x, weight, bias, seq_idx=seq_idx), torch.float32)


@pytest.mark.parametrize("source", ["patched"])
def test_upstreams_reference_is_as_the_recurrence(emulated_conv, source):
    """Compare `causal_conv1d_ref`, which upstream's tests compare with, with our oracle."""
    reference = emulated_conv(source).causal_conv1d_ref
    for width in (2, 3, 4):
        x = torch.randn(5, 6, 9, requires_grad=True)
        weight, bias = parameters(6, width)
        initial = torch.randn(5, 6, width - 1, requires_grad=True)
        seq_idx = torch.tensor(
            [
                [0, 0, 0, 0, 0, 1, 1, 1, 1],
                [-1, -1, 4, 4, 4, 4, 4, 4, 6],
                [-1] * 9,
                [2, 3, 3, -1, -1, -1, -1, -1, -1],
                [-1, -1, -1, -1, -1, -1, -1, 1, -1],
            ],
            dtype=torch.int32,
        )
        # A row that begins with padding begins from zeros.
        begins = torch.tensor([1, 0, 1, 1, 0])[:, None, None]
        for given in (initial, None):
            # Each of the two has a graph of its own.
            states = [None if given is None else given * begins for _ in range(2)]
            got = reference(
                x,
                weight,
                bias,
                initial_states=states[0],
                return_final_states=True,
                activation="silu",
                seq_idx=seq_idx,
            )
            kind = {"seq_idx": seq_idx, "silu": True}
            expected = oracle(x, weight, bias, initial_states=states[1], **kind)
            check(got, expected, torch.float32)
            inputs = (x, weight, bias) if given is None else (x, weight, bias, initial)
            gradients = [torch.randn_like(t) for t in got]
            got = torch.autograd.grad(got, inputs, gradients)
            expected = torch.autograd.grad(expected, inputs, [g.double() for g in gradients])
            check(got, expected, torch.float32, (1, 2))
