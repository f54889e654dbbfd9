"""The four laws for causal-conv1d's kernels, stock (where it can) and patched, on an emulation.

`conv_oracle.py` is the standard. They are tested forward and backward, with initial and final
states.
"""

import re
import shutil
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.conv_oracle import causal_conv1d
from support.tolerances import KERNEL_CONV, KERNEL_CONV_SUMMED

from ci import forks
from ci.kernels import emulation

# The other examples of each law are slow.
QUICK = re.compile(r"quick")
EXAMPLES = [pytest.param(25, id="quick"), pytest.param(200, id="thorough", marks=pytest.mark.slow)]

PADDING = -1

# A block of the kernel has 64 (forward, and backward up to 128) or 128 tokens, and 32 (float) or 64
# channels. These draw sequences that end near those borders, and some shorter than the state.
LENGTHS = st.one_of(
    st.integers(1, 6),
    st.sampled_from([60, 61, 62, 63, 64, 65, 66, 67, 125, 126, 127, 128, 129, 130, 131]),
    st.integers(1, 140),
)
PADS = st.one_of(
    st.just(0), st.integers(0, 5), st.sampled_from([61, 62, 63, 64, 65, 127, 128, 129])
)


@dataclass(frozen=True)
class Conv:
    """The weights of a convolution, and the way in which it is called."""

    width: int
    dim: int
    dtype: torch.dtype
    silu: bool
    has_bias: bool
    deterministic: bool

    def parameters(self):
        generator = torch.Generator().manual_seed(self.width)
        weight = torch.randn(self.dim, self.width, generator=generator)
        bias = torch.randn(self.dim, generator=generator) if self.has_bias else None
        return weight, bias

    def random(self, *shape):
        return torch.randn(*shape).to(self.dtype)

    def state(self):
        return self.random(self.dim, self.width - 1)


CONVS = st.builds(
    Conv,
    width=st.integers(2, 4),
    dim=st.sampled_from([8, 32, 40, 72]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    silu=st.booleans(),
    has_bias=st.booleans(),
    deterministic=st.booleans(),
)


def leaf(tensor):
    return None if tensor is None else tensor.detach().clone().requires_grad_()


def begun(initial, seq_idx):
    """Zeros for each row that begins with padding and has a token: its sequence begins there.

    The kernel has no place for another state in such a row, and drops it.
    """
    if initial is None or seq_idx is None:
        return initial
    is_padding = seq_idx < 0
    return initial * (~is_padding[:, 0] | is_padding.all(1))[:, None, None]


def call(function, conv, x, seq_idx, initial, **extra):
    """Return out, final states, and a function from their gradients to those of all inputs."""
    weight, bias = (leaf(p) for p in conv.parameters())
    x, initial = leaf(x), leaf(initial)
    given = begun(initial, seq_idx)
    out, final = function(x, weight, bias, seq_idx=seq_idx, initial_states=given, **extra)
    names = {"x": x, "initial": initial, "weight": weight, "bias": bias}
    inputs = {name: tensor for name, tensor in names.items() if tensor is not None}

    def backward(dout, dfinal):
        # Without tokens, outputs do not depend on any input.
        pairs = [(o, g.to(o)) for o, g in ((out, dout), (final, dfinal)) if o.requires_grad]
        zeros = {name: torch.zeros_like(tensor) for name, tensor in inputs.items()}
        if not pairs:
            return zeros
        gradients = torch.autograd.grad(
            [o for o, _ in pairs], list(inputs.values()), [g for _, g in pairs], allow_unused=True
        )
        given = zip(inputs, gradients, strict=True)
        return zeros | {name: gradient for name, gradient in given if gradient is not None}

    return out.detach(), final.detach(), backward


@pytest.fixture
def kernel(emulated_conv, monkeypatch):
    """Return the patched kernel as a function of a `Conv` and its inputs."""

    def run(conv, x, seq_idx=None, initial=None, source="patched"):
        monkeypatch.setenv("CAUSAL_CONV1D_DETERMINISTIC", str(int(conv.deterministic)))
        x = x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
        return call(
            emulated_conv(source).causal_conv1d_fn,
            conv,
            x,
            seq_idx,
            initial,
            return_final_states=True,
            activation="silu" if conv.silu else None,
        )

    return run


def oracle(conv, x, seq_idx=None, initial=None):
    return call(causal_conv1d, conv, x, seq_idx, initial, silu=conv.silu)


def assert_close(conv, got, expected, names=("x", "initial", "weight", "bias")):
    out, final, gradients = got
    expected_out, expected_final, expected_gradients = expected
    assert torch.equal(final, expected_final.to(conv.dtype))
    rtol, atol = KERNEL_CONV[conv.dtype]
    torch.testing.assert_close(out.double(), expected_out.double(), rtol=rtol, atol=atol)
    for name in names:
        if name not in expected_gradients:
            continue
        rtol, atol = KERNEL_CONV_SUMMED if name in ("weight", "bias") else KERNEL_CONV[conv.dtype]
        torch.testing.assert_close(
            gradients[name].double(),
            expected_gradients[name].double(),
            rtol=rtol,
            atol=atol,
            msg=lambda text, name=name: f"gradient of {name}: {text}",
        )


def pack(conv, rows):
    """Turn rows of (left padding, sequences, right padding) into x, NaN at padding, and seq_idx."""
    seqlen = max(
        left + sum(s.shape[1] for s in sequences) + right for left, sequences, right in rows
    )
    x = torch.full((len(rows), conv.dim, seqlen), float("nan"), dtype=conv.dtype)
    seq_idx = torch.full((len(rows), seqlen), PADDING, dtype=torch.int32)
    for row, (start, sequences, _) in enumerate(rows):
        for number, sequence in enumerate(sequences):
            end = start + sequence.shape[1]
            x[row, :, start:end] = sequence
            seq_idx[row, start:end] = 3 * number + row
            start = end
    return x, seq_idx


ROWS = st.lists(
    st.tuples(PADS, st.lists(LENGTHS, min_size=0, max_size=3), PADS), min_size=1, max_size=3
).filter(lambda rows: any(left + sum(lengths) + right for left, lengths, right in rows))


def examples(count):
    return settings(max_examples=count, deadline=None, derandomize=True)


@pytest.mark.parametrize("count", EXAMPLES)
def test_any_rows_are_as_in_the_recurrence(kernel, count):
    @examples(count)
    @given(CONVS, ROWS, st.booleans())
    def law(conv, rows, has_initial):
        rows = [
            (left, [conv.random(conv.dim, n) for n in lengths], right)
            for left, lengths, right in rows
        ]
        x, seq_idx = pack(conv, rows)
        initial = torch.stack([conv.state() for _ in rows]) if has_initial else None
        padding = (seq_idx == PADDING).unsqueeze(1)
        dout = conv.random(*x.shape)
        dfinal = conv.random(len(rows), conv.dim, conv.width - 1)
        out, final, backward = kernel(conv, x, seq_idx, initial)
        expected_out, expected_final, expected = oracle(
            conv, x.masked_fill(padding, 0), seq_idx, initial
        )
        assert not out.masked_select(padding).any()
        assert_close(
            conv,
            (out, final, backward(dout.masked_fill(padding, float("nan")), dfinal)),
            (expected_out, expected_final, expected(dout, dfinal)),
        )

    law()


@pytest.mark.parametrize("count", EXAMPLES)
def test_chunking_is_invisible(kernel, count):
    @examples(count)
    @given(CONVS, ROWS, st.data())
    def law(conv, rows, data):
        rows = [
            (left, [conv.random(conv.dim, n) for n in lengths], right)
            for left, lengths, right in rows
        ]
        x, seq_idx = pack(conv, rows)
        seqlen = x.shape[2]
        cuts = sorted(data.draw(st.sets(st.integers(1, max(1, seqlen - 1)), max_size=4)) - {seqlen})
        bounds = list(zip([0, *cuts], [*cuts, seqlen], strict=True))
        initial = begun(torch.stack([conv.state() for _ in rows]), seq_idx)
        out, final, _ = kernel(conv, x, seq_idx, initial)

        # The contract leaves it to the caller to give zeros where a chunk starts a new sequence.
        state, outs, backwards, keeps = initial, [], [], []
        for start, end in bounds:
            keep = torch.ones(len(rows), 1, 1, dtype=torch.bool)
            for row in range(len(rows)):
                before, after = (
                    [i for i in ids.tolist() if i >= 0]
                    for ids in (seq_idx[row, :start], seq_idx[row, start:end])
                )
                keep[row] = not before or not after or before[-1] == after[0]
            state = state.masked_fill(~keep, 0)
            part, state, backward = kernel(
                conv, x[..., start:end], seq_idx[:, start:end].contiguous(), state
            )
            outs.append(part)
            backwards.append(backward)
            keeps.append(keep)
        assert torch.equal(torch.cat(outs, dim=-1), out)
        assert torch.equal(state, final)

        # Go back through the chunks; a state's gradient is rounded to its dtype at every cut.
        dout = conv.random(*x.shape)
        dfinal = conv.random(*final.shape)
        dx, dweight, dbias = [], 0, 0
        dstate = dfinal
        for (start, end), backward, keep in reversed(
            list(zip(bounds, backwards, keeps, strict=True))
        ):
            gradients = backward(dout[..., start:end], dstate)
            dstate = gradients["initial"].masked_fill(~keep, 0)
            dx.insert(0, gradients["x"])
            dweight = dweight + gradients["weight"]
            dbias = dbias + gradients.get("bias", 0)
        padding = (seq_idx == PADDING).unsqueeze(1)
        expected_out, expected_final, expected = oracle(
            conv, x.masked_fill(padding, 0), seq_idx, initial
        )
        gradients = {
            "x": torch.cat(dx, dim=-1),
            "initial": begun(dstate, seq_idx),
            "weight": dweight,
            "bias": dbias,
        }
        assert_close(
            conv, (out, final, gradients), (expected_out, expected_final, expected(dout, dfinal))
        )

    law()


@pytest.mark.parametrize("count", EXAMPLES)
def test_padding_is_invisible(kernel, count):
    @examples(count)
    @given(CONVS, LENGTHS, PADS, PADS)
    def law(conv, length, left, right):
        x, initial = conv.random(1, conv.dim, length), conv.state()[None]
        initial = torch.zeros_like(initial) if left else initial
        dout, dfinal = conv.random(*x.shape), conv.random(*initial.shape)
        padded, seq_idx = pack(conv, [(left, [x[0]], right)])
        padded = torch.nn.functional.pad(
            padded, (0, left + length + right - padded.shape[2]), value=float("nan")
        )
        seq_idx = torch.nn.functional.pad(
            seq_idx, (0, padded.shape[2] - seq_idx.shape[1]), value=PADDING
        )
        out, final, backward = kernel(
            conv, x, seq_idx[:, left : left + length].contiguous(), initial
        )
        padded_out, padded_final, padded_backward = kernel(conv, padded, seq_idx, initial)
        tokens = slice(left, left + length)
        assert torch.equal(padded_out[..., tokens], out)
        assert torch.equal(padded_final, final)
        gradients = backward(dout, dfinal)
        padded_dout = torch.full_like(padded, float("nan"))
        padded_dout[..., tokens] = dout
        padded_gradients = padded_backward(padded_dout, dfinal)
        padding = (seq_idx == PADDING).unsqueeze(1)
        assert not padded_gradients["x"].masked_select(padding).any()
        padded_gradients["x"] = padded_gradients["x"][..., tokens]
        names = ("x", "weight", "bias") if left else ("x", "initial", "weight", "bias")
        assert_close(conv, (out, final, padded_gradients), (out, final, gradients), names)

    law()


@pytest.mark.parametrize("count", EXAMPLES)
def test_packing_is_invisible(kernel, count):
    @examples(count)
    @given(CONVS, st.lists(LENGTHS, min_size=2, max_size=4))
    def law(conv, lengths):
        sequences = [conv.random(conv.dim, n) for n in lengths]
        initial, dfinal = conv.state()[None], conv.state()[None]
        x, seq_idx = pack(conv, [(0, sequences, 0)])
        dout = conv.random(*x.shape)
        out, final, backward = kernel(conv, x, seq_idx, initial)
        gradients = backward(dout, dfinal)
        start = 0
        for number, sequence in enumerate(sequences):
            end = start + sequence.shape[1]
            is_first, is_last = number == 0, number == len(sequences) - 1
            state = initial if is_first else torch.zeros_like(initial)
            alone, alone_final, alone_backward = kernel(conv, sequence[None], None, state)
            assert torch.equal(out[..., start:end], alone)
            if is_last:
                assert torch.equal(final, alone_final)
            alone_gradients = alone_backward(
                dout[..., start:end], dfinal if is_last else torch.zeros_like(dfinal)
            )
            part = {"x": gradients["x"][..., start:end], "initial": gradients["initial"]}
            names = ("x", "initial") if is_first else ("x",)
            assert_close(
                conv, (alone, alone_final, part), (alone, alone_final, alone_gradients), names
            )
            start = end

    law()


@pytest.mark.parametrize("count", EXAMPLES)
def test_batching_is_invisible(kernel, count):
    @examples(count)
    @given(CONVS, ROWS)
    def law(conv, rows):
        rows = [
            (left, [conv.random(conv.dim, n) for n in lengths], right)
            for left, lengths, right in rows
        ]
        x, seq_idx = pack(conv, rows)
        initial = torch.stack([conv.state() for _ in rows])
        dout, dfinal = conv.random(*x.shape), conv.random(*initial.shape)
        out, final, backward = kernel(conv, x, seq_idx, initial)
        gradients = backward(dout, dfinal)
        for row in range(len(rows)):
            one = slice(row, row + 1)
            alone, alone_final, alone_backward = kernel(conv, x[one], seq_idx[one], initial[one])
            assert torch.equal(out[one], alone)
            assert torch.equal(final[one], alone_final)
            alone_gradients = alone_backward(dout[one], dfinal[one])
            for name in ("x", "initial"):
                assert torch.equal(gradients[name][one], alone_gradients[name]), name

    law()


@pytest.mark.parametrize("source", [pytest.param("stock", marks=pytest.mark.slow), "patched"])
@pytest.mark.parametrize("count", EXAMPLES)
def test_unpadded_chunks_are_invisible_without_seq_idx(kernel, source, count):
    @examples(count)
    @given(CONVS, LENGTHS, st.data())
    def law(conv, length, data):
        # Released kernels do this forward; for backward, see test_conv_defects.py.
        x = conv.random(2, conv.dim, length)
        initial = conv.random(2, conv.width - 1, conv.dim).transpose(1, 2)
        cut = data.draw(st.integers(0, length))
        out, final, _ = kernel(conv, x, None, initial, source)
        expected_out, expected_final, _ = oracle(conv, x, None, initial)
        state, outs = initial, []
        for part in (x[..., :cut], x[..., cut:]):
            if part.shape[2]:
                part_out, state, _ = kernel(conv, part, None, state, source)
                outs.append(part_out)
        assert torch.equal(torch.cat(outs, dim=-1), out)
        assert torch.equal(state, final)
        assert_close(conv, (out, final, {}), (expected_out, expected_final, {}), names=())

    law()


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_threads_may_run_in_any_order(kernel, order):
    """Show that every needed barrier is there: any order of threads gives the same result."""
    conv = Conv(4, 40, torch.float32, silu=True, has_bias=True, deterministic=True)
    sequences = [conv.random(conv.dim, n) for n in (70, 1, 66)]
    x, seq_idx = pack(conv, [(63, sequences, 5), (0, [], 3), (130, sequences[:1], 0)])
    initial = torch.stack([conv.state() for _ in range(3)])
    dout, dfinal = conv.random(*x.shape), conv.random(*initial.shape)

    def run():
        out, final, backward = kernel(conv, x, seq_idx, initial)
        return [out, final, *backward(dout, dfinal).values()]

    expected = run()
    with emulation.order(order):
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


# Faults in what the patches add to the kernels, each of which the recurrence must detect: the file,
# the text, and its replacement, in which M is 1 when the fault is on and else 0.
FAULTS = [
    (
        "bwd",
        "if (seq_idx_thread[i + kWidth - 1] < 0)",
        "if (seq_idx_thread[i + kWidth - 1] < 0 - M)",
    ),
    ("bwd", "if (seq_idx_thread[i] < 0)", "if (seq_idx_thread[i] < 0 - M)"),
    ("bwd", "kHasSeqIdx && seq_idx_thread[i] < 0", "kHasSeqIdx && seq_idx_thread[i] < 0 - M"),
]
# The same for what is done beside the kernels, in Python.
FAULTS_BESIDE = [
    ("torch.where(seq_idx >= 0, position, -1)", "torch.where(seq_idx >= -1, position, -1)"),
    ("torch.arange(2 - width, 1", "torch.arange(1 - width, 0"),
    ("torch.where(is_own, torch.where(position", "torch.where(position < 99, torch.where(position"),
    ("torch.where(position < 0, before, states)", "states"),
    ("torch.where(is_own & (position >= 0), dfinal", "torch.where(position >= 0, dfinal"),
    ("torch.where(is_own & (position >= 0), dfinal", "torch.where(is_own, dfinal"),
    ("is_own & (position < width - 1)", "is_own & (position < width)"),
    ("position = position + width - 1", "position = position + width - 2"),
]


@pytest.fixture(scope="module")
def faulty():
    """Load the patched package, in float32, with all faults in it and none of them on."""
    tree = forks.patched("causal-conv1d")
    texts = {}
    for number, (name, old, new) in enumerate(FAULTS, 1):
        file = f"causal_conv1d_{name}.cu"
        if file not in texts:
            texts[file] = (tree / "csrc" / file).read_text()
        assert (tree / "csrc" / file).read_text().count(old) == 1, old
        texts[file] = texts[file].replace(
            old, re.sub(r"\bM\b", f"emulation::mutant({number})", new)
        )
    types = [("float", "float")]
    try:
        return emulation.causal_conv1d(tree, types=types, replace=texts)
    except emulation.Unavailable as reason:
        pytest.skip(str(reason))


def differs_from_recurrence(package):
    """Return whether rows of all kinds, forward and backward, differ from the recurrence."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        (0, [70]),
        (1, [1]),
        (62, [2, 66]),
        (64, [3]),
        (129, [1]),
        (0, []),
        (3, [61, 1]),
        (0, [5, 2]),
        (126, [2]),
        # The final states hold a part of the initial ones, and the first token beside it.
        (0, [1]),
        (0, [2]),
    ]
    for width, length in ((4, 132), (4, 128), (2, 5), (4, 2)):
        conv = Conv(width, 40, torch.float32, silu=True, has_bias=True, deterministic=False)
        chosen = [
            (
                left,
                [torch.randn(40, n, generator=generator) for n in lengths],
                length - left - sum(lengths),
            )
            for left, lengths in rows
            if left + sum(lengths) <= length
        ]
        x, seq_idx = pack(conv, chosen)
        padding = (seq_idx == PADDING).unsqueeze(1)
        initial = torch.randn(len(chosen), width - 1, 40, generator=generator).transpose(1, 2)
        dout = torch.randn(x.shape, generator=generator)
        dfinal = torch.randn(initial.shape, generator=generator)
        expected_out, expected_final, expected = oracle(
            conv, x.masked_fill(padding, 0), seq_idx, initial
        )
        try:
            out, final, backward = call(
                package.causal_conv1d_fn,
                conv,
                x.transpose(1, 2).contiguous().transpose(1, 2),
                seq_idx,
                initial,
                return_final_states=True,
                activation="silu",
            )
            got = out, final, backward(dout.masked_fill(padding, float("nan")), dfinal)
            assert_close(conv, got, (expected_out, expected_final, expected(dout, dfinal)))
        except (AssertionError, RuntimeError):
            return True
    return False


@pytest.mark.slow
def test_the_recurrence_tells_faults_in_the_new_code(faulty):
    assert not differs_from_recurrence(faulty)
    missed = []
    for number, fault in enumerate(FAULTS, 1):
        with emulation.mutant(number):
            if not differs_from_recurrence(faulty):
                missed.append(fault)
    assert not missed


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new"), FAULTS_BESIDE)
def test_the_recurrence_tells_faults_beside_the_kernels(tmp_path, old, new):
    tree = forks.patched("causal-conv1d")
    (tmp_path / "csrc").symlink_to(tree / "csrc")
    shutil.copytree(tree / "causal_conv1d", tmp_path / "causal_conv1d")
    file = tmp_path / "causal_conv1d" / "causal_conv1d_interface.py"
    assert file.read_text().count(old) == 1
    file.write_text(file.read_text().replace(old, new))
    try:
        package = emulation.causal_conv1d(tmp_path)
    except emulation.Unavailable as reason:
        pytest.skip(str(reason))
    assert differs_from_recurrence(package)
