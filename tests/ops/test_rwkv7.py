"""RWKV-7's and RWKV-6's wkv of `compat.ops`, in torch and native, against a float64 recurrence."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tolerances import GRADIENTS, OPS_WKV, error

from compat.ops import compiled, rwkv6, rwkv7, using

FEW = settings().max_examples // 2
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
STRONGEST = -0.606531  # RWKV-7's smallest log decay.
OPS = {"wkv7": rwkv7.wkv7, "wkv6": rwkv6.wkv6}
both = pytest.mark.parametrize("op", sorted(OPS))


@dataclass
class Case:
    """Arguments of an op: tensors of time, those that have none, and the state."""

    op: str
    timed: list
    fixed: list
    state: torch.Tensor
    seq_idx: torch.Tensor | None = None

    def run(self, begin=None, end=None, state=None):
        """Read the tokens from begin to end, by default all."""
        ids = None if self.seq_idx is None else self.seq_idx[:, begin:end]
        state = self.state if state is None else state
        return OPS[self.op](*(x[:, begin:end] for x in self.timed), *self.fixed, state, ids)

    def in_pieces(self, cuts):
        """Read in pieces; a row whose next token begins a sequence begins it with zeros."""
        seqlen = self.timed[0].shape[1]
        ends = [*sorted(cut for cut in cuts if cut < seqlen), seqlen]
        outputs, state = [], self.state
        for begin, end in zip([0, *ends], ends, strict=False):
            if self.seq_idx is not None:
                for row, ids in enumerate(self.seq_idx):
                    seen, coming = ids[:begin][ids[:begin] >= 0], ids[begin:][ids[begin:] >= 0]
                    if len(seen) and len(coming) and seen[-1] != coming[0]:
                        state = state.clone()
                        state[row] = 0
            out, state = self.run(begin, end, state)
            outputs.append(out)
        return torch.cat(outputs, 1), state

    def mapped(self, function):
        """Return the case with a function of each of its tensors of numbers."""
        timed, fixed = ([function(x) for x in xs] for xs in (self.timed, self.fixed))
        return Case(self.op, timed, fixed, function(self.state), self.seq_idx)


def recurrence(case):
    """Compute token by token, in float64."""
    exact = case.mapped(torch.Tensor.double)
    rows = [_row(exact, row) for row in range(len(exact.state))]
    return tuple(torch.stack(part) for part in zip(*rows, strict=True))


def _row(case, row):
    state, outputs, sequence = case.state[row], [], None
    for t, (r, w, k, v, *ab) in enumerate(zip(*(x[row] for x in case.timed), strict=True)):
        id_ = 0 if case.seq_idx is None else int(case.seq_idx[row, t])
        if id_ < 0:
            outputs.append(torch.zeros_like(v))
            continue
        if sequence not in (None, id_):
            state = torch.zeros_like(state)
        sequence = id_
        written = k[..., None] * v[..., None, :]
        if case.op == "wkv7":
            a, b = ab
            removed = (a[..., None] * state).sum(-2, keepdim=True)
            state = w.exp()[..., None] * state + b[..., None] * removed + written
            outputs.append((r[..., None] * state).sum(-2))
        else:
            outputs.append((r[..., None] * (state + case.fixed[0][..., None] * written)).sum(-2))
            state = w.exp()[..., None] * state + written
    return torch.stack(outputs), state


def inputs(op, batch=2, seqlen=20, nheads=2, dim=5, v_dim=7, *, seed=0, begun=True, dtype=F32):
    random = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=random)

    keys = batch, seqlen, nheads, dim
    r, k, v = randn(*keys), randn(*keys), randn(batch, seqlen, nheads, v_dim)
    state = randn(batch, nheads, dim, v_dim) * begun
    if op == "wkv6":
        timed, fixed = [r, -torch.exp(2 * randn(*keys)), k, v], [randn(nheads, dim)]
    else:
        removal = torch.nn.functional.normalize(randn(*keys), dim=-1)
        rate = torch.sigmoid(randn(*keys))
        timed = [r, STRONGEST * torch.sigmoid(2 * randn(*keys)), k, v, -removal, removal * rate]
        fixed = []
    return Case(op, [x.to(dtype) for x in timed], [x.to(dtype) for x in fixed], state)


def check(found, wanted, dtype=F32):
    (out, state), (wanted_out, wanted_state) = found, wanted
    assert out.dtype == dtype
    assert state.dtype == F32
    assert error(out, wanted_out) <= OPS_WKV[dtype] * max(1.0, float(wanted_out.abs().max()))
    assert error(state, wanted_state) <= OPS_WKV[F32] * max(1.0, float(wanted_state.abs().max()))


@st.composite
def ids_of_rows(draw, rows, seqlen):
    """Draw padding on both sides, and sequences between."""
    found = torch.full((rows, seqlen), -1, dtype=torch.int32)
    for row in found:
        begin, end = sorted(draw(st.tuples(*[st.integers(0, seqlen)] * 2)))
        new = torch.zeros(end - begin, dtype=torch.int32)
        for cut in draw(st.sets(st.integers(0, seqlen), max_size=3)):
            new[cut:] += 1
        row[begin:end] = new
    return found


@pytest.mark.usefixtures("backend")
class TestLaws:
    @both
    @settings(max_examples=FEW)
    @given(
        shape=st.tuples(*map(st.integers, [1, 1, 1, 1, 1], [3, 70, 2, 9, 70])),
        cuts=st.sets(st.integers(1, 69), max_size=3),
        begun=st.booleans(),
        packed=st.booleans(),
        seed=st.integers(0, 9),
        data=st.data(),
    )
    def test_chunking_packing_and_padding_are_invisible(
        self, op, shape, cuts, begun, packed, seed, data
    ):
        case = inputs(op, *shape, seed=seed, begun=begun)
        if packed:
            case.seq_idx = data.draw(ids_of_rows(*shape[:2]))
        check(case.in_pieces(cuts), recurrence(case))

    @both
    @pytest.mark.parametrize("seqlen", [1, 15, 16, 17, 129])
    @pytest.mark.parametrize("v_dim", [16, 64, 65])
    def test_any_size(self, op, seqlen, v_dim):
        case = inputs(op, 1, seqlen, 1, 64, v_dim)
        check(case.run(), recurrence(case))

    @both
    def test_batching_is_invisible(self, op):
        case = inputs(op, 4, 50)
        out, last = case.run()
        row = Case(op, [x[2:3] for x in case.timed], case.fixed, case.state[2:3])
        check((out[2:3], last[2:3]), recurrence(row))

    @both
    @pytest.mark.parametrize("seqlen", [1, 40])
    def test_bfloat16(self, op, seqlen):
        case = inputs(op, 2, seqlen, 2, 16, 30, dtype=BF16)
        check(case.run(), recurrence(case), BF16)

    @both
    @pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
    def test_padding_is_not_read(self, op, poison):
        case = inputs(op, 2, 40)
        case.seq_idx = torch.zeros(2, 40, dtype=torch.int64)
        case.seq_idx[0, :9] = case.seq_idx[0, 33:] = case.seq_idx[1, 20:] = -1
        out, last = case.run()
        for x in case.timed:
            x[case.seq_idx < 0] = poison
        found, found_last = case.run()
        assert torch.equal(found, out)
        assert torch.equal(found_last, last)
        assert not found[case.seq_idx < 0].any()

    @both
    def test_a_row_without_a_token_hands_its_state_on(self, op):
        case = inputs(op, seqlen=0)
        out, last = case.run()
        assert out.shape == (2, 0, 2, 7)
        assert torch.equal(last, case.state)
        case = inputs(op)
        case.seq_idx = torch.full((2, 20), -1)
        out, last = case.run()
        assert not out.any()
        assert torch.equal(last, case.state)

    @both
    def test_the_state_is_left_as_it_was(self, op):
        case = inputs(op)
        before = case.state.clone()
        case.run()
        assert torch.equal(case.state, before)

    @both
    @pytest.mark.parametrize("dtype", [F32, BF16])
    def test_views_are_read_as_they_lie(self, op, dtype):
        case = inputs(op, 2, 40, dtype=dtype)
        wanted = case.run()

        def strided(x):
            return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]

        def turned(x):
            return x.transpose(1, 2).contiguous().transpose(1, 2)

        for change in (strided, turned):
            found = case.mapped(lambda x, to=change: to(x) if x.ndim == 4 else x).run()
            assert all(map(torch.equal, found, wanted))


@pytest.mark.usefixtures("backend")
class TestExtremes:
    @both
    def test_what_is_kept_for_thousands_of_tokens(self, op):
        """Let a decay be known as well as its logarithm: rounded to float32 it costs 1e-4 here."""
        case = inputs(op, 1, 4000, 1, 3, 3)
        case.timed[1].fill_(-1.1e-5)
        for x in case.timed[2:]:
            x[:, 1:] = 0
        check(case.run(), recurrence(case))

    @pytest.mark.parametrize("decay", [STRONGEST, 0.0, None])
    def test_decays_of_rwkv7(self, decay):
        """Go from one that keeps all to the strongest, and from the one to the other in a chunk."""
        case = inputs("wkv7", 2, 100, 2, 16)
        w = case.timed[1]
        if decay is None:
            w[:, ::3], w[:, 1::3] = 0.0, STRONGEST
            w[:, 48:56], w[:, 56:64] = 0.0, STRONGEST
        else:
            w.fill_(decay)
        check(case.run(), recurrence(case))

    def test_all_is_removed_and_written_anew(self):
        """Give all tokens one key, which inverts matrices with entries of 1 alone."""
        case = inputs("wkv7", 2, 100, 2, 16)
        _, w, k, _, a, b = case.timed
        w.zero_()
        a.copy_(a[:, :1].clone())
        b.copy_(-a)
        k.copy_(b)
        check(case.run(), recurrence(case))

    @pytest.mark.parametrize("decay", [-1e-6, -30.0, -1e5, -torch.inf])
    def test_decays_of_rwkv6(self, decay):
        """Go from one that keeps all to one that forgets at once; next to others in a chunk."""
        case = inputs("wkv6", 2, 60)
        case.timed[1][:, ::4] = decay
        check(case.run(), recurrence(case))


def test_native_takes_any_decay():
    if compiled.library() is None:
        pytest.skip(compiled.reason())
    case = inputs("wkv7", 2, 60)
    for token, decay in enumerate([-9.0, -40.0, -1e5, -torch.inf]):
        case.timed[1][:, token::7] = decay
    with using("native"):
        check(case.run(), recurrence(case))


def test_a_decay_that_is_too_strong_for_plain_torch():
    case = inputs("wkv7")
    case.timed[1][0, 3, 1, 2] = -9.0
    with using("torch"), pytest.raises(ValueError, match=r"of size 5 at most; found 9\."):
        case.run()


@both
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_in_float64(op, packed):
    """Compare those of all inputs and of the state, through outputs and the last state."""
    case = inputs(op, 2, 37).mapped(lambda x: x.double().requires_grad_())
    if packed:
        case.seq_idx = torch.tensor([[-1] * 3 + [0] * 20 + [1] * 14, [0] * 30 + [-1] * 7])
    leaves = [*case.timed, *case.fixed, case.state]
    weights = [torch.randn_like(x) for x in recurrence(case)]

    def gradients(outputs):
        total = sum((x * y).sum() for x, y in zip(outputs, weights, strict=True))
        return torch.autograd.grad(total, leaves)

    wanted = gradients(recurrence(case))
    for found, exact in zip(gradients(case.run()), wanted, strict=True):
        assert error(found, exact) <= GRADIENTS[F64] * exact.abs().max()
    for found, exact in zip(gradients(case.in_pieces([5, 23])), wanted, strict=True):
        assert error(found, exact) <= GRADIENTS[F64] * exact.abs().max()


@pytest.mark.usefixtures("backend")
@both
def test_what_native_cannot_read_runs_in_torch(op):
    """Give it float64, tensors without data, and inputs that want a gradient."""
    case = inputs(op)
    found = case.mapped(torch.Tensor.double).run()
    assert max(map(error, found, recurrence(case))) <= 1e-12
    assert case.mapped(lambda x: x.to("meta")).run()[0].shape == (2, 20, 2, 7)
    case.timed[0].requires_grad_()
    assert case.run()[0].requires_grad


@both
def test_shapes_that_do_not_fit(op):
    case = inputs(op)
    for index in (1, 2, 3):
        timed = list(case.timed)
        timed[index] = torch.ones(2, 21, 2, 5)
        name = ["r", "w", "k", "v"][index]
        with pytest.raises(ValueError, match=rf"{name} must be \(2, 20, 2, 5\); found \(2, 21"):
            Case(op, timed, case.fixed, case.state).run()
    with pytest.raises(ValueError, match=r"initial_state must be \(2, 2, 5, 7\); found \(3, 2"):
        Case(op, case.timed, case.fixed, torch.zeros(3, 2, 5, 7)).run()
    with pytest.raises(ValueError, match=r"r must be \(batch, seqlen, nheads, head_dim\)"):
        Case(op, [x[0] for x in case.timed], case.fixed, case.state).run()


def test_a_bonus_of_another_shape():
    case = inputs("wkv6")
    with pytest.raises(ValueError, match=r"u must be \(2, 5\); found \(5,\)"):
        Case("wkv6", case.timed, [torch.zeros(5)], case.state).run()
