"""Mamba-1 and Mamba-2 with states, on a GPU if there is one and else on a CPU, against float64."""

import os

# Else Triton rounds float32 to TF32 in matrix products.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")

import kernels
import pytest
import torch
from torch.nn.functional import silu, softplus

mamba = kernels.get_kernel("kernels-community/mamba-ssm", version=6)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, HEADDIM, DSTATE, GROUPS, WIDTH = 4, 32, 16, 2, 4
INNER = HEADS * HEADDIM
CONV_DIM = INNER + 2 * GROUPS * DSTATE
LIMIT = (0.01, 0.2)
# Two sequences between paddings; one whose id is not 0; a row without a token.
SEQ_IDX = [
    [-1] * 5 + [0] * 45 + [1] * 40 + [-1] * 6,
    [7] * 96,
    [-1] * 96,
]
# No cut where a sequence begins: there the states would have to be zeros.
CUTS = [[96], [1, 95], [48, 48], [3, 60, 33]]
# The largest error as a share of the largest value: 24 bits, less 5 for sums over tokens and state.
TOLERANCE = 2e-5

pytestmark = pytest.mark.kernels_ci


def assert_near(found, wanted):
    error = (found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1)
    assert error <= TOLERANCE


def draw():
    torch.manual_seed(0)
    seq_idx = torch.tensor(SEQ_IDX, dtype=torch.int32, device=DEVICE)
    rows, length = seq_idx.shape
    tensors = {
        "zxbcdt": torch.randn(rows, length, INNER + CONV_DIM + HEADS),
        "conv1d_weight": torch.randn(CONV_DIM, WIDTH) / 2,
        "conv1d_bias": torch.randn(CONV_DIM),
        "dt_bias": torch.randn(HEADS) - 3,
        "A": -torch.rand(HEADS) - 0.5,
        "D": torch.randn(HEADS),
        "rmsnorm_weight": torch.rand(INNER) + 0.5,
        "initial_states": torch.randn(rows, HEADS, HEADDIM, DSTATE),
        "initial_conv_states": torch.randn(rows, WIDTH - 1, CONV_DIM).transpose(1, 2),
    }
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}, seq_idx


def reference(seq_idx, zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, rmsnorm_weight, **states):
    """Token by token (arXiv 2405.21060): outputs, zero at padding, and both final states."""
    outs, ssm_states, conv_states = [], [], []
    for row in range(len(zxbcdt)):
        state, seen, last = states["initial_states"][row], states["initial_conv_states"][row], None
        for t, sequence in enumerate(seq_idx[row].tolist()):
            if sequence < 0:
                outs.append(zxbcdt.new_zeros(INNER))
                continue
            if last not in (None, sequence):
                state, seen = torch.zeros_like(state), torch.zeros_like(seen)
            last = sequence
            z, xbc, dt = zxbcdt[row, t].split([INNER, CONV_DIM, HEADS])
            seen = torch.cat([seen[:, 1 - WIDTH :], xbc[:, None]], 1)
            xbc = silu((seen * conv1d_weight).sum(1) + conv1d_bias)
            x, B, C = xbc.split([INNER, GROUPS * DSTATE, GROUPS * DSTATE])
            x = x.view(HEADS, HEADDIM)
            B, C = (v.view(GROUPS, DSTATE).repeat_interleave(HEADS // GROUPS, 0) for v in (B, C))
            dt = softplus(dt + dt_bias).clamp(*LIMIT)
            state = state * (dt * A).exp()[:, None, None]
            state = state + (dt[:, None] * x)[:, :, None] * B[:, None]
            y = (state * C[:, None]).sum(-1) + D[:, None] * x
            y = (y.flatten() * silu(z)).view(GROUPS, -1)
            y = y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            outs.append(y.flatten() * rmsnorm_weight)
        ssm_states.append(state)
        conv_states.append(seen[:, 1 - WIDTH :])
    out = torch.stack(outs).view(*zxbcdt.shape[:2], INNER)
    return out, torch.stack(ssm_states), torch.stack(conv_states)


def in_pieces(function, cuts, seq_idx, zxbcdt, initial_states, initial_conv_states, **others):
    outs = []
    for part, seq_part in zip(zxbcdt.split(cuts, 1), seq_idx.split(cuts, 1), strict=True):
        out, initial_states, initial_conv_states = function(
            part,
            **others,
            chunk_size=32,
            seq_idx=seq_part,
            initial_states=initial_states,
            initial_conv_states=initial_conv_states,
            return_final_states=True,
            return_final_conv_states=True,
            dt_limit=LIMIT,
            headdim=HEADDIM,
            ngroups=GROUPS,
            norm_before_gate=False,
        )
        outs.append(out)
    out = torch.cat(outs, 1)
    return out.where((seq_idx >= 0)[..., None], 0.0), initial_states, initial_conv_states


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_pieces_of_packed_and_padded_rows(cuts):
    tensors, seq_idx = draw()
    wanted = reference(seq_idx, **{name: tensor.double() for name, tensor in tensors.items()})
    layer = mamba.layers.mamba_split_conv1d_scan_combined()
    for function in (mamba.mamba_split_conv1d_scan_combined, layer):
        found = in_pieces(function, cuts, seq_idx, **tensors)
        assert found[1].dtype == torch.float32
        for one, other in zip(found, wanted, strict=True):
            assert_near(one, other)


def test_gradients_go_through_the_states():
    tensors, seq_idx = draw()
    torch.manual_seed(1)
    shapes = [(*seq_idx.shape, INNER)]
    shapes += [tensors[name].shape for name in ("initial_states", "initial_conv_states")]
    douts = [torch.randn(shape, device=DEVICE) for shape in shapes]

    def gradients(function, dtype):
        leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in tensors.items()}
        outs = function(**leaves)
        return torch.autograd.grad(outs, leaves.values(), [dout.to(dtype) for dout in douts])

    split = mamba.mamba_split_conv1d_scan_combined
    wanted = gradients(lambda **t: reference(seq_idx, **t), torch.float64)
    found = gradients(lambda **t: in_pieces(split, CUTS[-1], seq_idx, **t), torch.float32)
    for name, one, other in zip(tensors, found, wanted, strict=True):
        # A parameter's is a sum over all tokens, in which terms cancel.
        error = (one.double() - other).abs().max() / other.abs().max()
        assert error <= 10 * TOLERANCE, name


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_the_scan_of_mamba_1_in_pieces(cuts):
    torch.manual_seed(0)
    rows, dim, length = 2, 8, 96
    u, delta, z = (torch.randn(rows, dim, length, device=DEVICE) for _ in range(3))
    B, C = (torch.randn(rows, DSTATE, length, device=DEVICE) for _ in range(2))
    A = -torch.rand(dim, DSTATE, device=DEVICE)
    D = torch.randn(dim, device=DEVICE)
    state = torch.randn(rows, dim, DSTATE, device=DEVICE)

    h, ys = state.double(), []
    for t in range(length):
        dt = softplus(delta[:, :, t].double())[..., None]
        h = h * (dt * A.double()).exp() + dt * B[:, None, :, t].double() * u[:, :, t, None].double()
        y = (h * C[:, None, :, t].double()).sum(-1) + D.double() * u[:, :, t].double()
        ys.append(y * silu(z[:, :, t].double()))

    layer, outs = mamba.layers.selective_scan_fn(), []
    pieces = (v.split(cuts, -1) for v in (u, delta, B, C, z))
    for u_, delta_, B_, C_, z_ in zip(*pieces, strict=True):
        options = {"delta_softplus": True, "return_last_state": True, "initial_states": state}
        out, state = layer(u_, delta_, A, B_, C_, D, z_, **options)
        outs.append(out)
    assert_near(torch.cat(outs, -1), torch.stack(ys, -1))
    assert_near(state, h)


def test_a_token_at_a_time():
    torch.manual_seed(0)
    rows, length = 2, 5
    x = torch.randn(rows, length, HEADS, HEADDIM, device=DEVICE)
    dt = torch.rand(rows, length, HEADS, device=DEVICE)
    B, C = (torch.randn(rows, length, GROUPS, DSTATE, device=DEVICE) for _ in range(2))
    A, D = -torch.rand(HEADS, device=DEVICE), torch.randn(HEADS, device=DEVICE)
    state = torch.randn(rows, HEADS, HEADDIM, DSTATE, device=DEVICE)

    wanted, last = mamba.mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size=32, D=D, initial_states=state, return_final_states=True
    )
    for t in range(length):
        out = mamba.selective_state_update(
            state,
            x[:, t],
            dt[:, t, :, None].expand(-1, -1, HEADDIM),
            A[:, None, None].expand(-1, HEADDIM, DSTATE),
            B[:, t],
            C[:, t],
            D[:, None].expand(-1, HEADDIM),
        )
        assert_near(out, wanted[:, t].double())
    assert_near(state, last.double())


def test_what_a_layer_does_not_know_raises():
    tensors, seq_idx = draw()
    layer = mamba.layers.mamba_split_conv1d_scan_combined()
    with pytest.raises(TypeError, match="initial_conv_state"):
        in_pieces(layer, CUTS[0], seq_idx, **tensors, initial_conv_state=seq_idx)
