"""Tiny models, one for every recurrent or hybrid text model that compat reads in chunks.

They are run to find out whether the installed code continues exactly from its state. Lengths that
matter to a chunked pass (inner chunk, attention window, sparse attention budget) are well below the
length of a short text, so that the text crosses them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel

# The upstream default (0.02) makes a tiny model nearly linear, which hides a lost state.
_INIT = {"initializer_range": 0.2}
_TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    # The embedding of a padding token would be zero, which may hide a leak of padding.
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Steps this large leave a mark in the state that lasts for the length of a test text.
_STEPS = {"time_step_min": 0.02, "time_step_max": 0.2}
_ATTENTION = {
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# The names that bamba, falcon_h1 and granitemoehybrid share.
_MAMBA2_HEADS = {
    "mamba_n_heads": 4,
    "mamba_n_groups": 2,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
_GATED_DELTA = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# Settings of multi-head latent attention.
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_INKLING2 = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "unpadded_vocab_size": 64,
    "head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 12,
    "d_rel": 4,
    "rel_extent": 16,
    "log_scaling_n_floor": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
_LINEAR, _FULL, _SPARSE = "linear_attention", "full_attention", "indexed_attention"


CONFIGS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {
        **_TINY,
        **_INIT,
        **_ATTENTION | _LATENT,
        "num_hidden_layers": 3,
        "layer_types": [_LINEAR, _LINEAR, _FULL],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "qk_rope_head_dim": 4,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 2,
        "topk_group": 1,
        "num_mtp_layers": 0,
    },
    "bamba": {
        **_TINY,
        **_INIT,
        **_ATTENTION,
        **_MAMBA2_HEADS,
        "num_hidden_layers": 3,
        "attn_layer_indices": [1],
    },
    "falcon_h1": {
        **_TINY,
        **_INIT,
        **_ATTENTION,
        **_MAMBA2_HEADS,
        "num_hidden_layers": 2,
        "mamba_d_ssm": 64,
    },
    "falcon_mamba": {**_TINY, **_INIT, **_STEPS, "num_hidden_layers": 2, "state_size": 8},
    "glm5_next_text": {
        **_TINY,
        **_INIT,
        **_ATTENTION | _LATENT,
        "num_hidden_layers": 3,
        "layer_types": [_LINEAR, _SPARSE, _SPARSE],
        "indexer_types": ["full", "full", "shared"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "q_lora_rank": 16,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "hc_mult": 2,
        "index_topk": 8,
        "index_kpool": 4,
        "index_head_dim": 8,
        # With few heads most scores are zero, and equal scores are picked arbitrarily.
        "index_n_heads": 16,
    },
    "granitemoehybrid": {
        **_TINY,
        **_INIT,
        **_ATTENTION,
        **_MAMBA2_HEADS,
        "num_hidden_layers": 3,
        "layer_types": [_LINEAR, _FULL, _LINEAR],
        # The released hybrids use no positions; rotary ones are the harder case.
        "position_embedding_type": "rope",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
        "attention_multiplier": 0.35,
    },
    "inkling2_loop_text": {
        **_TINY,
        **_INIT,
        **_INKLING2,
        "num_hidden_layers": 4,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid", "hybrid_sliding"],
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "loop_num_passes": 2,
        "loop_gate_rank": 4,
    },
    "inkling2_text": {
        **_TINY,
        **_INIT,
        **_INKLING2,
        "num_hidden_layers": 3,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
        "n_layers_per_attn_res_block": 2,
    },
    "inkling_text": {
        **_TINY,
        **_INIT,
        **_ATTENTION,
        "num_hidden_layers": 2,
        "layer_types": ["hybrid_sliding", "hybrid"],
        "mlp_layer_types": ["dense", "sparse"],
        "head_dim": 8,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "sliding_window_size": 12,
        "d_rel": 4,
        "rel_extent": 16,
        "log_scaling_n_floor": 8,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
    },
    "jamba": {
        **_TINY,
        **_INIT,
        **_ATTENTION,
        "num_hidden_layers": 3,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 8,
    },
    "kimi_linear": {
        **_TINY,
        **_INIT,
        **_ATTENTION | _LATENT,
        "num_hidden_layers": 3,
        "layer_types": [_LINEAR, _FULL, _LINEAR],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "qk_rope_head_dim": 4,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "lara_mini": {
        **_TINY,
        **_INIT,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        **_EXPERTS,
        **_GATED_DELTA,
        "num_hidden_layers": 3,
        "layer_types": [_LINEAR, _FULL, "sliding_attention"],
        "shared_expert_intermediate_size": 16,
        "sliding_window": 12,
    },
    "lfm2": {
        **_TINY,
        **_INIT,
        **_ATTENTION,
        "num_hidden_layers": 3,
        "layer_types": ["conv", _FULL, "conv"],
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2_moe": {
        **_TINY,
        **_INIT,
        **_ATTENTION,
        **_EXPERTS,
        "num_hidden_layers": 3,
        "layer_types": ["conv", _FULL, "conv"],
        "num_dense_layers": 1,
    },
    "lfm3": {
        **_TINY,
        **_INIT,
        **_ATTENTION,
        "num_hidden_layers": 4,
        "layer_types": ["conv", _FULL, "conv", "sliding_attention"],
        "head_dim": 8,
        "sliding_window": 12,
    },
    "mamba": {**_TINY, **_INIT, **_STEPS, "num_hidden_layers": 2, "state_size": 8},
    "mamba2": {
        **_TINY,
        **_INIT,
        **_STEPS,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "head_dim": 16,
        "n_groups": 2,
        "state_size": 8,
        "chunk_size": 8,
    },
    "minimax": {
        **_TINY,
        **_INIT,
        **_ATTENTION,
        "num_hidden_layers": 2,
        # The config class starts with attention; the released models start with a linear layer.
        "layer_types": [_LINEAR, _FULL],
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "block_size": 8,
    },
    "nemotron_h": {
        **_TINY,
        **_INIT,
        **_STEPS,
        **_ATTENTION,
        "layers_block_type": [_LINEAR, "moe", _FULL, "mlp"],
        "head_dim": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 8,
        "chunk_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
    "olmo_hybrid": {
        **_TINY,
        **_INIT,
        **_ATTENTION,
        "num_hidden_layers": 3,
        "layer_types": [_LINEAR, _LINEAR, _FULL],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
    },
    "qwen3_5_moe_text": {
        **_TINY,
        **_INIT,
        **{name: value for name, value in _ATTENTION.items() if name != "intermediate_size"},
        **_EXPERTS,
        **_GATED_DELTA,
        "num_hidden_layers": 2,
        "layer_types": [_LINEAR, _FULL],
        "shared_expert_intermediate_size": 16,
    },
    "qwen3_5_text": {
        **_TINY,
        **_INIT,
        **_ATTENTION,
        **_GATED_DELTA,
        "num_hidden_layers": 2,
        "layer_types": [_LINEAR, _FULL],
    },
    "qwen3_next": {
        **_TINY,
        **_INIT,
        **_ATTENTION,
        **_EXPERTS,
        **_GATED_DELTA,
        "num_hidden_layers": 2,
        "layer_types": [_LINEAR, _FULL],
        "shared_expert_intermediate_size": 16,
    },
    "qwen4_exp_text": {
        **_TINY,
        **_INIT,
        **{name: value for name, value in _ATTENTION.items() if name != "intermediate_size"},
        **_EXPERTS,
        **_GATED_DELTA,
        "num_hidden_layers": 3,
        "layer_types": [_LINEAR, _LINEAR, _SPARSE],
        "shared_expert_intermediate_size": 16,
        "hc_count": 2,
        "hc_lowrank": 4,
        "ple_layer_ids": [2],
        "ple_embed_dim": 16,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {
        **_TINY,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "num_hidden_layers": 3,
        "attention_window_size": 12,
        "w_init_variance_scale": 1.0,
    },
    "rwkv": {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "context_length": 512,
        "rescale_every": 2,
    },
    # The configuration rounds the widths of q, k and v up to a multiple of 64, but the layer does
    # not. So only multiples of 64 run.
    "xlstm": {
        **_TINY | {"hidden_size": 64},
        "num_hidden_layers": 2,
        "num_heads": 4,
        "qk_dim_factor": 1.0,
        "chunk_size": 8,
    },
    "zamba": {
        **_TINY,
        **_INIT,
        **_STEPS,
        **_ATTENTION | {"num_key_value_heads": 4},
        "num_hidden_layers": 3,
        # A single hybrid layer would share its weights with no other, which is refused.
        "layers_block_type": [_LINEAR, "hybrid", "hybrid"],
        "n_mamba_heads": 2,
        "mamba_d_state": 8,
    },
    "zamba2": {
        **_TINY,
        **_INIT,
        **_STEPS,
        **_ATTENTION | {"num_key_value_heads": 4},
        "num_hidden_layers": 3,
        "layers_block_type": [_LINEAR, "hybrid", "hybrid"],
        "n_mamba_heads": 4,
        "mamba_ngroups": 2,
        "mamba_d_state": 8,
        "chunk_size": 8,
        "use_mem_rope": True,
        "use_shared_attention_adapter": True,
        "adapter_rank": 4,
    },
    "zaya": {
        **_TINY,
        **_INIT,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "num_hidden_layers": 2,
        "layer_types": ["hybrid", "hybrid_sliding"],
        "sliding_window": 12,
        "head_dim": 8,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "router_hidden_size": 8,
    },
}


def config(model_type: str) -> PreTrainedConfig:
    """Return the configuration of a type's tiny model.

    Raises:
        KeyError: The installed transformers has no such type.
        Exception: The type's configuration class does not take these values.
    """
    made: PreTrainedConfig = CONFIG_MAPPING[model_type](**CONFIGS[model_type])
    return made


def build(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Build a configuration's model without its head, in float32, on the CPU and in eval mode.

    Its weights are random, and no random state of the process changes.
    """
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad(), Draws(seed):
        model: PreTrainedModel = AutoModel.from_config(config, dtype=torch.float32)
        _perturb_constants(model)
    model.eval()
    return model


class Draws(TorchFunctionMode):
    """Draw all random numbers of this thread from a separate generator."""

    # fmt: off
    _NAMES = (
        "rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial",
        "normal_", "uniform_", "random_", "bernoulli_", "exponential_", "trunc_normal_",
        "orthogonal_", "kaiming_normal_", "kaiming_uniform_", "xavier_normal_",
        "xavier_uniform_",
    )
    # fmt: on

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name in ("rand_like", "randn_like"):  # In older releases these take no generator.
            like, func = args[0], getattr(torch, name.removesuffix("_like"))
            args = (like.shape,)
            kwargs = {"dtype": like.dtype} | kwargs | {"generator": self._generator}
        elif name in self._NAMES and kwargs.get("generator") is None:
            kwargs = kwargs | {"generator": self._generator}
        return func(*args, **kwargs)


def _perturb_constants(model: PreTrainedModel) -> None:
    """Add noise to parameters that start constant: biases, norms, decays, step sizes and gates."""
    # Other buffers, such as the decays of minimax, are derived from each other.
    biases: list[tuple[str, Tensor]] = [(n, b) for n, b in model.named_buffers() if "bias" in n]
    for name, tensor in [*model.named_parameters(), *biases]:
        if tensor.unique().numel() <= max(1, tensor.numel() // 2):
            tensor.add_(0.1 * torch.randn(tensor.shape, dtype=tensor.dtype))
            if name.endswith("dt_bias"):
                # Where all steps start at softplus(1), the state forgets within a few tokens.
                tensor.sub_(3)
