"""The gated delta rule of `compat.ops`, in torch and native, against a float64 recurrence."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tolerances import GRADIENTS, OPS_DELTA, error

from compat import ops
from compat.ops.delta import gated_delta_rule

FEW = settings().max_examples // 3
GATES = pytest.mark.parametrize("by_channel", [False, True], ids=["of heads", "of channels"])


def recurrence(query, key, value, g, beta, state, *, normalised=True):
    """Compute token by token, in float64, as the equations of the papers stand."""
    query, key, value, g, beta, state = (
        part.double() for part in (query, key, value, g, beta, state)
    )
    if normalised:
        query, key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
    shared = value.shape[2] // key.shape[2]
    query, key = (x.repeat_interleave(shared, 2) for x in (query, key))
    g = g if g.ndim == 4 else g[..., None]
    outputs = []
    for t in range(query.shape[1]):
        state = g[:, t].exp()[..., None] * state
        known = (state * key[:, t, ..., None]).sum(2)
        update = beta[:, t, :, None] * (value[:, t] - known)
        state = state + key[:, t, ..., None] * update[:, :, None]
        outputs.append((state * query[:, t, ..., None]).sum(2) / query.shape[-1] ** 0.5)
    return torch.stack(outputs, 1), state


def inputs(
    batch=2, seqlen=20, heads=2, shared=2, key_dim=5, value_dim=7, *, by_channel=False, seed=0,
    dtype=torch.float32,
):  # fmt: skip
    random = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=random)

    keys, values = (batch, seqlen, heads, key_dim), (batch, seqlen, heads * shared)
    query, key, value = randn(*keys).to(dtype), randn(*keys).to(dtype), randn(*values, value_dim)
    g = -randn(*values, *[key_dim] * by_channel).exp() / 4
    beta = 2 * randn(*values).sigmoid()
    state = randn(batch, heads * shared, key_dim, value_dim)
    return query, key, value.to(dtype), g, beta.to(dtype), state


@torch.no_grad()
def rule(*arguments, **options):
    return gated_delta_rule(*arguments, **options, use_qk_l2norm=True)


def check(found, wanted, dtype=torch.float32):
    (out, state), (wanted_out, wanted_state) = found, wanted
    assert out.dtype == dtype
    assert state.dtype == torch.float32
    scale = wanted_out.abs().max().clamp(min=0.1)
    assert error(out, wanted_out) <= OPS_DELTA[dtype] * scale
    scale = wanted_state.abs().max().clamp(min=1)
    assert error(state, wanted_state) <= OPS_DELTA[torch.float32] * scale


def rows_of(arguments, row, part=slice(None)):
    """Return the arguments of one row, of some of its tokens."""
    *sequences, state = arguments
    return *(x[row : row + 1, part] for x in sequences), state[row : row + 1]


@GATES
@pytest.mark.usefixtures("backend")
class TestLaws:
    @settings(max_examples=FEW)
    @given(
        shape=st.tuples(
            *(st.integers(1, most) for most in (2, 150)), st.integers(1, 3), st.integers(1, 2),
            st.integers(1, 20), st.integers(1, 20),
        ),
        cuts=st.sets(st.integers(1, 149), max_size=3),
        seed=st.integers(0, 9),
    )  # fmt: skip
    def test_chunking_is_invisible(self, by_channel, shape, cuts, seed):
        *sequences, state = inputs(*shape, by_channel=by_channel, seed=seed)
        wanted = recurrence(*sequences, state)
        ends = [*sorted(cut for cut in cuts if cut < shape[1]), shape[1]]
        pieces = []
        for begin, end in zip([0, *ends], ends, strict=False):
            out, state = rule(*(x[:, begin:end] for x in sequences), state)
            pieces.append(out)
        check((torch.cat(pieces, 1), state), wanted)

    @settings(max_examples=FEW)
    @given(
        lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
        left=st.integers(0, 70),
        right=st.integers(0, 40),
        seed=st.integers(0, 9),
    )
    def test_packing_and_padding_are_invisible(self, by_channel, lengths, left, right, seed):
        ids = [-1] * left
        for name, length in enumerate(lengths):
            ids += [3 + name] * length
        seqlen = len(ids) + right
        arguments = inputs(1, seqlen, by_channel=by_channel, seed=seed)
        seq_idx = torch.tensor([ids + [-1] * right])
        begin, wanted, state = left, [], arguments[-1]
        for length in lengths:
            *alone, _ = rows_of(arguments, 0, slice(begin, begin + length))
            out, last = recurrence(*alone, state)
            wanted.append(out)
            begin, state = begin + length, torch.zeros_like(state)
        real = seq_idx[0] >= 0
        for part in arguments[:-1]:
            part[:, ~real] = float("nan")  # What stands at padding is not read.
        out, final = rule(*arguments, seq_idx=seq_idx)
        check((out[:, real], final), (torch.cat(wanted, 1), last))
        assert not out[:, ~real].any()

    def test_batching_is_invisible(self, by_channel):
        arguments = inputs(4, 70, by_channel=by_channel)
        seq_idx = torch.zeros(4, 70, dtype=torch.int32)
        seq_idx[0, :66] = seq_idx[1] = seq_idx[3, 9:] = -1
        out, last = rule(*arguments, seq_idx=seq_idx)
        check((out[2:3], last[2:3]), recurrence(*rows_of(arguments, 2)))
        check((out[:1, 66:], last[:1]), recurrence(*rows_of(arguments, 0, slice(66, None))))
        assert torch.equal(last[1], arguments[-1][1]), "a row without a token"

    @pytest.mark.parametrize("value_dim", [1, 16, 65])
    @pytest.mark.parametrize("seqlen", [1, 2, 16, 17, 31, 32, 33, 64, 65])
    def test_any_size(self, by_channel, seqlen, value_dim):
        arguments = inputs(1, seqlen, 1, 3, 4, value_dim, by_channel=by_channel)
        check(rule(*arguments), recurrence(*arguments))

    @pytest.mark.parametrize("seqlen", [1, 100])
    def test_bfloat16(self, by_channel, seqlen):
        arguments = inputs(2, seqlen, by_channel=by_channel, dtype=torch.bfloat16)
        check(rule(*arguments), recurrence(*arguments), torch.bfloat16)

    def test_without_a_token_a_state_is_handed_on(self, by_channel):
        arguments = inputs(seqlen=0, by_channel=by_channel)
        out, last = rule(*arguments)
        assert out.shape == (2, 0, 4, 7)
        assert torch.equal(last, arguments[-1])

    def test_without_a_state_it_begins_from_zeros(self, by_channel):
        *sequences, state = inputs(by_channel=by_channel)
        check(rule(*sequences), recurrence(*sequences, torch.zeros_like(state)))

    def test_the_state_is_left_as_it_was(self, by_channel):
        *sequences, state = inputs(by_channel=by_channel)
        before = state.clone()
        rule(*sequences, state)
        assert torch.equal(state, before)

    @pytest.mark.parametrize("strength", [0.0, 1e-4, 1.0, 30.0, 89.0, 1e4, 1e30, float("inf")])
    def test_gates_of_any_strength(self, by_channel, strength):
        """Go from a rule that forgets nothing to one that forgets all, at each token."""
        *sequences, beta, state = inputs(2, 150, by_channel=by_channel)
        sequences[3] = torch.full_like(sequences[3], -strength)
        arguments = *sequences, beta, state
        check(rule(*arguments), recurrence(*arguments))

    @pytest.mark.parametrize("strength", [50.0, 1e4, 1e8, float("inf")])
    def test_a_token_that_forgets_all_among_others_that_forget_little(self, by_channel, strength):
        """Lose no small gate beside a large one in a sum."""
        *sequences, beta, state = inputs(2, 150, by_channel=by_channel)
        g = sequences[3] / 100
        g[:, 5::23] = -strength
        arguments = *sequences[:3], g, beta, state
        check(rule(*arguments), recurrence(*arguments))

    def test_channels_that_forget_at_rates_far_apart(self, by_channel):
        *sequences, beta, state = inputs(2, 150, key_dim=8, by_channel=by_channel)
        rates = torch.tensor([0.0, 1e-3, 0.1, 1.0, 5.0, 20.0, 90.0, 1e3])
        sequences[3] = -rates[torch.randint(8, sequences[3].shape)]
        arguments = *sequences, beta, state
        check(rule(*arguments), recurrence(*arguments))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_views_are_read_as_they_lie(self, by_channel, dtype):
        *sequences, state = inputs(2, 40, by_channel=by_channel, dtype=dtype)
        wanted = rule(*sequences, state)
        wide = [torch.stack([x, x * float("nan")], 2).flatten(1, 2)[:, ::2] for x in sequences]
        wide[1] = wide[1].transpose(1, 3).contiguous().transpose(1, 3)
        found = rule(*wide, torch.stack([state] * 2, 4)[..., 0])
        check(found, wanted, dtype)

    def test_where_a_gradient_is_wanted_there_is_one(self, by_channel):
        *sequences, state = inputs(by_channel=by_channel)
        exact = state.double().requires_grad_()
        gated_delta_rule(*sequences, state.requires_grad_(), use_qk_l2norm=True)[0].sum().backward()
        recurrence(*sequences, exact)[0].sum().backward()
        assert error(state.grad, exact.grad) <= OPS_DELTA[torch.float32] * exact.grad.abs().max()

    def test_native_is_not_given_what_it_cannot_read(self, by_channel):
        arguments = [x.double() for x in inputs(by_channel=by_channel)]
        for part, wanted in zip(rule(*arguments), recurrence(*arguments), strict=True):
            assert error(part, wanted) <= 1e-12
        meta = [x.to("meta") for x in inputs(by_channel=by_channel)]
        assert rule(*meta)[0].shape == (2, 20, 4, 7)


@GATES
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_the_recurrence(by_channel, packed):
    """Compare in float64, over pieces and blocks, with outputs and the final state in the loss."""
    arguments = [x.double() for x in inputs(1, 75, by_channel=by_channel)]
    weights = [torch.randn(1, 75, 4, 7).double(), torch.randn(1, 4, 5, 7).double()]
    cut = 30 * packed
    seq_idx = (torch.arange(75) >= cut).int()[None]

    def gradients(run):
        values = [x.clone().requires_grad_() for x in arguments]
        loss = sum((w * x).sum() for w, x in zip(weights, run(*values), strict=True))
        return torch.autograd.grad(loss, values)

    def one_by_one(*values):
        *sequences, state = values
        if not cut:
            return recurrence(*values)
        first, _ = recurrence(*(x[:, :cut] for x in sequences), state)
        second, last = recurrence(*(x[:, cut:] for x in sequences), torch.zeros_like(state))
        return torch.cat([first, second], 1), last

    ours = functools.partial(gated_delta_rule, seq_idx=seq_idx, use_qk_l2norm=True)
    for found, wanted in zip(gradients(ours), gradients(one_by_one), strict=True):
        assert error(found, wanted) <= GRADIENTS[torch.float64] * wanted.abs().max()


@GATES
def test_gradients_stay_finite_where_gates_forget_all(by_channel):
    *sequences, beta, state = (x.double() for x in inputs(1, 40, by_channel=by_channel))
    sequences[3][:, ::7] = -1e5
    values = [x.requires_grad_() for x in (*sequences, beta, state)]
    out, last = gated_delta_rule(*values, use_qk_l2norm=True)
    (out.sum() + last.sum()).backward()
    assert all(x.grad.isfinite().all() for x in values)


@pytest.mark.usefixtures("backend")
def test_the_lengths_and_the_scale_are_the_callers():
    arguments = inputs(key_dim=4)
    arguments = arguments[0], arguments[1] / 4, *arguments[2:]
    wanted = recurrence(*arguments, normalised=False)
    with torch.no_grad():
        check(gated_delta_rule(*arguments), wanted)
        out, _ = gated_delta_rule(*arguments, scale=2.0)
    check((out / 4, wanted[1].float()), wanted)


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("key", (2, 20, 2, 6), r"key must be \(2, 20, 2, 5\); found \(2, 20, 2, 6\)"),
        ("g", (2, 20, 2), r"g must be \(2, 20, 4\)"),
        ("g", (2, 20, 4, 6), r"g must be \(2, 20, 4, 5\)"),
        ("beta", (2, 19, 4), "beta must be"),
        ("initial_state", (2, 4, 7, 5), "initial_state must be"),
        ("seq_idx", (2, 19), "seq_idx must be"),
        ("value", (2, 20, 3, 7), "heads must be shared by key heads; found 3 and 2"),
    ],
)
def test_shapes_that_do_not_fit(name, shape, says):
    names = ("query", "key", "value", "g", "beta", "initial_state")
    arguments = dict(zip(names, inputs(), strict=True)) | {name: torch.ones(shape)}
    with pytest.raises(ValueError, match=says):
        gated_delta_rule(**arguments)


def test_native_does_it_where_it_is_chosen(monkeypatch):
    if ops.compiled.library() is None:
        pytest.skip(ops.compiled.reason())
    monkeypatch.setattr(ops.delta, "_torch_rule", None)
    with ops.using("native"):
        check(rule(*inputs()), recurrence(*inputs()))
