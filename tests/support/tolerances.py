"""The one table of tolerances: every comparison of numbers in the tests takes its bound from here.

Models run on the CPU, whose matrix products and sums are done in another order when a text is
split; nothing else may differ. Kernels, below, run on it in an interpreter or an emulation.
"""

import torch


def error(found, wanted):
    """Return the largest absolute error."""
    return (found.double() - wanted.double()).abs().max().item()


# Hidden states, largest absolute error for outputs of order 1, against a float64 recurrence that
# has the same weights. float32 carries 24 bits; a few layers lose 5 or so of them. bfloat16
# carries 8 bits, and rounds after every operation.
HIDDEN = {torch.float32: 1e-5, torch.bfloat16: 1e-1}

# Chunked against full in the same dtype, largest absolute error; outputs are of size 3 to 4. The
# tiny models have ten times the usual initial weights, and that amplifies rounding: the full pass
# of qwen3_5 or olmo_hybrid itself is off by 1.4e-5 from float64, and the two errors add up. With
# 0.05 for 0.2 in `families.INIT` the whole suite holds 1e-5; but a recurrent state that is lost
# then costs as little as 2e-5 (zamba2), and here 3e-3 to 4.
CHUNKED = {torch.float32: 5e-5, torch.bfloat16: 6e-2}

# Gradients of embeddings, chunked against full, as a share of each parameter's largest: sums over
# the chunks are taken in another order.
GRADIENTS = {torch.float64: 1e-10, torch.float32: 1e-4}

# The same in float64 where released code goes through float32 on the way: for some parameters, or
# for all behind its norms.
GRADIENTS_ROUNDED = 1e-5

# Embeddings, chunked against full, cosine distance: the project's promise to its users.
COSINE = {torch.float32: 1e-6, torch.bfloat16: 1e-4}

# "No worse than full": a chunked error against float64 may exceed the full pass's by this factor,
# and by this absolute amount where both are near the last bit.
NO_WORSE_FACTOR = 2.0
NO_WORSE_SLACK = {torch.float32: 2e-6, torch.bfloat16: 2e-2}

# Kernels against the float64 recurrences of tests/kernels.

# The convolution: relative and absolute. Results are of order 1 to 10. The kernels read and write
# the input's dtype and compute in float32, so a result carries one rounding to its dtype: half a
# unit of 2^-23, 2^-10 and 2^-7, and the sigmoid some more of float32. A kernel that is compiled for
# a GPU has, besides, the fast exponential, which is not met here.
KERNEL_CONV = {
    torch.float32: (1e-5, 1e-5),
    torch.float16: (1e-3, 1e-3),
    torch.bfloat16: (8e-3, 8e-3),
}

# Its gradients of weight and bias are sums over all tokens in float32, added up in another order
# than the recurrence's: some hundred terms of order 1. With an output in 16 bits nothing else is
# rounded: the output's gradient is given, not computed from the output.
KERNEL_CONV_SUMMED = (1e-4, 1e-4)

# Mamba-2's scan and fused op: largest absolute error as a part of the largest expected value (of 1,
# where that is smaller), of outputs, states and gradients. The gradient of a parameter or of a
# state is a sum over tokens in which terms cancel: it is taken as a part of the largest term.
# float32: 24 bits, less about 5 for sums over tokens, heads and state, and for exp of sums of dt A.
# 16 bits: inputs of every matrix product are rounded, and so is what the fused op hands from one
# kernel to the next; float16 has more bits, and is held to the bound of bfloat16.
KERNEL_SSD = {torch.float32: 2e-5, torch.float16: 3e-2, torch.bfloat16: 3e-2}

# In pieces against whole: "no worse than full" above, with this for the slack.
KERNEL_SSD_SLACK = {torch.float32: 5e-6, torch.bfloat16: 1e-2}

# Mamba-1's scan: the largest error as a share of the largest value of an output or gradient.
# float32: sums of up to some thousand terms. In 16 bits inputs are taken as they are and sums are
# done in float32; outputs and most gradients are rounded once, and z's gradient is made of a
# rounded output.
KERNEL_SELECTIVE_SCAN = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

# The wkv of RWKV-4, RWKV-6 and RWKV-7: the largest error as a share of the largest value. RWKV-4's
# output is a weighted mean, of which float32 keeps 24 bits less those that the exponents have
# before the point; sums of some hundred decays of order 1 cost 4 to 5. That of the others is a sum
# of decayed values, and their decays are sums within a chunk of 16 tokens.
OPS_WKV = {torch.float32: 5e-6, torch.bfloat16: 8e-3}

# The gated delta rule: the largest error as a share of the largest value, of outputs and states.
# float32: sums of some hundred products of lengths of order 1. In 16 bits inputs are taken as they
# are, and only outputs are rounded, once.
OPS_DELTA = {torch.float32: 5e-6, torch.bfloat16: 8e-3}
