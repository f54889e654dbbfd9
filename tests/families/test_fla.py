"""flash-linear-attention's own models: the laws, and the models that cannot be continued.

Without a GPU its kernels are run by Triton's interpreter, which takes a few seconds for a pass. So
rows are few and short, and each row's result alone is computed once.
"""

import functools
import importlib.util
import inspect
import os
import warnings

import pytest
import torch
from support.tolerances import CHUNKED, NO_WORSE_FACTOR, NO_WORSE_SLACK
from transformers import CONFIG_MAPPING, Mamba2Model, MambaModel

import compat
from compat.families.fla import FAMILIES, REFUSED, FlaRwkv
from compat.families.gradients import require_gradients
from compat.families.lookup import backbone_of
from tests.laws.test_model import alone, error, in_chunks, tokens
from tests.laws.test_shared_prefix import rows_go_on

GPU = torch.cuda.is_available()
for package in ("fla", "triton"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f'needs {package}: pip install ".[fla]"', allow_module_level=True)
if not GPU:
    if os.environ.get("TRITON_INTERPRET") != "1":  # triton and torch read it at import.
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1: nox -s test-fla", allow_module_level=True)
    from triton.runtime.autotuner import Autotuner

    tune = Autotuner.__init__

    def take_the_first(self, fn, arg_names, configs, key, *args, **kwargs):
        """Take the first configuration, as choosing one needs a device to time them on."""
        tune(self, fn, arg_names, configs[:1], [], *args, **kwargs)

    Autotuner.__init__ = take_the_first
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # It has no GPU, and warns of that.
    import fla.models
# The import takes these names for fla's models; the other tests mean those of transformers.
for name in ("mamba", "mamba2"):
    CONFIG_MAPPING._extra_content.pop(name, None)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The correction_factor:UserWarning"),  # Comba's advice.
    pytest.mark.filterwarnings("ignore:According to Bo:UserWarning"),  # RWKV's initialisation.
]
DEVICE = "cuda" if GPU else "cpu"
CONFIGS = {
    config.model_type: config
    for name in fla.models.__all__
    if isinstance(config := getattr(fla.models, name), type) and name.endswith("Config")
}
# Each configuration takes the settings that it has.
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "head_dim": 16,
    "expand": 2,
    "expand_k": 1.0,
    "expand_v": 1.0,
    "state_size": 8,
    "n_groups": 1,
    "num_slots": 8,
    "intermediate_size": 48,
    "decay_low_rank_dim": 8,
    "gate_low_rank_dim": 8,
    "a_low_rank_dim": 8,
    "v_low_rank_dim": 8,
    "proj_low_rank_dim": 8,
    "initializer_range": 0.2,
    "fuse_cross_entropy": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OWN = {
    "mamba2": {"num_heads": 4},
    "hgrn": {"use_short_conv": True},
    "hgrn2": {"expand_ratio": 16, "use_short_conv": True},
    "gla": {"use_short_conv": True},
    "retnet": {"use_short_conv": True},
}
MAIN = ["gated_deltanet", "rwkv6", "rwkv7"]
LENGTHS = [17, 9, 12]
TEXTS = tokens(sum(LENGTHS)).to(DEVICE).split(LENGTHS)


@functools.cache
def tiny(model_type, dtype=torch.float32):
    """Draw weights in float32 and round them to dtype; none is zero or one by default."""
    config_class = CONFIGS[model_type]
    known = inspect.signature(config_class).parameters
    settings = {name: value for name, value in TINY.items() if name in known}
    config = config_class(**settings | OWN.get(model_type, {}))
    model_class = getattr(fla.models, config_class.__name__.removesuffix("Config") + "Model")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = model_class(config).eval()
        for parameter in model.parameters():
            if parameter.unique().numel() <= max(1, parameter.numel() // 2):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(DEVICE, dtype)


@functools.cache
def each_alone(model_type):
    model = tiny(model_type)
    with torch.no_grad():
        return [model(text[None], use_cache=False).last_hidden_state[0] for text in TEXTS]


def check(model_type, begins, size, rows=(0, 1, 2), right=3):
    """Read texts that begin in these columns in chunks of this size; compare with each alone."""
    width = max(begin + LENGTHS[row] for begin, row in zip(begins, rows, strict=True)) + right
    input_ids = tokens(len(rows) * width, seed=1).view(len(rows), width).to(DEVICE)
    mask = torch.zeros_like(input_ids)
    for i, (begin, row) in enumerate(zip(begins, rows, strict=True)):
        input_ids[i, begin : begin + LENGTHS[row]] = TEXTS[row]
        mask[i, begin : begin + LENGTHS[row]] = 1
    found = in_chunks(tiny(model_type), input_ids, mask, size)
    for i, row in enumerate(rows):
        wanted = each_alone(model_type)[row]
        assert error(found[i, mask[i].bool()], wanted) <= CHUNKED[torch.float32]
    assert not found[~mask.bool()].any()


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_chunks_of_rows_padded_on_both_sides(model_type):
    check(model_type, begins=[0, 8, 0], size=7)


@pytest.mark.skipif(GPU, reason="on a GPU each row is read from its beginning on")
@pytest.mark.parametrize("model_type", MAIN)
def test_rows_go_on_from_the_state_behind_what_they_share(model_type, monkeypatch):
    model = tiny(model_type)
    rows = torch.stack([torch.cat([TEXTS[0][:9], text[:3]]) for text in TEXTS])
    rows_go_on(monkeypatch, model, rows, lambda row: model(row, use_cache=False).last_hidden_state)


@pytest.mark.parametrize("model_type", MAIN)
@pytest.mark.parametrize("size", [1, 5, 16, 40])
def test_chunks_of_any_size(model_type, size):
    check(model_type, begins=[0, 0], size=size, rows=[2, 1])


@pytest.mark.parametrize("model_type", MAIN)
def test_left_padding_over_whole_chunks(model_type):
    check(model_type, begins=[9, 5], size=4, rows=[1, 2], right=0)


@pytest.mark.parametrize("model_type", MAIN)
def test_last_hidden_state_is_that_of_the_last_token(model_type):
    input_ids = torch.stack([TEXTS[0][:12], TEXTS[2]])
    input_ids[0, :3] = 7
    input_ids[0, 3:] = TEXTS[1]
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    found = compat.last_hidden_state(
        tiny(model_type), input_ids=input_ids, attention_mask=mask, vertical_chunk_size=5
    )
    wanted = torch.stack([each_alone(model_type)[row][-1] for row in (1, 2)])
    assert error(found, wanted) <= CHUNKED[torch.float32]


def test_a_model_in_bfloat16_is_no_worse_than_its_full_pass():
    """Leave RWKV out: in bfloat16 the interpreter makes NaN of it, in one pass too."""
    model = tiny("gated_deltanet", torch.bfloat16)
    same_weights = type(model)(model.config).to(DEVICE).eval()
    same_weights.load_state_dict(model.state_dict())
    ids, mask = TEXTS[2][None], torch.ones_like(TEXTS[2][None])
    exact = alone(same_weights, ids, mask)
    full = error(alone(model, ids, mask), exact)
    chunked = error(in_chunks(model, ids, mask, 5), exact)
    assert chunked <= NO_WORSE_FACTOR * full + NO_WORSE_SLACK[torch.bfloat16]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # They come with the NaN.
@pytest.mark.parametrize("model_type", MAIN)
def test_a_model_in_bfloat16_carries_its_state_in_float32(model_type):
    backbone, family = backbone_of(tiny(model_type, torch.bfloat16))
    ids, state = TEXTS[2][None], None
    with torch.no_grad():
        for start in (0, 5):
            _, state = family.forward(backbone, ids[:, start : start + 5], start, state)
    assert {layer.state["recurrent_state"].dtype for layer in state.layers} == {torch.float32}


def test_a_head_is_left_aside():
    model = fla.models.RWKV7ForCausalLM(tiny("rwkv7").config)
    backbone, family = backbone_of(model)
    assert (backbone, family) == (model.model, FAMILIES["rwkv7"])


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_models_that_do_not_continue_are_refused(model_type):
    with pytest.raises(compat.UnsupportedModelError, match=REFUSED[model_type][0]):
        backbone_of(tiny(model_type))


def test_attention_layers_are_refused():
    model = fla.models.GLAModel(tiny("gla").config)
    model.config.attn = {"layers": [1], "num_heads": 2}
    try:
        with pytest.raises(compat.UnsupportedModelError, match="attention layers"):
            backbone_of(model)
    finally:
        model.config.attn = None


@pytest.mark.parametrize(("model_type", "twin"), [("mamba", MambaModel), ("mamba2", Mamba2Model)])
def test_the_remedy_for_mamba_holds(model_type, twin, tmp_path):
    theirs = tiny(model_type)
    theirs.save_pretrained(tmp_path)
    ours = twin.from_pretrained(tmp_path, rescale_prenorm_residual=False).to(DEVICE).eval()
    ids = TEXTS[0][None]
    mask = torch.ones_like(ids)
    found = in_chunks(ours, ids, mask, 7)
    assert error(found, alone(theirs, ids, mask)) <= CHUNKED[torch.float32]


@pytest.mark.parametrize(
    "model_type", sorted(name for name in FAMILIES if not isinstance(FAMILIES[name], FlaRwkv))
)
def test_training_in_chunks_is_refused_where_no_op_of_compats_runs(model_type):
    with pytest.raises(compat.UnsupportedModelError, match="hand the gradient of a state on"):
        require_gradients(tiny(model_type), FAMILIES[model_type])


def test_the_registry_names_models_that_fla_has():
    assert set(FAMILIES) | set(REFUSED) <= set(CONFIGS)
