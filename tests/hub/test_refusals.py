"""A layer that cannot do what it is given raises, and the server of a call is reported."""

import importlib
import inspect
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support import hub_kernels as hub
from transformers.utils.generic import TransformersKwargs

from tests.hub.test_layers import layer

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
X, WEIGHT = torch.randn(2, 4, 6), torch.randn(4, 3)


def scan(**more):
    sizes = {"hidden_states": (2, 6, 2, 4), "dt": (2, 6, 2), "B": (2, 6, 1, 3), "C": (2, 6, 1, 3)}
    given = {name: torch.randn(size) for name, size in sizes.items()}
    return layer("mamba_chunk_scan_combined")(
        **{**given, "A": -torch.rand(2), "chunk_size": 4, **more}
    )


def fused(**more):
    sizes = {"zxbcdt": (2, 6, 24), "conv1d_weight": (14, 3), "dt_bias": (2,), "D": (2,)}
    given = {name: torch.randn(size) for name, size in sizes.items()}
    given |= {"conv1d_bias": None, "A": -torch.rand(2), "chunk_size": 4, "headdim": 4}
    return layer("mamba_split_conv1d_scan_combined")(**{**given, **more})


def step(**more):
    state, x = torch.randn(2, 4, 3), torch.randn(2, 4)
    B, C = torch.randn(2, 3), torch.randn(2, 3)
    given = {"state": state, "hidden_states": x, "dt": x, "A": -torch.rand(4, 3), "B": B, "C": C}
    return layer("selective_state_update")(**{**given, **more})


def mamba1(**more):
    B = torch.randn(2, 3, 6)
    given = {"hidden_states": X, "dt": X, "A": -torch.rand(4, 3), "B": B, "C": B}
    return layer("selective_scan_fn")(**{**given, **more})


def convolution(**more):
    return layer("causal_conv1d_fn")(**{"hidden_states": X, "weight": WEIGHT, **more})


IDS = torch.zeros(2, 6, dtype=torch.int32)
PACKED = torch.tensor([0, 4, 12])


@pytest.mark.parametrize("call", [scan, fused, step, mamba1, convolution])
def test_what_a_model_hands_to_its_attention_is_left_alone(call):
    given = dict.fromkeys(set(TransformersKwargs.__annotations__) - {"seq_idx"}, IDS)
    given |= {"cu_seq_lens_q": PACKED[:2], "seq_idx": None, "output_state": IDS, "max_seqlen": 6}
    call(**given, position_embeddings=(X, X))


def test_what_a_newer_function_takes_is_handed_on(monkeypatch):
    """Ask the function, as its names say nothing about what they are for."""
    layers = hub.kernel().layers
    serve = importlib.import_module(f"{hub.kernel().__name__}._causal_conv1d._serve")

    own = inspect.signature(hub.kernel().selective_scan_fn).parameters.values()
    more = inspect.Parameter("seqs_of_states", inspect.Parameter.KEYWORD_ONLY, default=None)

    def selective_scan_fn(*args, **kwargs):
        return kwargs["seqs_of_states"]

    selective_scan_fn.__signature__ = inspect.Signature([*own, more])
    monkeypatch.setattr(serve, "OPTIONS", set(serve.OPTIONS))
    monkeypatch.setattr(layers, "_scan", serve.by_device(selective_scan_fn, None))
    assert mamba1(seqs_of_states=3) == 3


@pytest.mark.parametrize(
    ("call", "more", "kind", "said"),
    [
        (convolution, {"initial_state": X}, TypeError, "found initial_state, which no fun"),
        (convolution, {"cache_seqlens": IDS}, TypeError, "cache_seqlens"),
        (convolution, {"cu_seq_lens_q": PACKED}, ValueError, "of 2 sequences and no seq_idx"),
        (convolution, {"activation": "gelu"}, ValueError, "'gelu'"),
        (convolution, {"bias": X}, ValueError, r"bias must be \(4,\)"),
        (convolution, {"initial_states": X}, ValueError, r"\(2, 4, 2\); found \(2, 4, 6\)"),
        (convolution, {"hidden_states": X.to("meta")}, NotImplementedError, "on 'meta'; needed"),
        (scan, {"final_states": X}, TypeError, "final_states"),
        (scan, {"cu_seqlens": PACKED}, NotImplementedError, "found cu_seqlens .* GPU only"),
        (scan, {"return_varlen_states": True}, NotImplementedError, "return_varlen_states"),
        (scan, {"initial_states": X}, ValueError, r"\(2, 2, 4, 3\); found \(2, 4, 6\)"),
        (scan, {"seq_idx": IDS[:, :5]}, ValueError, "seq_idx must be"),
        (scan, {"cu_seq_lens_q": PACKED}, ValueError, "no seq_idx"),
        (scan, {"state_dtype": BF16}, NotImplementedError, "found state_dtype torch.bfloat16 with"),
        (scan, {"state_dtype": F64}, NotImplementedError, "kept in torch.float32. Leave it"),
        (fused, {"state_dtype": torch.float16}, NotImplementedError, "torch.float16 .* on a CPU"),
        (fused, {"state_dtypes": F32}, TypeError, "found state_dtypes, which no function"),
        (step, {"state_dtype": F32}, TypeError, "found state_dtype, which the function for a CPU"),
        (mamba1, {"state_dtype": F32}, TypeError, "found state_dtype, which the function"),
        (mamba1, {"initial_state": X}, TypeError, "If initial_states is meant, write it so"),
        (step, {"seq_idx": IDS[:, :1]}, TypeError, "found seq_idx, which the function for a CPU"),
        (step, {"state_batch_indices": IDS[:, 0]}, NotImplementedError, "GPU only"),
        (step, {"D": X}, ValueError, "D must be"),
        (mamba1, {"seq_idx": IDS}, TypeError, "selective_scan_fn: found seq_idx, which"),
        (mamba1, {"A": torch.zeros(4, 3, dtype=torch.complex64)}, ValueError, "complex"),
        (mamba1, {"initial_states": X}, ValueError, "initial_states must be of shape"),
    ],
)
def test_what_a_layer_cannot_do(call, more, kind, said):
    call()
    with pytest.raises(kind, match=said):
        call(**more)


@pytest.mark.parametrize("call", [scan, fused])
@pytest.mark.parametrize(
    ("dtype", "asked"), [(F32, None), (F32, F32), (BF16, F32), (F64, F32), (F64, F64)], ids=str
)
def test_states_between_inner_chunks_as_a_cpu_keeps_them(call, dtype, asked):
    def results(**more):
        torch.manual_seed(0)
        name, shape = {scan: ("hidden_states", (2, 6, 2, 4)), fused: ("zxbcdt", (2, 6, 24))}[call]
        inputs = {name: torch.randn(shape).to(dtype)}
        return call(**inputs, return_final_states=True, **more)

    for found, wanted in zip(results(state_dtype=asked), results(), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("more", [{"seq_idx": IDS}, {"initial_states": X}])
def test_the_inner_function_of_mamba1_has_no_states(more):
    given = dict.fromkeys(
        ["xz", "conv1d_weight", "x_proj_weight", "delta_proj_weight", "out_proj_weight", "A"], X
    )
    with pytest.raises(TypeError, match=r"mamba_inner_fn: found \w+, which the function for a CPU"):
        layer("mamba_inner_fn")(**given, conv1d_bias=None, out_proj_bias=None, **more)


def test_states_that_the_update_does_not_have_on_a_cpu():
    update = hub.kernel("causal-conv1d").causal_conv1d_update
    state = torch.zeros(2, 4, 2)
    for name in ("cache_seqlens", "conv_state_indices"):
        with pytest.raises(NotImplementedError, match=f"found {name} with tensors on a CPU"):
            update(X, state, WEIGHT, **{name: IDS[:, 0]})
    with pytest.raises(ValueError, match="conv_state must be"):
        update(X, state[..., :1], WEIGHT)


class OnGpu:
    device, dtype = torch.device("cuda"), BF16


def test_a_build_for_cpus_does_not_serve_a_gpu():
    for name in ("mamba_split_conv1d_scan_combined", "selective_scan_fn", "causal_conv1d_fn"):
        with pytest.raises(NotImplementedError, match=f"{name}: found tensors on a GPU; this buil"):
            getattr(hub.kernel(), name)(OnGpu())
    with pytest.raises(AttributeError, match="Mamba2: found a torch for CPUs"):
        hub.kernel().Mamba2  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'Mamba3'"):
        hub.kernel().Mamba3  # noqa: B018


def test_a_build_for_a_gpu_serves_each_tensor_where_it_is():
    serve = importlib.import_module(f"{hub.kernel().__name__}._causal_conv1d._serve")
    on_gpu = SimpleNamespace(double=lambda x, times=2: ("gpu", times))

    def double(x, times=2):
        return "cpu", times

    function = serve.by_device(double, on_gpu)
    assert function(X, 3) == ("cpu", 3)
    assert function(OnGpu(), times=3) == function(times=3, x=OnGpu()) == ("gpu", 3)
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        function(times=3)
    with pytest.raises(TypeError, match="double: found time, which the function for a GPU does"):
        function(OnGpu(), time=3)


def for_a_gpu(name, *more):
    """Return a function with mamba-ssm 2.3.2's parameters and more; it returns its arguments."""
    own = inspect.signature(getattr(hub.kernel(), name)).parameters.values()
    last = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in more]
    signature = inspect.Signature([*(p for p in own if p.name != "state_dtype"), *last])

    def function(*args, **kwargs):
        return signature.bind(*args, **kwargs).arguments

    function.__signature__ = signature
    return function


@pytest.mark.parametrize(
    ("call", "name", "held", "inputs"),
    [
        (scan, "mamba_chunk_scan_combined", "_chunk_scan", "hidden_states"),
        (fused, "mamba_split_conv1d_scan_combined", "_split", "zxbcdt"),
    ],
)
def test_a_gpu_takes_a_dtype_of_states_if_its_function_does(call, name, held, inputs, monkeypatch):
    layers, package = hub.kernel().layers, hub.kernel().__name__
    serve = importlib.import_module(f"{package}._causal_conv1d._serve")
    on_cpu = getattr(importlib.import_module(f"{package}.on_cpu"), name)

    def serving(*more):
        on_gpu = SimpleNamespace(**{name: for_a_gpu(name, *more)})
        monkeypatch.setattr(layers, held, serve.by_device(on_cpu, on_gpu))
        return lambda **given: call(**{inputs: OnGpu()}, **given)

    run = serving("state_dtype")
    assert run(state_dtype=BF16)["state_dtype"] is BF16
    assert "state_dtype" not in run()
    run = serving()
    assert run(state_dtype=None).keys() == run().keys()
    with pytest.raises(TypeError, match=f"{name}: found state_dtype, which the function for a GPU"):
        run(state_dtype=F32)


# This runs as if torch were one for CUDA without a GPU: everything for CUDA is imported.
ON_CUDA = f"""
import pathlib, torch, kernels
from kernels.importer import _import_from_path
torch.version.cuda = "13.0"
for name in ("causal-conv1d", "mamba-ssm"):
    path = pathlib.Path({str(hub.HUB)!r}, name, "tree", "build", "torch-cpu")
    kernel = _import_from_path(path, dict())
    missing = [f for f in kernel.layers.__all__ if not hasattr(kernel.on_gpu, f)]
    print(name, sorted(missing))
    x, weight = torch.randn(2, 4, 6), torch.randn(4, 3)
    print(tuple(kernel.causal_conv1d_fn(x, weight).shape))


class OnGpu:
    device, dtype = torch.device("cuda"), torch.float32


try:
    layer = kernel.layers.mamba_chunk_scan_combined()
    layer(OnGpu(), None, None, None, None, 64, state_dtype=torch.float32)
except TypeError as error:
    print(error)
"""


def test_where_torch_has_cuda_the_functions_for_a_gpu_are_there():
    done = subprocess.run([sys.executable, "-c", ON_CUDA], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    conv = ["causal_conv1d_fn", "causal_conv1d_update"]  # They are in _causal_conv1d.
    assert done.stdout.splitlines() == [
        "causal-conv1d []",
        "(2, 4, 6)",
        f"mamba-ssm {conv}",
        "(2, 4, 6)",
        # This holds until mamba-ssm has a release whose functions take it.
        "mamba_chunk_scan_combined: found state_dtype, which the function for a GPU does not take. "
        "Leave it out, or take a newer version of this kernel, whose function does.",
    ]


SCANS = f"""
import logging, pathlib, torch, kernels
logging.basicConfig(format="%(levelname)s %(message)s")
kernel = kernels.get_local_kernel(pathlib.Path({str(hub.tree("mamba-ssm"))!r}))
x = torch.randn(2, 4, 6)
for _ in range(2):
    kernel.selective_scan_fn(x, x, -torch.rand(4, 3), x[:, :3], x[:, :3])
print(kernel.describe())
"""


@pytest.mark.parametrize("compiler", [None, "/bin/false"])
def test_without_native_kernels_it_says_once_that_plain_torch_runs(compiler, monkeypatch):
    monkeypatch.delenv("COMPAT_NATIVE", raising=False)
    if compiler:
        monkeypatch.setenv("CXX", compiler)
    done = subprocess.run([sys.executable, "-c", SCANS], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    if compiler:
        assert done.stdout.startswith("plain torch, as the native kernels are not available: /bin")
        assert done.stderr.count("WARNING mamba-ssm on a CPU runs in plain torch") == 1
    else:
        assert done.stdout.startswith("native kernels, built by")
        assert "WARNING" not in done.stderr


def test_nothing_is_logged_by_default(caplog):
    with caplog.at_level(logging.WARNING):
        mamba1()
    assert not caplog.records
