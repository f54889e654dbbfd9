"""The built CPU variants: their description by `kernels`, and the four laws for each layer.

Layers and functions are compared with the float64 recurrences of tests/kernels.
"""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import LocalLayerRepository
from kernels.layer.layer import _validate_layer
from support import hub_kernels as hub
from support.conv_oracle import causal_conv1d
from support.selective_scan_oracle import selective_scan_oracle
from support.ssd_oracle import error, scan
from support.tolerances import KERNEL_CONV, KERNEL_SELECTIVE_SCAN, KERNEL_SSD

from tests.kernels import test_ssd_laws as laws

F32, BF16 = torch.float32, torch.bfloat16
both = pytest.mark.parametrize("name", sorted(hub.LAYERS))


def layer(name, kernel="mamba-ssm"):
    """Return a layer's forward, as a function without the module that it is put into."""
    forward = getattr(hub.kernel(kernel).layers, name).forward
    return lambda *args, **kwargs: forward(None, *args, **kwargs)


# The description by `kernels`.


@both
def test_kernels_describes_the_kernel(name):
    program = Path(sys.executable).parent / "kernels"
    done = subprocess.run(
        [program, "info", "--json", hub.tree(name)], capture_output=True, text=True, check=True
    )
    said = json.loads(done.stdout)
    assert (said["name"], said["backends"]) == (name, ["cpu"])
    assert said["upstream"].startswith("https://github.com/")
    loaded = {k.module: k.metadata for k in kernels.get_loaded_kernels()}
    assert str(loaded.get(hub.kernel(name), said).name if hub.kernel(name) in loaded else name)


@pytest.mark.parametrize(
    ("model_type", "name"), [(t, n) for t, names in hub.MODELS.items() for n in names]
)
def test_a_layer_is_valid_for_the_function_that_it_replaces(model_type, name):
    cls = getattr(hub.kernel().layers, name)
    repo = LocalLayerRepository(repo_path=hub.tree("mamba-ssm"), layer_name=name)
    _validate_layer(check_cls=type(hub.functions(model_type)[name]), cls=cls, repo=repo)


def test_a_layer_of_one_more_parameter_is_not_valid():
    class More(torch.nn.Module):
        def forward(self, hidden_states, weight, bias, activation, initial_states, **kwargs):
            pass

    check_cls = type(hub.functions("mamba2")["causal_conv1d_fn"])
    with pytest.raises(TypeError, match="different number of arguments"):
        _validate_layer(check_cls=check_cls, cls=More, repo=None)


SOURCES = {
    "causal_conv1d_fn": "_causal_conv1d/causal_conv1d_interface.py",
    "causal_conv1d_update": "_causal_conv1d/causal_conv1d_interface.py",
    "mamba_chunk_scan_combined": "ops/triton/ssd_combined.py",
    "mamba_inner_fn": "ops/selective_scan_interface.py",
    "mamba_split_conv1d_scan_combined": "ops/triton/ssd_combined.py",
    "selective_scan_fn": "ops/selective_scan_interface.py",
    "selective_state_update": "ops/triton/selective_state_update.py",
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_function_has_the_parameters_of_the_one_for_a_gpu(name):
    text = (hub.tree("mamba-ssm") / "torch-ext" / "mamba_ssm" / SOURCES[name]).read_text()
    (found,) = [
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    own = inspect.signature(getattr(hub.kernel(), name)).parameters.values()
    assert [p.name for p in own] == [argument.arg for argument in found.args.args]
    defaults = [eval(ast.unparse(node)) for node in found.args.defaults]
    assert [p.default for p in own if p.default is not p.empty] == defaults


# The laws.


def of_layers(**arguments):
    """Call `mamba_chunk_scan_combined`, whose first parameter has another name in transformers."""
    arguments["hidden_states"] = arguments.pop("x")
    return layer("mamba_chunk_scan_combined")(**arguments)


OPS = SimpleNamespace(
    ssd_combined=SimpleNamespace(
        mamba_chunk_scan_combined=of_layers,
        mamba_split_conv1d_scan_combined=layer("mamba_split_conv1d_scan_combined"),
    ),
    check_guards=lambda: None,
)


@pytest.mark.parametrize("fused", [False, True], ids=["scan", "fused"])
@settings(max_examples=settings().max_examples // 2)
@given(data=st.data())
def test_scan_and_fused_op_for_any_call(fused, data):
    """Run calls in pieces, packed, padded; compare outputs, states and gradients."""
    case = data.draw(laws.cases(fused))
    found = laws.errors(laws.results(laws.call_kernels, OPS, case), case)
    assert max(found.values()) <= KERNEL_SSD[case.dtype], found


@pytest.mark.parametrize("fused", [False, True], ids=["scan", "fused"])
@settings(max_examples=settings().max_examples // 2)
@given(data=st.data())
def test_the_same_without_gradients(fused, data):
    """Run the fused op where it is native."""
    case = data.draw(laws.cases(fused))
    wanted = [*laws.expected(case).items()]
    with torch.no_grad():
        found = laws.in_pieces(laws.call_kernels, OPS, case, laws.inputs(case))
    if case.rows is not None:
        assert not found[0][case.seq_idx < 0].any()
    for tensor, (name, exact) in zip(found, wanted, strict=False):
        assert error(tensor, exact) <= KERNEL_SSD[case.dtype], name


@st.composite
def rows_of_ids(draw, seqlen):
    """Draw packed and padded rows, int32 (batch, seqlen)."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        left = draw(st.integers(0, seqlen))
        right = draw(st.integers(0, seqlen - left))
        tokens = torch.tensor(draw(st.lists(st.booleans(), min_size=seqlen, max_size=seqlen)))
        ids = tokens.int().cumsum(0)
        ids[:left] = -1
        ids[seqlen - right :] = -1
        rows.append(ids)
    return torch.stack(rows).int()


@both
@given(data=st.data(), seqlen=st.integers(1, 12), width=st.integers(1, 5))
def test_convolution_for_any_rows(name, data, seqlen, width):
    """Run packed and padded rows, in two pieces; compare outputs and states."""
    ids = data.draw(rows_of_ids(seqlen))
    dtype = data.draw(st.sampled_from([F32, BF16]))
    cut = data.draw(st.integers(0, seqlen))
    activation = data.draw(st.sampled_from([None, "silu"]))
    dim = 3
    x = torch.randn(len(ids), dim, seqlen).to(dtype)
    weight, bias = torch.randn(dim, width).to(dtype), torch.randn(dim).to(dtype)
    initial = torch.randn(len(ids), dim, width - 1).to(dtype)
    run = layer("causal_conv1d_fn", name)

    def piece(start, end, state):
        return run(
            x[..., start:end], weight, bias, activation, seq_idx=ids[:, start:end],
            initial_states=state, return_final_states=True,
        )  # fmt: skip

    exact, exact_final = causal_conv1d(
        x, weight, bias, seq_idx=ids, initial_states=initial, silu=activation is not None
    )
    out, final = piece(0, seqlen, initial)
    rtol, atol = KERNEL_CONV[dtype]
    torch.testing.assert_close(out.double(), exact, rtol=rtol, atol=atol)
    assert torch.equal(final.double(), exact_final)
    # The second piece begins a new sequence, or continues the last one of the first.
    first, state = piece(0, cut, initial)
    before = ids[:, :cut].max(1).values if cut else torch.full((len(ids),), -1)
    own = [row[row >= 0][0].item() if (row >= 0).any() else -1 for row in ids[:, cut:]]
    goes_on = (torch.tensor(own) == before) | (torch.tensor(own) < 0) | (before < 0)
    state = state * goes_on[:, None, None]
    second, last = piece(cut, seqlen, state)
    torch.testing.assert_close(torch.cat([first, second], -1), out, rtol=rtol, atol=atol)
    handed_on = torch.tensor(own) < 0
    assert torch.equal(last[~handed_on], final[~handed_on])


@both
@pytest.mark.parametrize("extra", [0, 1, 3])
@pytest.mark.parametrize("seqlen", [1, 2, 7])
def test_convolution_of_the_next_inputs(name, seqlen, extra):
    """Compare `causal_conv1d_update` with the convolution from its state."""
    x, weight, bias = torch.randn(2, 5, seqlen), torch.randn(5, 4), torch.randn(5)
    state = torch.randn(2, 5, 3 + extra)
    exact, final = causal_conv1d(x, weight, bias, initial_states=state[..., extra:], silu=True)
    old = state.clone()
    out = layer("causal_conv1d_update", name)(x, state, weight, bias, "silu")
    rtol, atol = KERNEL_CONV[F32]
    torch.testing.assert_close(out.double(), exact, rtol=rtol, atol=atol)
    assert torch.equal(state[..., extra:].double(), final)
    assert torch.equal(state, torch.cat([old, x], -1)[..., seqlen:])


def test_states_of_sequences_that_follow_one_another():
    x = torch.randn(9, 3)
    found = hub.kernel("causal-conv1d").causal_conv1d_varlen_states(x, torch.tensor([0, 2, 9]), 4)
    assert torch.equal(found[0].T, torch.cat([torch.zeros(2, 3), x[:2]]))
    assert torch.equal(found[1].T, x[5:])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("ngroups", [1, 2])
def test_one_token_is_a_scan_of_one_token(ngroups, dtype):
    batch, heads, dim, dstate = 2, 4, 3, 5
    x, dt, z = (torch.randn(batch, heads, dim).to(dtype) for _ in range(3))
    dt = dt[..., :1].expand(-1, -1, dim)
    B, C = (torch.randn(batch, ngroups, dstate).to(dtype) for _ in range(2))
    A, D, bias = -torch.rand(heads), torch.randn(heads), torch.randn(heads)
    state = torch.randn(batch, heads, dim, dstate)
    exact, final = scan(
        x[:, None], dt[:, None, :, 0], A, B[:, None], C[:, None], D=D, z=z[:, None], dt_bias=bias,
        initial_states=state, dt_softplus=True,
    )  # fmt: skip
    wide = [t[:, None].expand(-1, dim) for t in (D, bias)]
    out = layer("selective_state_update")(
        state, x, dt, A[:, None, None].expand(-1, dim, dstate), B, C, *wide, dt_softplus=True, z=z
    )
    assert out.dtype == dtype
    assert error(out[:, None], exact) <= KERNEL_SSD[dtype]
    assert error(state, final) <= KERNEL_SSD[F32]


@pytest.mark.parametrize("norms", [False, True])
def test_the_inner_function_of_mamba1_is_its_parts(norms):
    dim, rank, dstate = 4, 2, 3
    xz, weight, bias = torch.randn(2, 2 * dim, 9), torch.randn(dim, 1, 4), torch.randn(dim)
    x_proj, dt_proj = torch.randn(rank + 2 * dstate, dim) / 2, torch.randn(dim, rank)
    out_proj, A, D = torch.randn(5, dim), -torch.rand(dim, dstate), torch.randn(dim)
    weights = [torch.rand(dstate) + 0.5, torch.rand(dstate) + 0.5, torch.rand(dim) + 0.5]
    more = dict(zip(["b_rms_weight", "c_rms_weight", "dt_rms_weight"], weights, strict=True))
    found = layer("mamba_inner_fn")(
        xz, weight, bias, x_proj, dt_proj, out_proj, None, A, D=D, delta_bias=bias,
        **(more if norms else {}),
    )  # fmt: skip
    x, z = xz.double().chunk(2, dim=1)
    x, _ = causal_conv1d(x, weight[:, 0], bias, silu=True)
    dt, B, C = (x.mT @ x_proj.double().T).split([rank, dstate, dstate], dim=-1)
    parts = [B, C, dt @ dt_proj.double().T]
    if norms:
        parts = [
            part * (part.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
            for part, weight in zip(parts, weights, strict=True)
        ]
    B, C, delta = (part.mT for part in parts)
    y, _ = selective_scan_oracle(x, delta, A.double(), B, C, D.double(), z, bias.double(), True)
    wanted = y.mT @ out_proj.double().T
    assert error(found, wanted) <= KERNEL_SELECTIVE_SCAN[F32]


@given(seqlen=st.integers(1, 20), data=st.data())
def test_mamba1_in_pieces(seqlen, data):
    cut = data.draw(st.integers(0, seqlen))
    u, delta, z = (torch.randn(2, 4, seqlen) for _ in range(3))
    B, C = torch.randn(2, 3, seqlen), torch.randn(2, 3, seqlen)
    A, D, bias, state = -torch.rand(4, 3), torch.randn(4), torch.randn(4), torch.randn(2, 4, 3)
    exact, final = selective_scan_oracle(
        *(t.double() for t in (u, delta, A, B, C, D, z, bias)), True, state.double()
    )
    outs = []
    for part in (slice(0, cut), slice(cut, seqlen)):
        if part.start < part.stop:
            out, state = layer("selective_scan_fn")(
                u[..., part], delta[..., part], A, B[..., part], C[..., part], D, z[..., part],
                bias, True, return_last_state=True, initial_states=state,
            )  # fmt: skip
            outs.append(out)
    assert error(torch.cat(outs, -1), exact) <= KERNEL_SELECTIVE_SCAN[F32]
    assert error(state, final) <= KERNEL_SELECTIVE_SCAN[F32]
