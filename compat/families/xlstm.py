"""xLSTM: a state in float32 whatever the model's dtype, of the layers' own head dimensions.

As of transformers 5.24.0 the model makes its cache in its own dtype, and for head dimensions
rounded up to 64, which the layers do not round. Its scan raises where a state in float32, its own
default, meets inputs of a lower dtype and of at least one inner chunk; compat runs it in float32
there. The transformers fork's scan does that itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compat.families.base import Family
from compat.installed.patches import Held, Patch, arguments, wraps
from compat.installed.recurrent_cache import modeling


class XLstm(Family):
    """xLSTM of transformers, with a cache of compat's own, and its scan patched where it raises."""

    def forward(
        self, backbone: PreTrainedModel, input_ids: Tensor, start: int, state: Any
    ) -> tuple[Tensor, Any]:
        """Run one chunk; see `Family.forward`."""
        if state is None:
            state = self.new_cache(backbone, input_ids)
        with PATCHED:
            return super().forward(backbone, input_ids, start, state)

    def select_rows(self, state: Any, rows: Tensor) -> Any:
        """Return the state of some rows; rows is (n,) int64."""
        state.rnn_state = {
            layer: tuple(part[rows] for part in parts) for layer, parts in state.rnn_state.items()
        }
        return state

    def new_cache(self, backbone: PreTrainedModel, input_ids: Tensor) -> Any:
        """Make the cache before the first token, for the rows of input_ids."""
        from transformers.models.xlstm.modeling_xlstm import xLSTMCache

        config: Any = backbone.config
        heads = config.num_heads
        qk_head_dim = int(config.hidden_size * config.qk_dim_factor) // heads
        v_head_dim = int(config.hidden_size * config.v_dim_factor) // heads
        shape = (len(input_ids), heads)
        cache: Any = xLSTMCache(config, 0, dtype=torch.float32)
        cache.seqlen_offset = cache.seqlen_offset.to(input_ids.device)
        cache.rnn_state = {
            layer: tuple(
                torch.zeros(*shape, *dims, dtype=torch.float32, device=input_ids.device)
                for dims in ((qk_head_dim, v_head_dim), (qk_head_dim,), (1,))
            )
            for layer in cache.rnn_state
        }
        return cache


def plan() -> list[Patch]:
    """List the patches of transformers.

    There are none where the layers come from the xlstm package, or where the scan does not raise.
    """
    module = modeling("xlstm")
    backend = getattr(module, "xLSTMBackend", None)
    scan = getattr(module, "mlstm_chunkwise_native_autograd", None)
    if backend is None or scan is None or not _scan_raises(scan):
        return []
    return [(backend, "forward", _in_float32(backend.forward))]


@functools.cache
def _scan_raises(scan: Callable[..., Any]) -> bool:
    """Return whether a bfloat16 scan of one head of width 1 raises from a state in float32."""
    inputs = torch.zeros(1, 1, 2, 1, dtype=torch.bfloat16, device="cpu")
    gate, state = inputs[..., 0], inputs[:, :, :1].float()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            states = state, state[..., 0], state[..., 0]
            scan(inputs, inputs, inputs, gate, gate, *states, chunk_size=2)
        except RuntimeError:
            return True
    return False


def _in_float32(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def backend_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not PATCHED.patched:
            return forward(self, *args, **kwargs)
        given = arguments(forward, (self, *args), kwargs)
        query: Any = given.get("query")
        state: Any = given.get("c_initial")
        raises = (
            isinstance(query, Tensor)
            and query.dtype != torch.float32
            and "inference" in self.config.mode
            and query.shape[2] >= self.config.chunk_size
            and (state is None or state.dtype == torch.float32)
        )
        if not raises:
            return forward(self, *args, **kwargs)
        hidden, states = forward(
            self, *map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()}
        )
        return hidden.to(query.dtype), states

    return backend_forward


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


PATCHED = Held(plan)
