"""RWKV-4's wkv of `compat.ops`, in torch and native, against a float64 recurrence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tolerances import OPS_WKV, error

from compat.ops.rwkv4 import rwkv_linear_attention

FEW = settings().max_examples // 2


def recurrence(time_decay, time_first, key, value, state):
    """Compute token by token, in float64; the state has the op's three parts, and so its scale."""
    decay, first, key, value = (x.double() for x in (-time_decay.exp(), time_first, key, value))
    above, below, top = (part.double() for part in state)
    outputs = []
    for k, v in zip(key.unbind(1), value.unbind(1), strict=True):
        most = torch.maximum(top, k + first)
        old, new = torch.exp(top - most), torch.exp(k + first - most)
        outputs.append((old * above + new * v) / (old * below + new))
        most = torch.maximum(top + decay, k)
        old, new = torch.exp(top + decay - most), torch.exp(k - most)
        above, below, top = old * above + new * v, old * below + new, most
    return torch.stack(outputs, 1), (above, below, top)


def empty(batch, dim):
    return torch.zeros(batch, dim), torch.zeros(batch, dim), torch.full((batch, dim), -1e30)


def inputs(batch=2, seqlen=20, dim=5, *, seed=0, begun=True, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=random)

    state = empty(batch, dim)
    if begun:
        state = randn(batch, dim), randn(batch, dim).exp(), randn(batch, dim)
    key, value = (randn(batch, seqlen, dim).to(dtype) for _ in range(2))
    return randn(dim), randn(dim), key, value, state


@torch.no_grad()
def wkv(*arguments, **options):
    return rwkv_linear_attention(*arguments, **options, return_state=True)


def check(found, wanted, dtype=torch.float32):
    (out, state), (wanted_out, wanted_state) = found, wanted
    assert out.dtype == dtype
    assert error(out, wanted_out) <= OPS_WKV[dtype] * wanted_out.abs().max()
    for part, exact in zip(state, wanted_state, strict=True):
        assert part.dtype == torch.float32
        assert error(part, exact) <= OPS_WKV[torch.float32] * exact.abs().clamp(min=1).max()


@pytest.mark.usefixtures("backend")
class TestLaws:
    @settings(max_examples=FEW)
    @given(
        shape=st.tuples(st.integers(1, 3), st.integers(1, 150), st.integers(1, 80)),
        cuts=st.sets(st.integers(1, 149), max_size=3),
        begun=st.booleans(),
        seed=st.integers(0, 9),
    )
    def test_chunking_is_invisible(self, shape, cuts, begun, seed):
        decay, first, key, value, state = inputs(*shape, seed=seed, begun=begun)
        wanted = recurrence(decay, first, key, value, state)
        ends = [*sorted(cut for cut in cuts if cut < shape[1]), shape[1]]
        pieces, state = [], state if begun else None
        for begin, end in zip([0, *ends], ends, strict=False):
            out, state = wkv(decay, first, key[:, begin:end], value[:, begin:end], state)
            pieces.append(out)
        check((torch.cat(pieces, 1), state), wanted)

    @pytest.mark.parametrize("dim", [1, 64, 65, 257])
    @pytest.mark.parametrize("seqlen", [1, 2, 3, 4, 63, 64, 65])
    def test_any_size(self, seqlen, dim):
        arguments = inputs(1, seqlen, dim)
        check(wkv(*arguments), recurrence(*arguments))

    def test_batching_is_invisible(self):
        decay, first, key, value, state = inputs(4, 50, 7)
        out, last = wkv(decay, first, key, value, state)
        row = decay, first, key[2:3], value[2:3], [part[2:3] for part in state]
        check((out[2:3], [part[2:3] for part in last]), recurrence(*row))

    @pytest.mark.parametrize("seqlen", [1, 100])
    def test_bfloat16(self, seqlen):
        arguments = inputs(2, seqlen, 70, dtype=torch.bfloat16)
        check(wkv(*arguments), recurrence(*arguments), torch.bfloat16)

    def test_a_row_without_a_token_hands_its_state_on(self):
        arguments = inputs(seqlen=0)
        out, last = wkv(*arguments)
        assert out.shape == (2, 0, 5)
        assert all(torch.equal(a, b) for a, b in zip(last, arguments[-1], strict=True))

    def test_the_state_is_left_as_it_was(self):
        *arguments, state = inputs()
        before = [part.clone() for part in state]
        wkv(*arguments, state)
        assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


@pytest.mark.usefixtures("backend")
def test_the_first_token_of_a_text_counts_alone():
    decay, first, key, value, _ = inputs(begun=False)
    out, state = wkv(decay, first, key, value)
    assert error(out[:, 0], value[:, 0]) <= OPS_WKV[torch.float32]
    out, nothing = rwkv_linear_attention(decay, first, key, value)
    assert nothing is None
    check((out, state), recurrence(decay, first, key, value, empty(2, 5)))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("size", [100, 10_000, 10**7])
def test_keys_of_any_size(size):
    """Use keys with exponentials beyond float64; whole numbers, so that sums are exact."""
    _, _, key, value, state = inputs(2, 120, 9, begun=False)
    key = (key * size).round()
    decay, first = torch.zeros(9), torch.arange(-4.0, 5.0)
    state = (*inputs(2, 1, 9)[-1][:2], torch.tensor([[-size], [size]]).expand(2, 9).float())
    arguments = decay, first, key, value, state
    check(wkv(*arguments), recurrence(*arguments))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("time_decay", [-20.0, 3.0, 8.0])
def test_decays_of_any_strength(time_decay):
    """Go from a mean of all values to one that forgets at once."""
    _, first, key, value, state = inputs(2, 300, 9)
    arguments = torch.full((9,), time_decay), first, key, value, state
    check(wkv(*arguments), recurrence(*arguments))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_are_read_as_they_lie(dtype):
    decay, first, key, value, state = inputs(2, 40, 70, dtype=dtype)
    wanted, _ = wkv(decay, first, key, value, state)
    wide = torch.stack([key, key * float("nan")], 2).flatten(1, 2)[:, ::2]
    turned = value.transpose(1, 2).contiguous().transpose(1, 2)
    strided = [torch.stack([part] * 2, 2)[..., 0] for part in state]
    found, _ = wkv(torch.stack([decay] * 2, 1)[:, 0], first, wide, turned, strided)
    assert torch.equal(found, wanted)


@pytest.mark.usefixtures("backend")
def test_a_nan_stays_in_its_channel_and_after_its_token():
    decay, first, key, value, state = inputs(1, 90, 70)
    wanted, _ = wkv(decay, first, key, value, state)
    value[0, 50, 17] = float("nan")
    found, _ = wkv(decay, first, key, value, state)
    touched = torch.zeros(1, 90, 70, dtype=torch.bool)
    touched[0, 50:, 17] = True
    assert torch.equal(found.isnan(), touched)
    assert torch.equal(found[~touched], wanted[~touched])


@pytest.mark.parametrize("seqlen", [1, 11])
@pytest.mark.parametrize("begun", [False, True])
def test_gradients_in_float64(seqlen, begun):
    *arguments, state = inputs(2, seqlen, 3, begun=begun)
    values = [x.double().requires_grad_() for x in (*arguments, *state * begun)]

    def run(*given):
        out, last = rwkv_linear_attention(*given[:4], given[4:] or None, return_state=True)
        return out, *last

    assert torch.autograd.gradcheck(run, values)


@pytest.mark.usefixtures("backend")
def test_where_a_gradient_is_wanted_there_is_one():
    arguments = inputs()
    key, exact = arguments[2], arguments[2].double()
    for value in (key, exact):
        value.requires_grad_()
    rwkv_linear_attention(*arguments)[0].square().sum().backward()
    recurrence(*arguments[:2], exact, *arguments[3:])[0].square().sum().backward()
    assert error(key.grad, exact.grad) <= OPS_WKV[torch.float32] * exact.grad.abs().max()


@pytest.mark.usefixtures("backend")
def test_native_is_not_given_what_it_cannot_read():
    *arguments, state = inputs()
    exact = [x.double() for x in arguments]
    out, last = wkv(*exact, [part.double() for part in state])
    wanted, wanted_last = recurrence(*exact, state)
    assert error(out, wanted) <= 1e-12
    assert max(error(a, b) for a, b in zip(last, wanted_last, strict=True)) <= 1e-12
    meta = [x.to("meta") for x in arguments]
    assert wkv(*meta)[0].shape == (2, 20, 5)


@pytest.mark.parametrize(
    ("index", "says"),
    [(0, "time_decay"), (1, "time_first"), (3, "value")],
)
def test_shapes_that_do_not_fit(index, says):
    arguments = list(inputs())
    arguments[index] = torch.ones(2, 20, 6)
    with pytest.raises(ValueError, match=f"{says} must be"):
        wkv(*arguments)


def test_a_state_of_another_batch():
    *arguments, _ = inputs()
    with pytest.raises(ValueError, match=r"state\[0\] must be \(2, 5\); found \(3, 5\)"):
        wkv(*arguments, empty(3, 5))
