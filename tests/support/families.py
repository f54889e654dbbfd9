"""The tiny models with which compat checks a family, in any dtype and with other options."""

import re
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedModel

from compat.families import tiny_models

FAMILIES = [name for name in sorted(tiny_models.CONFIGS) if name in CONFIG_MAPPING]
"""The types of which the installed transformers has a model."""


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Return random token ids, (rows, length), none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 64, (rows, length), generator=generator)


def tiny_model(
    model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """Build the tiny model of a family, without a language model head, in eval mode.

    The weights are drawn in float32, so that those of another dtype are their rounded values.

    Args:
        model_type: One of `FAMILIES`.
        dtype: The dtype of the parameters. What the model keeps in float32 stays so.
        seed: Seeds the weights. The caller's random state is left alone.
        **overrides: Attributes to set on the config.

    Raises:
        KeyError: If the family is unknown.
        AttributeError: If the config has no attribute of an override's name.
    """
    config = tiny_models.config(model_type)
    for name, value in overrides.items():
        if not hasattr(config, name):
            raise AttributeError(f"{type(config).__name__} has no attribute {name!r} to override")
        setattr(config, name, value)
    model = tiny_models.build(config, seed)
    if dtype == torch.float32:
        return model
    weights = model.state_dict()
    with torch.random.fork_rng(devices=[]):
        model = AutoModel.from_config(config, dtype=dtype)
    # Only from_pretrained upcasts these.
    kept = [re.compile(pattern) for pattern in model._get_dtype_plan(dtype)]
    for name, tensor in model.state_dict(keep_vars=True).items():
        if any(pattern.search(name) for pattern in kept):
            tensor.data = tensor.data.float()
    model.load_state_dict(weights)
    return model.eval()
