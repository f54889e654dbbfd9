"""The registry of model families is complete for the installed transformers."""

import functools
import inspect
import re
from pathlib import Path

import pytest
from support import families
from support.families import tiny_model
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, LinearAttentionCacheLayerMixin

import compat
from compat.families.lookup import FAMILIES, UNSUPPORTED, backbone_of
from compat.installed.recurrent_cache import parameters, state_argument

RECURRENT_LAYERS = {
    name
    for name, layer in DYNAMIC_LAYER_TYPE_MAPPING.items()
    if issubclass(layer, LinearAttentionCacheLayerMixin)
}
# This finds models too whose default config has no recurrent layer, or that keep a state of their
# own.
STATE_IN_SOURCE = re.compile(
    r"LinearAttention|linear_cache|create_recurrent|(conv|recurrent|rnn|ssm)_states?\b"
)


@functools.cache
def source(config_class):
    """Return the text of the modeling modules beside a config class."""
    # A folder without a model has an empty text.
    folder = Path(inspect.getfile(config_class)).parent
    return "".join(path.read_text() for path in sorted(folder.glob("modeling_*.py")))


def parts(config):
    """Yield a config and those that it is made of."""
    yield config
    for name in config.sub_configs or ():
        if isinstance(part := getattr(config, name, None), PreTrainedConfig):
            yield from parts(part)


def is_recurrent(config):
    if RECURRENT_LAYERS.intersection(getattr(config, "layer_types", None) or ()):
        return True
    has_text_model = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return has_text_model and bool(STATE_IN_SOURCE.search(source(type(config))))


@functools.cache
def recurrent_types():
    """Return the model types that are or contain a recurrent model, and those not looked into."""
    found, unknown = set(), set()
    for model_type, config_class in CONFIG_MAPPING.items():
        try:
            config = config_class()
        except Exception:  # A config may ask for anything that has no default.
            unknown.add(model_type)
            continue
        if any(map(is_recurrent, parts(config))):
            found.add(model_type)
    return found, unknown


def test_every_recurrent_model_of_transformers_is_supported_or_listed_with_a_reason():
    found, _ = recurrent_types()
    assert found == set(FAMILIES) | set(UNSUPPORTED)
    assert not set(FAMILIES) & set(UNSUPPORTED)


def test_a_config_without_defaults_hides_no_recurrent_model():
    _, unknown = recurrent_types()
    assert len(unknown) < 10
    for model_type in unknown:
        assert not STATE_IN_SOURCE.search(source(CONFIG_MAPPING[model_type])), model_type


def test_every_supported_family_has_a_tiny_model():
    assert set(families.FAMILIES) == set(FAMILIES)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_family_is_what_the_registry_says(model_type):
    model, family = tiny_model(model_type), FAMILIES[model_type]
    assert backbone_of(model) == (model, family)
    assert state_argument(model.forward) in parameters(model.forward)
    # Attention needs positions, and keeps what it has read.
    assert not family.grows or "position_ids" in parameters(model.forward)


@pytest.mark.parametrize("model_type", sorted(UNSUPPORTED))
def test_an_unsupported_type_is_refused_with_the_reason(model_type):
    model = tiny_model("mamba2")
    model.config.model_type = model_type
    with pytest.raises(compat.UnsupportedModelError) as error:
        backbone_of(model)
    assert model_type in str(error.value)
    assert UNSUPPORTED[model_type] in str(error.value)


def test_the_table_names_all_of_them():
    lines = compat.supported_models_table().splitlines()
    named = {line.split()[0]: line for line in lines if line}
    assert set(FAMILIES) | set(UNSUPPORTED) <= set(named)
    for model_type, reason in UNSUPPORTED.items():
        assert reason in named[model_type]
