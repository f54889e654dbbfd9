"""One text on its way through the model, chunk by chunk, as its tokens come to be known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compat.families.base import Family
from compat.families.states import copied
from compat.stream.loop import warn_that_it_grows
from compat.stream.text_loop import padded


class Reading:
    """The tokens of one text that a model has read, and its state after them.

    A model whose positions depend on the length of a text (`positions.need_length`) is not for it.

    Attributes:
        start: How many tokens were read.
        state: The model's state after them; None before the first.

    Args:
        backbone: The model without its head.
        family: How its state is carried.
    """

    def __init__(self, backbone: PreTrainedModel, family: Family) -> None:
        if family.grows:
            warn_that_it_grows(str(backbone.config.model_type))
        self._backbone = backbone
        self._family = family
        self._ended = False
        self.start = 0
        self.state: Any = None

    @torch.inference_mode(False)  # A state that is made in one call may be used in another's mode.
    @torch.no_grad()
    def read(self, ids: Sequence[int]) -> Tensor:
        """Run the next tokens as one chunk through all layers.

        A single token behind others ends the reading: the model runs another one behind it.

        Args:
            ids: The token ids, at least one.

        Returns:
            The last hidden state, (1, len(ids), hidden_size).

        Raises:
            RuntimeError: The reading has ended, or a chunk before has failed.
        """
        if self._ended:
            raise RuntimeError("read() after a single token, or after a chunk that failed.")
        self._ended = True  # Until the chunk is through, the state is neither old nor new.
        # The xlstm package's own model has no attribute `device`.
        tokens = padded([[*ids]], self.start).to(next(self._backbone.parameters()).device)
        hidden, self.state = self._family.forward(self._backbone, tokens, self.start, self.state)
        self._ended = tokens.shape[1] > len(ids)
        self.start += len(ids)
        return hidden[:, : len(ids)]

    @torch.inference_mode(False)
    @torch.no_grad()
    def copy(self) -> Reading:
        """Return a reading that goes on from here, apart from this one.

        It costs the memory of the state; of a hybrid, that of its keys and values too.
        """
        other = Reading(self._backbone, self._family)
        other.start, other.state = self.start, copied(self.state)
        other._ended = self._ended
        return other
