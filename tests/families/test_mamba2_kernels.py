"""The fused path of Mamba2 on a GPU: its parts, when it is taken, and that its wiring is exact.

Stand-ins in plain torch replace the packages, which need a GPU; tests/kernels/test_fused_model.py
runs the kernels themselves. tests/families/test_mamba2.py is about the path on a CPU.
"""

import functools
import importlib
import sys
import threading
from contextlib import contextmanager, nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.families import tiny_model, tokens
from support.fused_packages import TRITON, in_place, state_after
from support.tolerances import CHUNKED, HIDDEN, NO_WORSE_FACTOR, NO_WORSE_SLACK, error
from torch import nn
from torch.nn.functional import silu
from transformers.models.mamba2 import modeling_mamba2

import compat
from ci.kernels.interpreter import conv_stand_in
from compat import ops
from compat.families import mamba2, mamba2_kernels
from compat.families.in_chunk import in_chunk, is_in_chunk
from compat.families.lookup import FAMILIES

cached_model = functools.cache(tiny_model)
ALL = sorted(mamba2.MIXERS)
for model_type in ALL:
    # At its import a model takes the packages that are there, so this precedes the stand-ins.
    importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")


@pytest.fixture(autouse=True)
def _own_path_on_a_cpu():
    with ops.using("released"):
        yield


# Packages.


def scan(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None,
         dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False):  # fmt: skip
    """Compute `mamba_chunk_scan_combined` of mamba-ssm in plain torch."""
    y, final = modeling_mamba2.mamba2_chunk_scan(
        x, dt, A, B, C, chunk_size, D=D, dt_bias=dt_bias, initial_states=initial_states,
        dt_softplus=dt_softplus, dt_limit=dt_limit, return_final_states=True,
    )  # fmt: skip
    assert z is None
    assert return_final_states
    return y.to(x.dtype), final


def rmsnorm(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    """Compute `rmsnorm_fn` of mamba-ssm in plain torch, rounded once, at the end."""
    assert bias is None
    assert not norm_before_gate
    gated = (x.float() * silu(z.float())).unflatten(-1, (-1, group_size))
    normed = gated * (gated.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    return (normed.flatten(-2) * weight.float()).to(x.dtype)


def split(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, initial_states=None,
          dt_limit=(0.0, float("inf")), return_final_states=False, activation="silu",
          rmsnorm_weight=None, rmsnorm_eps=1e-6, headdim=None, ngroups=1, norm_before_gate=True,
          initial_conv_states=None):  # fmt: skip
    """Compute `mamba_split_conv1d_scan_combined` with a conv state, in plain torch."""
    heads, conv_dim = len(D), len(conv1d_weight)
    inner = heads * headdim
    z, xbc, dt = zxbcdt.split([inner, conv_dim, heads], -1)
    conv = conv_stand_in().causal_conv1d_fn
    xbc = conv(
        xbc.transpose(1, 2), conv1d_weight, conv1d_bias, initial_states=initial_conv_states,
        activation=activation,
    ).transpose(1, 2)  # fmt: skip
    x, B, C = (part.unflatten(-1, (n, -1)) for part, n in zip(
        xbc.split([inner, (conv_dim - inner) // 2, (conv_dim - inner) // 2], -1),
        [heads, ngroups, ngroups], strict=True,
    ))  # fmt: skip
    y, final = scan(
        x, dt, A, B, C, chunk_size, D=D, dt_bias=dt_bias, initial_states=initial_states,
        dt_softplus=True, dt_limit=dt_limit, return_final_states=return_final_states,
    )  # fmt: skip
    y = rmsnorm(
        y.flatten(2), rmsnorm_weight, None, z, rmsnorm_eps, inner // ngroups, norm_before_gate
    )
    return y, final


def released_split(zxbcdt, initial_states=None, return_final_states=False):
    raise NotImplementedError("It has no conv state.")


CONV = {"causal_conv1d_fn": conv_stand_in().causal_conv1d_fn}
SSD = {"mamba_chunk_scan_combined": scan, "mamba_split_conv1d_scan_combined": released_split}
NORM = {"rmsnorm_fn": rmsnorm}
PATCHED_SSD = SSD | {"mamba_split_conv1d_scan_combined": split}
KINDS = {"composed": SSD, "whole": PATCHED_SSD}
VERSIONS = {"causal-conv1d": "1.7.0", "mamba-ssm": "2.3.2", "transformers": "5.23.0"}


def module_of(name, functions):
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(functions)
    return module


@contextmanager
def packages(ssd=SSD, conv=CONV, norm=NORM, on_gpu=True):
    """Put packages with these functions in place (None: absent); yield the calls of the path."""
    given = {
        "mamba_ssm": ssd,
        f"{TRITON}.ssd_combined": ssd,
        f"{TRITON}.layernorm_gated": norm,
        "causal_conv1d": conv,
    }
    modules = {
        name: None if functions is None else module_of(name, functions)
        for name, functions in given.items()
        if functions is not None or "." not in name
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamba2_kernels, "version", VERSIONS.__getitem__)
        with in_place(modules, on_gpu) as calls:
            yield calls


def report():
    """Return the line of the status about the fused path."""
    head = "fused path of Mamba2 on a GPU: "
    (line,) = (line for line in str(compat.status()).splitlines() if line.startswith(head))
    assert line == f"{head}{compat.status().fused}"
    return line.removeprefix(head)


# The report.


def test_released_packages_are_composed():
    with packages():
        assert report() == (
            "composed of causal-conv1d 1.7.0 and mamba-ssm 2.3.2; "
            "for bamba, granitemoehybrid, mamba2, nemotron_h, zamba2"
        )


def test_an_op_that_takes_a_conv_state_is_used_whole():
    with packages(PATCHED_SSD):
        assert report().startswith(
            "mamba_split_conv1d_scan_combined of mamba-ssm 2.3.2, with causal-conv1d 1.7.0; for "
        )


def _old_conv(x, weight, bias=None, seq_idx=None, activation=None):
    raise NotImplementedError


def _old_scan(x, dt, A, B, C, chunk_size, initial_states=None, dt_bias=None, dt_softplus=False):
    raise NotImplementedError


LACKS = {
    "mamba-ssm is not installed": {"ssd": None},
    "causal-conv1d is not installed": {"conv": None},
    "causal-conv1d 1.7.0 has no causal_conv1d_fn": {"conv": {}},
    "causal-conv1d 1.7.0 has a causal_conv1d_fn that takes no initial_states": {
        "conv": {"causal_conv1d_fn": _old_conv}
    },
    "mamba-ssm 2.3.2 has no mamba_chunk_scan_combined": {"ssd": {}},
    "mamba-ssm 2.3.2 has a mamba_chunk_scan_combined that takes no return_final_states, dt_limit": {
        "ssd": {"mamba_chunk_scan_combined": _old_scan}
    },
    "mamba-ssm 2.3.2 has no rmsnorm_fn": {"norm": {}},
}


@pytest.mark.parametrize("reason", LACKS)
def test_what_the_packages_lack_is_said_and_transformers_own_path_runs(reason):
    own = in_chunks("mamba2")
    with packages(**LACKS[reason]) as calls:
        assert report() == f"not used, as {reason}"
        assert torch.equal(in_chunks("mamba2"), own)
    assert not calls


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("raise OSError('undefined symbol: _ZN3c10\\nand more')", "OSError: undefined symbol: _Z"),
        ("import selective_scan_cuda", "No module named 'selective_scan_cuda'"),
        ("raise RuntimeError('no driver')", "RuntimeError: no driver"),
    ],
)
@pytest.mark.parametrize("package", ["causal_conv1d", "mamba_ssm"])
def test_a_package_that_cannot_be_imported_is_a_reason_and_no_error(
    monkeypatch, tmp_path, package, statement, said
):
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(statement)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(mamba2_kernels, "version", VERSIONS.__getitem__)
    monkeypatch.setitem(sys.modules, "causal_conv1d", module_of("causal_conv1d", CONV))
    monkeypatch.delitem(sys.modules, package, raising=False)
    found = mamba2_kernels.probe.__wrapped__()
    distribution = package.replace("_", "-")
    assert found.run is None
    assert found.reason.startswith(
        f"not used, as {distribution} {VERSIONS[distribution]} cannot be"
    )
    assert said in found.reason
    assert "\n" not in found.reason


@pytest.mark.parametrize("model_type", ALL)
def test_the_installed_transformers_has_the_mixers_that_are_known(model_type):
    """Fail with the case and the figures in which they differ."""
    assert mamba2.on_cpu(model_type) == ""


def test_a_mixer_that_computes_something_else_is_left_alone(monkeypatch):
    mixer = modeling_mamba2.Mamba2Mixer
    forward = mixer.forward

    @functools.wraps(forward)
    def doubled(self, *args, **kwargs):
        return 2 * forward(self, *args, **kwargs)

    monkeypatch.setattr(mixer, "forward", doubled)
    own = in_chunks("mamba2")
    with packages() as calls:
        assert report().endswith("; for bamba, granitemoehybrid, nemotron_h, zamba2")
        assert torch.equal(in_chunks("mamba2"), own)
    assert not calls


# The calls that take it.


def in_chunks(model, ids=None, size=10, mask=None):
    model = cached_model(model) if isinstance(model, str) else model
    ids = tokens(2, 21) if ids is None else ids
    chunks = compat.iter_chunks(model, input_ids=ids, attention_mask=mask, vertical_chunk_size=size)
    return torch.cat([hidden for _, hidden in chunks], 1)


def test_the_kernels_are_not_given_a_model_on_a_cpu():
    own = in_chunks("mamba2")
    with packages(on_gpu=False) as calls:
        assert torch.equal(in_chunks("mamba2"), own)
    assert not calls


def test_every_chunk_of_every_layer_takes_it():
    with packages() as calls:
        in_chunks("mamba2")
    assert [len(call[1][0]) for call in calls] == [10, 10, 11, 11]
    assert [call[2] is None for call in calls] == [True, True, False, False]


def with_norm(norm):
    def change(model):
        mixer = model.layers[0].mixer
        mixer.norm = norm(mixer.norm.weight.shape[0], mixer.norm.group_size)

    return change


class OtherNorm(modeling_mamba2.MambaRMSNormGated):
    def forward(self, hidden_states, gate=None):
        return super().forward(hidden_states, gate) + 1


def hooked(name):
    def change(model):
        module = model.layers[0].mixer.get_submodule(name)
        module.register_forward_hook(lambda module, args, output: output + 1)

    return change


def moved(name):
    """Do as accelerate: the weights come when the module's own forward is called."""

    def change(model):
        module = model.layers[0].mixer.get_submodule(name)
        module.forward = module.forward

    return change


def kernelized(model):
    """Do as the kernels package."""
    function = nn.Module()
    function.forward = lambda: None
    vars(model.layers[0].mixer)["_kernel_funcs"] = {"causal_conv1d_fn": function}


# Models whose first layer (or every layer) the kernels do not serve exactly.
ELSE = {
    "another activation": ({"hidden_act": "gelu"}, None),
    "too wide a convolution": ({"conv_kernel": 5}, None),
    "convolved channels no multiple of 8": ({"state_size": 3}, None),
    "gate channels no multiple of 8": ({"hidden_size": 30, "head_dim": 15, "state_size": 3}, None),
    "float64": ({"dtype": torch.float64}, None),
    "another norm": ({}, with_norm(OtherNorm)),
    "groups of another size": ({}, lambda m: setattr(m.layers[0].mixer.norm, "group_size", 16)),
    "a hook on the norm": ({}, hooked("norm")),
    "norm weights elsewhere": ({}, moved("norm")),
    "conv weights elsewhere": ({}, moved("conv1d")),
    "kernels of the hub": ({}, kernelized),
}


@pytest.mark.parametrize("case", ELSE)
def test_what_the_kernels_cannot_do_exactly_takes_transformers_own_path(case):
    overrides, change = ELSE[case]
    model = tiny_model("mamba2", **overrides)
    if change:
        change(model)
    own = in_chunks(model)
    with packages() as calls:
        found = in_chunks(model)
    if change:
        # The second layer is as it was.
        assert {call[0] for call in calls} == {model.layers[1].mixer}
        assert error(found, own) <= CHUNKED[torch.float32]
    else:
        assert not calls
        assert torch.equal(found, own)


def test_a_group_of_channels_that_is_too_large_for_the_norm_takes_transformers_own_path(
    monkeypatch,
):
    # The limit holds 32 channels of 4 bytes.
    with packages() as calls:
        monkeypatch.setattr(mamba2, "_NORM_BYTES", 128)
        in_chunks("mamba2")
        assert calls
        calls.clear()
        monkeypatch.setattr(mamba2, "_NORM_BYTES", 127)
        in_chunks("mamba2")
        assert not calls


def test_a_text_of_one_token_takes_transformers_own_path():
    own = in_chunks("mamba2", tokens(2, 1))
    with packages() as calls:
        assert torch.equal(in_chunks("mamba2", tokens(2, 1)), own)
    assert not calls


def test_layers_on_a_cpu_take_transformers_own_path_in_a_model_that_begins_on_a_gpu(monkeypatch):
    own = in_chunks("mamba2")
    with packages() as calls:
        monkeypatch.setattr(mamba2, "_has_kernels", lambda tensor: tensor.dtype == torch.int64)
        assert torch.equal(in_chunks("mamba2"), own)
    assert not calls


def test_under_autocast_it_is_not_taken():
    def under_autocast():
        with torch.autocast("cpu", torch.bfloat16):
            return in_chunks("mamba2")

    own = under_autocast()
    with packages() as calls:
        assert torch.equal(under_autocast(), own)
    assert not calls


def test_with_gradients_it_is_not_taken():
    model, ids = tiny_model("mamba2").train(), tokens(2, 9)
    with packages() as calls:
        hidden, _ = FAMILIES["mamba2"].forward(model, ids, 0, None)
        hidden.sum().backward()
        assert not calls
        assert model.embeddings.weight.grad is not None
        with torch.no_grad():
            FAMILIES["mamba2"].forward(model, ids, 0, None)
        assert len(calls) == 2


@torch.no_grad()
def test_a_mask_takes_transformers_own_path():
    model, ids = cached_model("mamba2"), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    own = model(ids, attention_mask=mask, use_cache=True).last_hidden_state
    with packages() as calls, taken():
        found = model(ids, attention_mask=mask, use_cache=True).last_hidden_state
        assert not calls
        model(ids, use_cache=True)
        assert len(calls) == 2
    assert torch.equal(found, own)


@torch.no_grad()
def test_without_a_cache_transformers_own_path_is_taken():
    with packages() as calls, taken():
        cached_model("mamba2")(tokens(2, 9), use_cache=False)
    assert not calls


@contextmanager
def taken():
    """Hold the patches as while a chunk is run."""
    with mamba2.PATCHED["mamba2"], in_chunk():
        yield


def test_calls_of_the_model_by_others_are_left_alone_while_a_chunk_goes_through():
    model, ids = cached_model("mamba2"), tokens(2, 9)
    found = []

    @torch.no_grad()
    def somebody_else():
        found.append(model(ids, use_cache=True).last_hidden_state)

    somebody_else()
    released = modeling_mamba2.Mamba2Mixer.forward
    with packages() as calls, taken():
        assert modeling_mamba2.Mamba2Mixer.forward is not released
        thread = threading.Thread(target=somebody_else)
        thread.start()
        thread.join()
    assert not calls
    assert torch.equal(*found)


@pytest.mark.parametrize("ending", ["read to the end", "left half way", "the kernel raises"])
def test_nothing_is_left_behind(ending):
    mixer = modeling_mamba2.Mamba2Mixer
    before = mixer.forward
    ssd = SSD if ending != "the kernel raises" else SSD | {"mamba_chunk_scan_combined": _fail}
    raises = nullcontext() if ssd is SSD else pytest.raises(ZeroDivisionError)
    with packages(ssd) as calls, raises:
        for _ in compat.iter_chunks(
            cached_model("mamba2"), input_ids=tokens(2, 21), vertical_chunk_size=10
        ):
            assert mixer.forward is before
            assert not is_in_chunk()
            if ending == "left half way":
                break
    assert calls
    assert mixer.forward is before
    assert not is_in_chunk()


def _fail(x, dt, A, B, C, chunk_size, D, initial_states, return_final_states, dt_bias, dt_softplus,
          dt_limit):  # fmt: skip
    raise ZeroDivisionError


# Its results are exact.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ALL)
@settings(max_examples=8)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3), size=st.integers(1, 35))
def test_it_gives_what_transformers_gives(model_type, kind, lengths, size):
    ids = tokens(len(lengths), max(lengths))
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    own = in_chunks(model_type, ids, size, mask)
    with packages(KINDS[kind]) as calls:
        found = in_chunks(model_type, ids, size, mask)
    assert error(found, own) <= CHUNKED[torch.float32]
    assert bool(calls) == (max(lengths) > 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.01, 0.4)], ids=["open", "clamped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_float64_recurrence(kind, limit, dtype):
    # With an odd number of heads the convolution's inputs are not aligned.
    odd = {"num_heads": 3, "hidden_size": 24, "n_groups": 1}
    shape = odd if limit[0] else {}
    model = cached_model("mamba2", dtype=dtype, time_step_limit=limit, use_bias=True, **shape)
    ids = tokens(1, 40)
    exact, _ = oracle.mamba2(model, ids[0].tolist())
    own = error(in_chunks(model, ids, 9)[0], exact)
    with packages(KINDS[kind]) as calls:
        found = error(in_chunks(model, ids, 9)[0], exact)
    assert calls
    assert found <= HIDDEN[dtype]
    assert found <= NO_WORSE_FACTOR * own + NO_WORSE_SLACK[dtype]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[9], [2, 2, 3], [12, 2], [2, 12]], ids=str)
@pytest.mark.parametrize("width", [2, 3, 4])
def test_the_states_in_the_cache_are_those_of_transformers(kind, sizes, width):
    """Include a chunk that is shorter than the convolution is wide."""
    model = cached_model("mamba2", conv_kernel=width)
    ids = tokens(2, sum(sizes))
    own = state_after(model, ids, sizes)
    with packages(KINDS[kind]) as calls:
        found = state_after(model, ids, sizes)
    assert len(calls) == 2 * len(sizes)
    for layer, wanted in zip(found.layers, own.layers, strict=True):
        ssm, wanted_ssm = layer.recurrent_states[0], wanted.recurrent_states[0]
        assert ssm.dtype == torch.float32
        assert ssm.shape == wanted_ssm.shape
        assert error(ssm, wanted_ssm) <= HIDDEN[torch.float32]
        assert layer.conv_states[0].shape == (2, 96, width)
        assert error(layer.conv_states[0], wanted.conv_states[0]) <= HIDDEN[torch.float32]


def test_a_cache_goes_from_one_path_to_the_other_in_the_middle_of_a_text():
    model, ids = cached_model("mamba2"), tokens(2, 30)
    own = in_chunks(model, ids)
    for fused_first in (True, False):
        state, pieces = None, []
        for index, start in enumerate(range(0, 30, 10)):
            path = packages() if (index == 1) != fused_first else nullcontext()
            with path, torch.no_grad():
                part = ids[:, start : start + 10]
                hidden, state = FAMILIES["mamba2"].forward(model, part, start, state)
            pieces.append(hidden)
        assert error(torch.cat(pieces, 1), own) <= CHUNKED[torch.float32]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["in_proj", "out_proj"])
def test_a_projection_that_is_wrapped_is_called(kind, name):
    """Wrap as an adapter does."""
    model = tiny_model("mamba2")
    hooked(name)(model)
    own = in_chunks(model)
    with packages(KINDS[kind]) as calls:
        found = in_chunks(model)
    assert len(calls) == 4
    assert error(found, own) <= CHUNKED[torch.float32]
    assert error(found, in_chunks("mamba2")) > 0.1


@pytest.mark.parametrize("heads", [8, 4])
def test_the_convolution_gets_its_arguments_as_the_kernel_takes_them(heads):
    """Give channels side by side, in steps of 8, or the kernel refuses; copy only if they are not.

    With 4 heads the projection has 164 channels, with 8 heads 168.
    """
    seen = []

    def conv(x, weight, bias=None, initial_states=None, activation=None):
        seen.append((x, initial_states))
        return CONV["causal_conv1d_fn"](
            x, weight, bias, initial_states=initial_states, activation=activation
        )

    model = cached_model("mamba2", num_heads=heads, head_dim=64 // heads)
    with packages(conv={"causal_conv1d_fn": conv}) as calls:
        in_chunks(model)
    assert len(seen) == len(calls) == 4
    for (x, states), (_, projected, *_) in zip(seen, calls, strict=True):
        assert x.shape[:2] == (2, 96)
        assert (x.stride(1), x.stride(0) % 8, x.stride(2) % 8) == (1, 0, 0)
        assert x.storage_offset() % 8 == 0
        assert states is None or (states.shape, states.stride(1)) == ((2, 96, 3), 1)
        shared = x.untyped_storage().data_ptr() == projected.untyped_storage().data_ptr()
        assert shared == (heads == 8)
