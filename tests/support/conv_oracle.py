"""The causal convolution of a row that holds one or more sequences, in float64, token by token.

It is written from the state contract alone, without a look at causal-conv1d: one loop over the
tokens of each row carries the last width-1 inputs of the current sequence. It is plain
differentiable torch, so that autograd gives every gradient.
"""

import torch


# What a kernel may differ from the float64 oracle, as (rtol, atol), by the dtype of its input.
def causal_conv1d(x, weight, bias=None, *, seq_idx=None, initial_states=None, silu=False):
    """Return outputs and final states of rows of packed sequences.

    Args:
        x: (batch, dim, seqlen).
        weight: (dim, width).
        bias: (dim,) or None.
        seq_idx: (batch, seqlen) of ints, negative at padding; None: one sequence, no padding.
        initial_states: (batch, dim, width-1), of the row's first token that is not padding;
            None: zeros.
        silu: whether the output goes through x * sigmoid(x).

    Returns:
        out (batch, dim, seqlen) and final states (batch, dim, width-1), both float64. The output at
        padding is 0; a row without tokens hands its initial state on.
    """
    x, weight = x.double(), weight.double()
    batch, dim, seqlen = x.shape
    width = weight.shape[1]
    zeros = x.new_zeros(dim, width - 1)
    outs, finals = [], []
    for row in range(batch):
        ids = [0] * seqlen if seq_idx is None else seq_idx[row].tolist()
        state = zeros if initial_states is None else initial_states[row].double()
        current = None  # The sequence that the state belongs to; at first, that of the first token.
        columns = []
        for token in range(seqlen):
            if ids[token] < 0:
                columns.append(x.new_zeros(dim))
                continue
            if current is not None and ids[token] != current:
                state = zeros
            current = ids[token]
            window = torch.cat([state, x[row, :, token : token + 1]], dim=1)
            out = (window * weight).sum(1)
            if bias is not None:
                out = out + bias.double()
            columns.append(out * torch.sigmoid(out) if silu else out)
            state = window[:, 1:]
        outs.append(torch.stack(columns, dim=1) if columns else x.new_zeros(dim, 0))
        finals.append(state)
    return torch.stack(outs), torch.stack(finals)
