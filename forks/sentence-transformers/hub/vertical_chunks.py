"""Read texts in vertical chunks, with recurrent models such as Mamba2.

A vertical chunk is a number of tokens that goes through all layers before the next ones do. The state of the
recurrent layers is carried from chunk to chunk, so the token embeddings are those of the whole text, while only one
chunk of them is held at a time (https://arxiv.org/abs/2604.18199).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakSet

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer

# The names under which models take and give their state; the first since transformers 5.24.
_STATES = ("cache", "past_key_values", "cache_params", "state")
# Models that were found to give in chunks what they give in one pass.
_exact: WeakSet[nn.Module] = WeakSet()


class TokenStream:
    """Stands in for the token embeddings of a batch: gives them chunk by chunk, once.

    Args:
        chunks: The chunks, as the position of the first token and the token embeddings, (batch, chunk, dim).
            Each row's tokens begin at position 0; what comes behind its last token is undefined.
        lengths: The number of tokens of each row, (batch,).
    """

    def __init__(self, chunks: Iterator[tuple[int, Tensor]], lengths: Tensor) -> None:
        self.chunks = chunks
        self.lengths = lengths

    def pool(self, pooling_modes: Sequence[str], prompt_length: int = 0) -> Tensor:
        """Read all chunks, holding one vector for each row and mode.

        Args:
            pooling_modes: Modes of :class:`~sentence_transformers.sentence_transformer.modules.Pooling`.
            prompt_length: The number of first tokens that are left out.

        Returns:
            Tensor: The vectors of all modes side by side, (batch, modes * dim).
        """
        pooled: dict[str, Tensor] = {}
        rows = torch.arange(len(self.lengths), device=self.lengths.device)
        behind = self.lengths > prompt_length
        picked = {"cls": behind * prompt_length, "lasttoken": torch.where(behind, self.lengths - 1, -1)}
        for start, hidden in self.chunks:
            position = start + torch.arange(hidden.shape[1], device=hidden.device)
            left_out = ((position < prompt_length) | (position >= self.lengths[:, None]))[..., None]
            # Sums run over the whole text.
            total = torch.float32 if hidden.device.type == "mps" else torch.float64
            for mode in set(pooling_modes):
                if mode in picked:
                    place = picked[mode] - start
                    here = (place >= 0) & (place < hidden.shape[1])
                    value = hidden[rows, place.where(here, 0)].masked_fill(~here[:, None], 0)
                elif mode == "max":
                    value = hidden.masked_fill(left_out, -torch.inf).amax(1)
                    value = torch.maximum(pooled.pop(mode, value), value)
                else:
                    value = hidden.masked_fill(left_out, 0)
                    if mode == "weightedmean":
                        value = value * (position + 1).to(torch.promote_types(hidden.dtype, torch.float32))[:, None]
                    value = value.sum(1, dtype=total)
                pooled[mode] = pooled.get(mode, 0) + value
            dtype = hidden.dtype
        # Tokens weigh 1, 2, 3, ..., also where those of the prompt are left out.
        weights = (self.lengths * (self.lengths + 1) - prompt_length * (prompt_length + 1)) // 2
        for mode in pooled.keys() & {"mean", "mean_sqrt_len_tokens", "weightedmean"}:
            count = weights if mode == "weightedmean" else self.lengths - prompt_length
            count = count.to(pooled[mode].dtype).clamp(min=1e-9)
            pooled[mode] = pooled[mode] / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)[:, None]
        return torch.cat([pooled[mode].to(dtype) for mode in pooling_modes], dim=-1)

    def __iter__(self) -> NoReturn:
        raise ValueError("With vertical_chunk_size no token embeddings are kept; ask for the sentence embeddings.")

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"With vertical_chunk_size, token embeddings come chunk by chunk, and have no {name!r}. Encode without "
            "it, or put modules that need the token embeddings of a whole text behind Pooling."
        )


def has_recurrent_layers(model: nn.Module) -> bool:
    """Whether a model of transformers has layers that keep nothing of a text but a state of fixed size."""
    kinds = getattr(getattr(model, "config", None), "layer_types", None) or ()
    recurrent = any(kind in ("conv", "linear_attention", "mamba") or kind.startswith("hybrid") for kind in kinds)
    return recurrent or getattr(model, "_is_stateful", False)


def read_in_chunks(module: Transformer, features: dict[str, Any], vertical_chunk_size: int) -> TokenStream:
    """Begin to read a batch of texts.

    Args:
        module: The module whose model reads them.
        features: What its ``preprocess`` makes of them. Padding may stand on either side.
        vertical_chunk_size: The number of tokens in a chunk. No chunk has a single token, if the text has more.

    Returns:
        TokenStream: The token embeddings; nothing is read before they are.

    Raises:
        ValueError: The model, the features or the size do not allow to read in chunks exactly.
    """
    if isinstance(vertical_chunk_size, bool) or not isinstance(vertical_chunk_size, int) or vertical_chunk_size < 1:
        raise ValueError(f"vertical_chunk_size must be a positive integer, found {vertical_chunk_size!r}.")
    if module.training:
        raise ValueError("vertical_chunk_size gives no gradients: call model.eval() first.")
    declared = module._declared_forward_params | {"cu_seq_lens_q"}
    if unknown := features.keys() & declared - {"input_ids", "attention_mask"}:
        raise ValueError(f"The inputs {sorted(unknown)} cannot be cut into vertical chunks.")
    _require_exact(module.model)
    mask = features["attention_mask"].bool()
    lengths = mask.sum(1)
    if not lengths.all():
        raise ValueError("A text has no token: with vertical_chunk_size there is nothing to embed.")
    # The tokens of each row come first, wherever its padding stands, and causal layers do not look behind them.
    order = mask.int().argsort(dim=1, descending=True, stable=True)[:, : int(lengths.max())]
    return TokenStream(_read(module.model, features["input_ids"].gather(1, order), vertical_chunk_size), lengths)


@torch.no_grad()
def _read(model: nn.Module, input_ids: Tensor, vertical_chunk_size: int) -> Iterator[tuple[int, Tensor]]:
    length = input_ids.shape[1]
    starts = list(range(0, length, max(vertical_chunk_size, 2)))
    if len(starts) > 1 and length - starts[-1] == 1:
        starts.pop()  # A single token takes another path through many models.
    state: dict[str, Any] = {}
    for start, stop in zip(starts, [*starts[1:], length], strict=True):
        output = model(input_ids=input_ids[:, start:stop], use_cache=True, return_dict=True, **state)
        state = next(({name: output[name]} for name in _STATES if output.get(name) is not None), {})
        yield start, output.last_hidden_state


@torch.no_grad()
def _require_exact(model: nn.Module) -> None:
    """Raise unless a model gives in chunks what it gives in one pass, for which it is run on a few tokens."""
    if model in _exact:
        return
    name = type(model).__name__
    if not has_recurrent_layers(model):
        raise ValueError(f"vertical_chunk_size is for models with recurrent layers, which {name} has not.")
    rope = str(getattr(model.config, "rope_parameters", None) or getattr(model.config, "rope_scaling", None))
    if "dynamic" in rope or "longrope" in rope:
        raise ValueError(f"The positions of this {name} depend on the length of the text that it is given at once.")
    ids = torch.arange(3, 23, device=model.device)[None] % model.config.get_text_config().vocab_size
    whole = model(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state
    chunks = torch.cat([hidden for _, hidden in _read(model, ids, 7)], dim=1)
    parts = [model(input_ids=part, use_cache=False, return_dict=True) for part in ids.split(7, dim=1)]
    forgetful = torch.cat([part.last_hidden_state for part in parts], dim=1)
    error, lost = ((found.float() - whole.float()).abs().mean() for found in (chunks, forgetful))
    # Of what it costs to begin each chunk anew, rounding costs less than 0.03 (in bfloat16), and a kind of layer that
    # does not go on from its state 0.06 and more.
    if not error <= (0.04 if model.dtype == torch.bfloat16 else 0.01) * lost:
        raise ValueError(
            f"With this version of transformers, {name} does not go on exactly from its state, so that "
            "vertical_chunk_size cannot be used. Upgrade transformers, or encode without it."
        )
    _exact.add(model)
