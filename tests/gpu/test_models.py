"""Models and sentence-transformers on the installed kernels: in chunks as in one pass."""

import pytest
import torch
from support.embedders import embedder, save_checkpoint, text
from support.families import tiny_model, tokens
from support.fused_packages import transformers_own_path
from support.tolerances import CHUNKED, COSINE

import compat

# float16 has 3 more bits than bfloat16.
BOUND = CHUNKED | {torch.float16: CHUNKED[torch.bfloat16]}
DISTANCE = COSINE | {torch.float16: COSINE[torch.bfloat16]}
# The sizes are small for the interpreter.
SMALL = {"num_heads": 2, "head_dim": 8, "hidden_size": 8, "state_size": 8, "n_groups": 1}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_chunks_give_each_row_what_it_gives_alone(device, fused_calls, dtype):
    model = tiny_model("mamba2", dtype, **SMALL).to(device)
    ids = tokens(2, 31).to(device)
    mask = torch.ones_like(ids)
    mask[1, :14] = 0
    chunks = compat.iter_chunks(model, input_ids=ids, attention_mask=mask, vertical_chunk_size=12)
    found = torch.cat([hidden for _, hidden in chunks], 1)
    assert fused_calls
    for row, real in enumerate(mask.bool()):
        alone = model(ids[row, real][None]).last_hidden_state[0]
        assert (found[row, real] - alone).abs().max() <= BOUND[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DISTANCE, ids=str)
def test_encode_in_chunks_is_encode(device, fused_calls, tmp_path, dtype):
    checkpoint = save_checkpoint(tmp_path, dtype=dtype)
    model = embedder(checkpoint).to(device=device, dtype=dtype)
    texts = [text(50), text(7), text(23)]
    with compat.vertical_chunking():
        found = model.encode(texts, vertical_chunk_size=16, convert_to_tensor=True)
        assert fused_calls
        with transformers_own_path():
            whole = model.encode(texts, convert_to_tensor=True)
    cosine = torch.cosine_similarity(found.double(), whole.double())
    assert (1 - cosine).max() <= DISTANCE[dtype]
