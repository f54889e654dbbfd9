"""The contract between compat and released code: names under decorators, and its results."""

import functools
import logging
import threading
from types import ModuleType

import pytest
import torch
from support.families import FAMILIES, tiny_model, tokens
from support.tolerances import CHUNKED
from transformers.models.mamba2 import modeling_mamba2
from transformers.utils.deprecation import deprecate_kwarg

import compat
from compat.families import delta, exact, mamba1, mamba2_probe, rwkv4, tiny_models
from compat.families import mamba2 as _fused
from compat.families.lookup import backbone_of
from compat.hooks import report as _report
from compat.installed.behaviour import Differs, compare, in_torch, shielded, verdict
from compat.installed.patches import MixerCall, arguments
from compat.installed.recurrent_cache import forward_of, parameters, state_argument, state_of

# Names.


def opaque(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params", "state"])
def test_the_states_name_is_read_under_all_decorators(name):
    namespace = {}
    exec(f"def forward(self, input_ids, {name}=None, **kwargs): ...", namespace)
    forward = opaque(deprecate_kwarg("memory", "9.0", new_name=name)(namespace["forward"]))
    assert parameters(forward) == ("self", "input_ids", name)
    assert state_argument(forward) == name


def test_a_state_of_an_unknown_name_is_refused_and_not_given_to_kwargs():
    def forward(self, input_ids, memory=None, **kwargs):
        raise NotImplementedError

    with pytest.raises(compat.UnsupportedVersionError, match="input_ids, memory, and no state"):
        state_argument(opaque(forward))


def test_a_state_that_is_not_given_out_is_refused():
    assert state_of({"last_hidden_state": 1, "cache": 2}) == 2
    with pytest.raises(compat.UnsupportedVersionError, match="has last_hidden_state, memory"):
        state_of({"last_hidden_state": 1, "memory": 2})


def test_a_forward_of_an_instance_is_asked_unless_it_says_nothing():
    model = tiny_model("mamba2")
    released = model.forward
    model.forward = lambda **kwargs: released(**kwargs)
    assert state_argument(forward_of(model)) == state_argument(released)
    model.forward = lambda input_ids, memory=None, **kwargs: released(input_ids)
    with pytest.raises(compat.UnsupportedVersionError, match="memory"):
        compat.last_hidden_state(model, input_ids=tokens(1, 9), vertical_chunk_size=4)


def test_arguments_are_read_by_name_however_they_are_given():
    def function(a, b, /, c, *, d=None, **others):
        raise NotImplementedError

    assert arguments(function, (1, None, 3), {"d": 4, "e": 5}) == {"a": 1, "c": 3, "d": 4, "e": 5}
    assert arguments(lambda a: a, (1, 2, None), {}) == {"a": 1, "argument 1": 2}


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        (("x", "s", "m"), {}),
        (("x",), {"cache": "s", "attention_mask": "m"}),
        ((), {"hidden_states": "x", "cache_params": "s", "attention_mask": "m"}),
    ],
)
def test_a_mixers_call_is_read_under_any_name_of_the_state(args, kwargs):
    @deprecate_kwarg("cache_params", "9.0", new_name="cache")
    def forward(self, hidden_states, cache=None, attention_mask=None, **others):
        raise NotImplementedError

    assert MixerCall.read(forward, "self", args, kwargs) == ("x", "s", {"attention_mask": "m"})
    assert MixerCall.read(lambda *args, **kwargs: None, "self", args, kwargs).inputs is None


# Behaviour.


def test_figures_that_differ_are_named():
    with pytest.raises(Differs, match="a case: it gives 2 where ours gives 3"):
        compare("a case", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]))
    with pytest.raises(Differs, match="nan"):
        compare("a case", torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 3.0]))
    compare("a case", torch.tensor([1.0]), torch.tensor([1.0 + 1e-6]))


def test_what_calls_kernels_for_a_gpu_is_asked_in_torch():
    """Do as transformers, which puts mamba-ssm's function before its own in torch."""
    module = ModuleType("released")
    source = """
import functools
def in_torch(x, factor=2): return x * factor
@functools.wraps(in_torch)
def scan(*args, **kwargs): raise RuntimeError("a kernel for a GPU")
def forward(x): return scan(x) + 1
def decorated(function):
    @functools.wraps(function)
    def wrapper(*args): return -function(*args)
    return wrapper
forward = decorated(forward)
"""
    exec(source, vars(module))
    assert in_torch(module.forward)(3) == -7
    seen = []
    assert verdict(lambda run: seen.append(run(3)), module.forward) == ""
    assert seen == [-7]
    with pytest.raises(RuntimeError, match="a kernel for a GPU"):
        module.forward(3)


def test_a_kernel_that_a_decorator_has_chosen_gives_way_to_the_function_in_torch():
    """Do as transformers, which calls flash-linear-attention where it is installed."""
    package, module = ModuleType("kernels_of_a_gpu"), ModuleType("released")
    exec("def kernel(q): raise RuntimeError('0 active drivers')", vars(package))
    source = """
import functools
def with_kernel(function):
    @functools.wraps(function)
    def wrapped(x): return 1 + implementation(x)
    implementation = kernel
    return wrapped
@with_kernel
def rule(x): return 2 * x
"""
    module.kernel = package.kernel
    exec(source, vars(module))
    seen = []
    assert verdict(lambda run: seen.append(run(3)), module.rule) == ""
    assert seen == [7]


PROBES = {
    "mamba2": lambda: (
        mamba2_probe.of_mixer.__wrapped__(
            "mamba2",
            modeling_mamba2.Mamba2Mixer,
            modeling_mamba2.Mamba2Mixer.forward,
            _fused._on_torch,
        ).reason
    ),
    "mamba": lambda: mamba1.differs.__wrapped__(
        __import__("transformers").models.mamba.modeling_mamba.mamba_selective_scan
    ),
    "rwkv": lambda: rwkv4.differs.__wrapped__(
        __import__("transformers").models.rwkv.modeling_rwkv.rwkv_linear_attention
    ),
    "a gated delta rule": lambda: delta.differs.__wrapped__(
        __import__(
            "transformers"
        ).models.kimi_linear.modeling_kimi_linear.chunk_kimi_delta_attention,
        True,
    ),
    "its convolution": lambda: delta.convolution_differs.__wrapped__(
        __import__("transformers").models.kimi_linear.modeling_kimi_linear.causal_conv1d_fn
    ),
    "a family": lambda: exact._why_not(
        tiny_models.build(tiny_models.config("zamba2")), backbone_of(tiny_model("zamba2"))[1]
    ),
}


def test_what_is_said_once_is_not_said_of_tiny_models_and_still_of_others(caplog):
    logger, said = logging.getLogger("a.test"), logging.Logger.warning_once
    with shielded(), shielded():
        logger.warning_once("it is slow")
    assert logging.Logger.warning_once is said
    assert not caplog.messages
    logger.warning_once("it is slow")
    assert caplog.messages == ["it is slow"]


def modes():
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_num_threads(),
        torch.get_rng_state().tolist(),
        threading.active_count(),
    )


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("mode", ["plain", "inference", "autocast", "no_grad", "meta"])
def test_a_probe_says_the_same_in_any_mode_and_leaves_no_trace(probe, mode):
    contexts = {
        "plain": torch.enable_grad,
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "no_grad": torch.no_grad,
        "meta": lambda: torch.device("meta"),
    }
    with contexts[mode]():
        before = modes()
        assert PROBES[probe]() == ""
        assert modes() == before


@pytest.mark.parametrize("model_type", FAMILIES)
def test_building_a_tiny_model_draws_from_a_generator_of_its_own(model_type):
    before = torch.get_rng_state()
    weights = [tiny_models.build(tiny_models.config(model_type)).state_dict() for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))


# Consequences of the findings.


@pytest.fixture
def asked_anew(monkeypatch):
    """Check each mixer, scan and class of models anew in this test."""
    monkeypatch.setattr(exact.verdicts, "classes", {})
    mamba2_probe.of_mixer.cache_clear()
    yield
    mamba2_probe.of_mixer.cache_clear()


def chunked(model, ids, size=7):
    chunks = compat.iter_chunks(model, input_ids=ids, vertical_chunk_size=size)
    return torch.cat([hidden for _, hidden in chunks], 1)


def without_dt_limit(forward):
    def wrapper(self, *args, **kwargs):
        limit, self.time_step_limit = self.time_step_limit, (0.0, float("inf"))
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.time_step_limit = limit

    return functools.wraps(forward)(wrapper)


@pytest.mark.usefixtures("asked_anew")
def test_where_the_mixer_is_another_its_scan_alone_is_replaced(monkeypatch):
    model, ids = tiny_model("mamba2"), tokens(2, 21)
    mixer = modeling_mamba2.Mamba2Mixer
    with torch.no_grad():
        wanted = model(ids, use_cache=False).last_hidden_state
    monkeypatch.setattr(mixer, "forward", without_dt_limit(mixer.forward))
    calls = []

    def spied(*args, **kwargs):
        calls.append(args)
        return mamba_chunk_scan_combined(*args, **kwargs)

    mamba_chunk_scan_combined = _fused.mamba_chunk_scan_combined
    monkeypatch.setattr(_fused, "mamba_chunk_scan_combined", spied)
    assert (chunked(model, ids) - wanted).abs().max() <= CHUNKED[torch.float32]
    assert calls
    why = compat.status().paths["mamba2"]
    assert why.startswith("only its scan, as its mixer differs; left padding: it gives ")
    assert f"\n    mamba2: {why}" in str(compat.status())


def scan_from_zeros(*args, initial_states=None, **kwargs):
    return SCAN(*args, **kwargs)


SCAN = modeling_mamba2.mamba2_chunk_scan


@pytest.mark.usefixtures("asked_anew")
def test_a_family_that_does_not_continue_is_refused_alone(monkeypatch):
    """Let Bamba's scan begin from zeros: neither it nor its mixer may be taken for ours."""
    from transformers.models.bamba import modeling_bamba

    monkeypatch.setattr(modeling_bamba, "mamba2_chunk_scan", functools.wraps(SCAN)(scan_from_zeros))
    bamba, mamba2, ids = tiny_model("bamba"), tiny_model("mamba2"), tokens(2, 21)
    for _ in range(2):
        with pytest.raises(
            compat.UnsupportedModelError, match=r"BambaModel .* is off by .* in chunks"
        ):
            chunked(bamba, ids)
    chunked(mamba2, ids)
    with torch.no_grad():
        wanted = bamba(ids).last_hidden_state
        with compat.vertical_chunking() as report:
            assert torch.equal(bamba(ids).last_hidden_state, wanted)
            assert report.paths["bamba"].startswith("not used, as its mixer differs; ")
            assert report.paths["mamba2"] == ""


@pytest.mark.usefixtures("asked_anew")
def test_a_family_that_cannot_be_hooked_is_left_out_and_no_other(monkeypatch):
    from transformers.models.mamba import modeling_mamba

    monkeypatch.delattr(modeling_mamba, "mamba_selective_scan")
    model, ids = tiny_model("mamba"), tokens(2, 21)
    with compat.vertical_chunking() as report:
        assert "without a mamba_selective_scan" in report.paths["mamba"]
        assert report.paths["falcon_mamba"] == ""
        with pytest.raises(compat.UnsupportedVersionError, match="mamba_selective_scan"):
            chunked(model, ids)
        chunked(tiny_model("falcon_mamba"), ids)


@pytest.mark.usefixtures("asked_anew")
def test_a_scan_that_is_not_linear_in_its_state_is_not_continued(monkeypatch):
    from transformers.models.mamba import modeling_mamba

    scan = modeling_mamba.mamba_selective_scan

    @functools.wraps(scan)
    def squared(*args, **kwargs):
        found = scan(*args, **kwargs)
        return (found[0] ** 2, found[1]) if isinstance(found, tuple) else found**2

    monkeypatch.setattr(modeling_mamba, "mamba_selective_scan", squared)
    model, ids = tiny_model("mamba"), tokens(2, 21)
    with pytest.raises(compat.UnsupportedVersionError, match="cannot begin from a state"):
        chunked(model, ids)
    with torch.no_grad():
        wanted = model(ids, use_cache=False).last_hidden_state
        with compat.vertical_chunking():
            assert torch.equal(model(ids, use_cache=False).last_hidden_state, wanted)


@pytest.fixture
def another_rule(monkeypatch):
    """Let Qwen3-Next's released rule, or the convolution before it, compute something else."""
    from transformers.models.qwen3_next import modeling_qwen3_next

    def replace(name, change):
        function = getattr(modeling_qwen3_next, name)

        @functools.wraps(function)
        def other(*args, **kwargs):
            return change(function(*args, **kwargs))

        monkeypatch.setattr(modeling_qwen3_next, name, other)

    return replace


@torch.no_grad()
def test_a_delta_rule_that_is_another_is_left_alone(another_rule):
    another_rule("torch_chunk_gated_delta_rule", lambda found: (found[0] * 2, found[1]))
    model, ids = tiny_model("qwen3_next"), tokens(2, 21)
    wanted = model(ids, use_cache=False).last_hidden_state
    with compat.vertical_chunking() as report:
        assert torch.equal(model(ids, use_cache=False).last_hidden_state, wanted)
        why = report.paths["qwen3_next"]
        assert why.startswith("not used, as its rule differs; 4 tokens: it gives ")
        assert report.paths["kimi_linear"] == ""


def test_where_only_the_convolution_is_another_the_rule_is_replaced(another_rule):
    another_rule("causal_conv1d_fn", lambda found: found * 2)
    model, ids = tiny_model("qwen3_next"), tokens(2, 21)
    with torch.no_grad():
        wanted = model(ids, use_cache=False).last_hidden_state
    assert (chunked(model, ids) - wanted).abs().max() <= CHUNKED[torch.float32]
    why = compat.status().paths["qwen3_next"]
    assert why.startswith("only its rule, as its convolution differs; a width of 4: it gives ")


# The status, about versions.


@pytest.mark.parametrize("library", _report.TESTED)
def test_the_newest_release_that_was_tested_is_the_pinned_one(library, pytestconfig):
    pins = (pytestconfig.rootpath / "ci" / "constraints.txt").read_text().splitlines()
    assert f"{library}=={_report.TESTED[library]}" in pins


def test_a_release_that_is_newer_than_tested_is_said_to_be(monkeypatch):
    monkeypatch.setattr(_report, "version", lambda library: "9.0.0")
    assert all("newer than tested" in library.reason for library in compat.status().libraries)
    monkeypatch.setattr(_report, "version", lambda library: "5.0.0")
    assert not any("newer than tested" in library.reason for library in compat.status().libraries)
