"""The convolution with states, on a GPU if there is one and else on a CPU, against float64."""

import kernels
import pytest
import torch

conv = kernels.get_kernel("kernels-community/causal-conv1d", version=2)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIM, WIDTH = 16, 4
# Two sequences between paddings; one whose id is not 0; a row without a token.
SEQ_IDX = [
    [-1] * 3 + [0] * 9 + [1] * 11 + [-1] * 2,
    [7] * 25,
    [-1] * 25,
]
# None of them where a sequence begins: there the states would have to be zeros.
CUTS = [[25], [1, 24], [2, 9, 3, 11], [13, 12]]
# Relative and absolute: a result carries one rounding to its type, half a unit of 2^-23, 2^-10 and
# 2^-7, and some more of float32 by the sigmoid; a GPU's fast exponential costs 2 bits of it.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}

pytestmark = pytest.mark.kernels_ci


def draw(dtype):
    torch.manual_seed(0)
    seq_idx = torch.tensor(SEQ_IDX, dtype=torch.int32)
    x = torch.randn(*seq_idx.shape, DIM).transpose(1, 2)
    weight, bias = torch.randn(DIM, WIDTH), torch.randn(DIM)
    state = torch.randn(len(SEQ_IDX), WIDTH - 1, DIM).transpose(1, 2)
    tensors = [t.to(dtype) for t in (x, weight, bias, state)]
    return [t.to(DEVICE) for t in (*tensors, seq_idx)]


def reference(x, weight, bias, state, seq_idx):
    """Token by token, in float64: outputs, zero at padding, and final states."""
    x, weight, bias, state = (t.double() for t in (x, weight, bias, state))
    outs, states = torch.zeros_like(x), []
    for row in range(len(x)):
        seen, last = state[row], None
        for t, sequence in enumerate(seq_idx[row].tolist()):
            if sequence < 0:
                continue
            if last not in (None, sequence):
                seen = torch.zeros_like(seen)
            seen, last = torch.cat([seen[:, 1 - WIDTH :], x[row, :, t : t + 1]], 1), sequence
            outs[row, :, t] = torch.nn.functional.silu((seen * weight).sum(1) + bias)
        states.append(seen[:, 1 - WIDTH :])
    return outs, torch.stack(states)


def in_pieces(function, x, weight, bias, state, seq_idx, cuts):
    outs = []
    for x_part, seq_part in zip(x.split(cuts, 2), seq_idx.split(cuts, 1), strict=True):
        out, state = function(
            x_part,
            weight,
            bias,
            seq_idx=seq_part,
            initial_states=state,
            return_final_states=True,
            activation="silu",
        )
        outs.append(out)
    return torch.cat(outs, 2), state


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_pieces_of_packed_and_padded_rows(cuts, dtype):
    arguments = draw(dtype)
    wanted = reference(*arguments)
    layer = conv.layers.causal_conv1d_fn()
    for function in (conv.causal_conv1d_fn, layer):
        for found, expected in zip(in_pieces(function, *arguments, cuts), wanted, strict=True):
            assert found.dtype == dtype
            bound = TOLERANCE[dtype]
            torch.testing.assert_close(found.double(), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_gradients_go_through_the_states(cuts):
    x, weight, bias, state, seq_idx = draw(torch.float32)
    leaves = [x, weight, bias, state]
    torch.manual_seed(1)
    douts = [torch.randn_like(x), torch.randn_like(state)]

    def gradients(function, *tensors):
        tensors = [t.detach().requires_grad_() for t in tensors]
        outs = function(*tensors, seq_idx)
        return torch.autograd.grad(outs, tensors, [dout.to(outs[0].dtype) for dout in douts])

    wanted = gradients(reference, *[t.double() for t in leaves])
    found = gradients(lambda *t: in_pieces(conv.causal_conv1d_fn, *t, cuts), *leaves)
    for one, other in zip(found, wanted, strict=True):
        # Sums over all tokens, added up in another order.
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_a_token_at_a_time():
    x, weight, bias, state, _ = draw(torch.float32)
    seq_idx = torch.zeros(x.shape[0], x.shape[2], dtype=torch.int32, device=DEVICE)
    wanted, last = reference(x, weight, bias, state, seq_idx)
    for t in range(x.shape[2]):
        out = conv.causal_conv1d_update(x[:, :, t], state, weight, bias, "silu")
        torch.testing.assert_close(out.double(), wanted[:, :, t], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.double(), last, rtol=0, atol=0)


def test_what_a_layer_does_not_know_raises():
    x, weight, bias, _, _ = draw(torch.float32)
    with pytest.raises(TypeError, match="initial_conv_states"):
        conv.layers.causal_conv1d_fn()(x, weight, bias, initial_conv_states=x)
