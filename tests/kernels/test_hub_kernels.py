"""The hub kernels' code for a GPU, called through its ops, on emulated kernels: as the fork."""

import importlib
import itertools
import sys
from types import ModuleType

import pytest
import torch

from tests.ci.test_hub_kernels import schemas, tree_of
from tests.kernels.test_selective_scan import quick

_names = (f"hub_kernel_{number}" for number in itertools.count())


@pytest.fixture
def package():
    """Map a kernel and its ops to a module of it, without running its `__init__`."""
    libraries = []

    def load(kernel, functions, module):
        name, tree = next(_names), tree_of(kernel)
        libraries.append(torch.library.Library(name, "DEF"))
        for op, schema in schemas(tree).items():
            libraries[-1].define(str(schema))
            if op in functions:
                libraries[-1].impl(op, functions[op], "CPU")
        root, ops = ModuleType(name), ModuleType(f"{name}._ops")
        root.__path__ = [str(tree / "torch-ext" / kernel.replace("-", "_"))]
        ops.ops = getattr(torch.ops, name)
        ops.add_op_namespace_prefix = lambda op: f"{name}::{op}"
        sys.modules |= {name: root, f"{name}._ops": ops}
        return importlib.import_module(f"{name}.{module}")

    yield load
    for library in libraries:
        library._destroy()


def outcome(function, leaves, *others):
    """Return outputs and gradients."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    outs = function(*leaves, *others)
    douts = [torch.linspace(-1, 1, out.numel()).view_as(out) for out in outs]
    return [*outs, *torch.autograd.grad(outs, leaves, douts)]


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("kernel", "module"),
    [
        ("causal-conv1d", "causal_conv1d_interface"),
        ("mamba-ssm", "_causal_conv1d.causal_conv1d_interface"),
    ],
)
def test_the_convolution(emulated_conv, package, kernel, module):
    fork = emulated_conv("patched")
    hub = package(kernel, vars(fork.causal_conv1d_cuda), module)
    x = torch.randn(2, 21, 16).transpose(1, 2)
    weight, bias = torch.randn(16, 4), torch.randn(16)
    states = torch.randn(2, 3, 16).transpose(1, 2)
    seq_idx = torch.tensor([[-1] * 4 + [0] * 9 + [1] * 8, [5] * 21], dtype=torch.int32)

    def run(conv):
        return outcome(
            lambda x, weight, bias, states: conv.causal_conv1d_fn(
                x, weight, bias, seq_idx, states, return_final_states=True, activation="silu"
            ),
            [x, weight, bias, states],
        )

    assert_same(run(hub), run(fork))

    ours, theirs = states.clone(), states.clone()
    out = hub.causal_conv1d_update(x[:, :, 0], ours, weight, bias, "silu")
    assert_same(
        [out, ours], [fork.causal_conv1d_update(x[:, :, 0], theirs, weight, bias, "silu"), theirs]
    )
    assert not torch.equal(ours, states)


@pytest.mark.slow
def test_the_selective_scan(package):
    fork = quick()
    functions = {
        f"selective_scan_{n}": getattr(fork.selective_scan_cuda, n) for n in ("fwd", "bwd")
    }
    hub = package("mamba-ssm", functions, "ops.selective_scan_interface")
    u, delta, z = (torch.randn(2, 8, 50) for _ in range(3))
    B, C = torch.randn(2, 4, 50), torch.randn(2, 4, 50)
    A, D, bias = -torch.rand(8, 4), torch.randn(8), torch.randn(8)
    initial_states = torch.randn(2, 8, 4)

    def run(scan):
        leaves = [u, delta, A, B, C, D, z, bias]
        return outcome(
            lambda *leaves: scan.selective_scan_fn(*leaves[:-1], True, True, leaves[-1]),
            [*leaves, initial_states],
        )

    assert_same(run(hub), run(fork))
