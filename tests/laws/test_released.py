"""The laws on transformers without compat: right cases, and wrong ones with the reason.

Texts go through the models' own caches in chunks, as a careful user would do it: with positions of
the tokens, and the mask in the form that the family takes. Every wrong case is a strict expected
failure, so that the suite notices when a release of transformers mends one; it then leaves `WRONG`.
The fork of transformers mends all but one family.
"""

import functools

import pytest
import torch
from support.families import FAMILIES, tiny_model
from support.stack import FORKS
from support.tolerances import CHUNKED

from compat.installed.recurrent_cache import parameters, state_argument

cached_model = functools.cache(tiny_model)

# These models take, for a chunk, its own part of the mask; all others take the mask from the text's
# beginning to the chunk's end.
MASK_OF_CHUNK = {"mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"}
# These clamp the time step to a limit in their config; zamba2 and nemotron_h to one that is always
# set.
LIMITED = ["bamba", "falcon_h1", "granitemoehybrid", "mamba2"]
# The config's name for a bias on what the mask is applied before.
BIAS = {
    "bamba": "mamba_proj_bias",
    "falcon_h1": "mamba_proj_bias",
    "falcon_mamba": "use_bias",
    "granitemoehybrid": "mamba_proj_bias",
    "jamba": "mamba_proj_bias",
    "lfm2": "conv_bias",
    "lfm2_moe": "conv_bias",
    "lfm3": "conv_bias",
    "mamba": "use_bias",
    "mamba2": "use_bias",
    "nemotron_h": "use_bias",
    "zamba": "mamba_proj_bias",
    "zamba2": "add_bias_linear",
}

SEVERAL, SINGLE, DROP = "chunks of several tokens", "chunks of one token", "a row dropped"
LIMIT, PADDED = "finite time_step_limit", "left padding"
PADDED_SINGLE, PADDED_BIAS = "left padding, chunks of one token", "left padding, bias, one pass"
THREE = {"sizes": [7, 9, 8]}
LEFT = [0, 4, 8]  # The last one covers a whole chunk.
CASES = {
    SEVERAL: THREE,
    SINGLE: {"sizes": [1] * 12},
    DROP: THREE | {"keep": [2, 0]},
    LIMIT: {"sizes": [7, 1, 8, 8]},
    PADDED: THREE | {"left": LEFT},
    PADDED_SINGLE: {"sizes": [1] * 12, "left": LEFT},
    PADDED_BIAS: {"sizes": [24], "left": LEFT},
}

FORGETS = "create_recurrent_attention_mask gives a forward of one token no mask"
BIASED = "padding is masked before a projection or convolution whose bias makes it non-zero again"
CLAMP = "mamba2_selective_state_update, the path of one token, does not clamp the time step"
ZEROS = "mamba_selective_scan of several tokens begins from zeros, not from the cached state"
LAYER_0 = "the cache takes its length from layer 0, which is linear and holds no keys"
NO_ROWS = "MiniMaxCache.reorder_cache leaves linear_cache as it is"
COLUMNS = "attention's log scaling counts columns, padding included, instead of tokens"
NOT_RETURNED = "RecurrentGemmaModel.forward does not return its cache"
NO_MASK = "the attention mask is not used"
SQUEEZED = "the token shift of one token broadcasts (batch, hidden) against (batch, 1, hidden)"
NO_REORDER = "xLSTMCache has no way to select rows"

# By family and case, the reason why it is wrong in transformers 5.24.0.
WRONG = (
    {(name, PADDED_SINGLE): FORGETS for name in FAMILIES if name not in MASK_OF_CHUNK}
    | {(name, PADDED_BIAS): BIASED for name in BIAS}
    | {(name, LIMIT): CLAMP for name in LIMITED}
    | {
        (name, case): ZEROS
        for name in ("mamba", "falcon_mamba", "jamba", "zamba")
        for case in (SEVERAL, DROP, PADDED)
    }
    | {
        ("recurrent_gemma", case): NOT_RETURNED
        for case in (SEVERAL, SINGLE, DROP, PADDED, PADDED_SINGLE)
    }
    | {
        ("inkling_text", PADDED): COLUMNS,
        ("mamba2", PADDED_SINGLE): FORGETS,
        ("minimax", DROP): NO_ROWS,
        ("minimax", PADDED): LAYER_0,
        ("minimax", PADDED_SINGLE): f"{FORGETS}; {LAYER_0}",
        ("minimax", SEVERAL): LAYER_0,
        ("nemotron_h", SINGLE): CLAMP,
        ("rwkv", PADDED): NO_MASK,
        ("rwkv", PADDED_SINGLE): f"{SQUEEZED}; {NO_MASK}",
        ("rwkv", SINGLE): SQUEEZED,
        ("xlstm", DROP): NO_REORDER,
        ("xlstm", PADDED): NO_MASK,
        ("xlstm", PADDED_SINGLE): NO_MASK,
        ("zamba2", SINGLE): CLAMP,
    }
)
if FORKS:
    WRONG = {case: reason for case, reason in WRONG.items() if case[0] == "inkling_text"}


def families_of(case):
    return {LIMIT: LIMITED, PADDED_BIAS: sorted(BIAS)}.get(case, sorted(FAMILIES))


def known_to_fail(name, case):
    if (name, case) not in WRONG:
        return ()
    broken = (AssertionError, AttributeError, RuntimeError)
    return pytest.mark.xfail(reason=WRONG[name, case], raises=broken)


@torch.no_grad()
def in_chunks(model, ids, sizes, left=None, keep=None):
    """Return hidden states (batch, seqlen, hidden_size); only rows `keep` after the first chunk."""
    arguments, cache = parameters(model.forward), state_argument(model.forward)
    mask = torch.ones_like(ids)
    for row, columns in enumerate(left or ()):
        mask[row, :columns] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    state, pieces, start = None, [], 0
    for size in sizes:
        end, extra = start + size, {cache: state}
        if "position_ids" in arguments:
            extra["position_ids"] = positions[:, start:end]
        if left:
            first = start if model.config.model_type in MASK_OF_CHUNK else 0
            extra["attention_mask"] = mask[:, first:end]
        output = model(input_ids=ids[:, start:end], use_cache=True, **extra)
        pieces.append(output.last_hidden_state)
        state = output.get(cache)
        assert state is not None, "no state to continue from"
        if keep and start == 0:
            ids, positions, pieces[0] = ids[keep], positions[keep], pieces[0][keep]
            if isinstance(state, list):
                state = [part[keep] for part in state]
            else:
                state.reorder_cache(torch.tensor(keep))
        start = end
    return torch.cat(pieces, 1)


@pytest.mark.parametrize(
    ("model_type", "case"),
    [
        pytest.param(name, case, marks=known_to_fail(name, case))
        for case in CASES
        for name in families_of(case)
    ],
)
def test_released_models_in_chunks(model_type, case):
    settings = {}
    if case == LIMIT:
        settings = {"time_step_limit": (0.02, 0.1)}
    elif case == PADDED_BIAS:
        settings = {BIAS[model_type]: True}
    model = cached_model(model_type, **settings)
    how = CASES[case]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (3, sum(how["sizes"])), generator=generator)
    found = in_chunks(model, ids, **how)
    keep, left = how.get("keep", [0, 1, 2]), how.get("left", [0, 0, 0])
    for row, begin, hidden in zip(ids[keep], left, found, strict=False):
        with torch.no_grad():
            wanted = model(input_ids=row[None, begin:], use_cache=False).last_hidden_state[0]
        assert (hidden[begin:] - wanted).abs().max() <= CHUNKED[torch.float32]


def test_every_known_defect_is_tested():
    known = {(name, case) for case in CASES for name in families_of(case)}
    assert set(WRONG) <= known
