"""The causal convolution of `compat.ops`, in torch and native, tap by tap in float64."""

import pytest
import torch
from support.tolerances import OPS_DELTA, error
from torch.nn.functional import pad, silu

from compat.ops.convolution import causal_conv1d

pytestmark = pytest.mark.usefixtures("backend")


def tap_by_tap(x, weight, bias):
    width = weight.shape[1]
    seen = pad(x.double(), (width - 1, 0)).unfold(2, width, 1)
    out = (seen * weight.double()[:, None]).sum(-1)
    return silu(out if bias is None else out + bias.double()[:, None])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("channels", "seqlen"), [(1, 1), (5, 2), (64, 64), (130, 131)])
def test_any_size(channels, seqlen, width, dtype):
    x, weight = torch.randn(2, channels, seqlen).to(dtype), torch.randn(channels, width).to(dtype)
    for bias in (None, torch.randn(channels).to(dtype)):
        found, wanted = causal_conv1d(x, weight, bias), tap_by_tap(x, weight, bias)
        assert found.dtype == dtype
        assert error(found, wanted) <= OPS_DELTA[dtype] * wanted.abs().max().clamp(min=1)


@torch.no_grad()
def test_views_are_read_as_they_lie():
    x, weight = torch.randn(2, 9, 100), torch.randn(9, 4)
    wanted = causal_conv1d(x, weight)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.stack([x] * 2, 1).flatten(0, 1)[::2]
    for view in (turned, wide, torch.stack([x] * 2, 3)[..., 0]):
        assert torch.equal(causal_conv1d(view, weight.t().contiguous().t()), wanted)


def test_where_a_gradient_is_wanted_there_is_one():
    x, weight = torch.randn(1, 3, 9).double(), torch.randn(3, 4).double()
    for part in (x, weight):
        part.requires_grad_()
    assert torch.autograd.gradcheck(causal_conv1d, (x, weight))
    causal_conv1d(x.float(), weight.float()).sum().backward()
    assert weight.grad.abs().sum() > 0


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"weight must be of 5 channels; found \(4, 3\)"):
        causal_conv1d(torch.ones(1, 5, 9), torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"bias must be of 5 channels; found \(4,\)"):
        causal_conv1d(torch.ones(1, 5, 9), torch.ones(5, 3), torch.ones(4))
