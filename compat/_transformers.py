"""What the installed transformers can do: it is probed, and nothing in it is patched."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers

from ._errors import UnsupportedVersionError


@cache
def probe() -> str | None:
    """Why the models of the installed transformers cannot continue from a state; None if they can.

    Releases that lack either half give other numbers and no error, so both are looked at: whether
    the convolution gets the inputs before the chunk, and whether the scan takes an initial state.
    No model is run: optional GPU kernels would not run on the probe's device.
    """
    try:
        from transformers.cache_utils import Cache, LinearAttentionLayer
        from transformers.models.mamba2 import modeling_mamba2
    except ImportError as error:
        return f"it has no cache for recurrent layers (an import from {error.name} failed)"
    if not hasattr(Cache, "reorder_cache") or not hasattr(LinearAttentionLayer, "reorder_cache"):
        return "the rows of its caches cannot be selected (no reorder_cache)"
    layer, inputs = LinearAttentionLayer(), torch.arange(6.0).view(1, 1, 6)
    layer.update_conv_state(inputs[..., :4].clone())
    if not torch.equal(layer.update_conv_state(inputs[..., 4:])[..., -6:], inputs):
        return "the convolution's state is not put before a chunk of several tokens"
    scan = getattr(modeling_mamba2, "mamba2_chunk_scan", None)
    if scan is None or "initial_states" not in parameters(scan):
        return "the scan of a chunk of several tokens takes no initial state"
    return None


@cache
def parameters(function: Callable[..., Any]) -> frozenset[str]:
    """The parameters of a model's own function, whether or not `kernels` made it an object."""
    own = getattr(type(function), "forward", function)
    return frozenset(inspect.signature(own).parameters)


def require_support() -> None:
    """Raise unless the installed transformers carries recurrent state.

    Raises:
        UnsupportedVersionError: It does not; the message says what the probe saw.
    """
    if reason := probe():
        raise UnsupportedVersionError(
            f"transformers {transformers.__version__}: {reason}",
            "a transformers whose models continue exactly from their cache",
            'pip install --upgrade "transformers>=5.15"',
        )
