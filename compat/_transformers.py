"""What the installed transformers can do: it is probed, and nothing in it is patched."""

from __future__ import annotations

import inspect
from functools import cache

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
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
    except ImportError as error:
        return f"it has no cache for recurrent layers (an import from {error.name} failed)"
    if not hasattr(Cache, "reorder_cache") or not hasattr(LinearAttentionLayer, "reorder_cache"):
        return "the rows of its caches cannot be selected (no reorder_cache)"
    if not hasattr(Cache, "get_recurrent_state"):
        return "the states in its caches cannot be read (no get_recurrent_state)"
    layer, inputs = LinearAttentionLayer(), torch.arange(6.0).view(1, 1, 6)
    layer.update_conv_state(inputs[..., :4].clone())
    if not torch.equal(layer.update_conv_state(inputs[..., 4:])[..., -6:], inputs):
        return "the convolution's state is not put before a chunk of several tokens"
    if "initial_states" not in inspect.signature(mamba2_chunk_scan).parameters:
        return "the scan of a chunk of several tokens takes no initial state"
    return None


def require_support() -> None:
    """Raise unless the installed transformers carries recurrent state.

    Raises:
        UnsupportedVersionError: It does not; the message says what the probe saw.
    """
    if reason := probe():
        raise UnsupportedVersionError(
            f"transformers {transformers.__version__}: {reason}",
            "a transformers whose models continue exactly from their cache",
            'pip install --upgrade "transformers>=5.21"',
        )
