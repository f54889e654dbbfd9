"""Tiny models, one for every recurrent or hybrid text model family of transformers.

`FAMILIES` maps the `model_type` of a text backbone to a function that makes its config;
`tiny_model` builds the model. Lengths that matter to a chunked pass (inner chunk, attention
window, sparse attention budget) lie well below the length of a short test text, so that the text
crosses them.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import models as hf

# The upstream default (0.02) makes a tiny model nearly linear, and hides a lost state.
INIT = {"initializer_range": 0.2}
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    # With a padding token its embedding is zero, and a leak of padding may go unseen.
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Steps this large leave a mark in the state that lasts for the length of a test text.
STEPS = {"time_step_min": 0.02, "time_step_max": 0.2}
ATTENTION = {
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# The names that bamba, falcon_h1 and granitemoehybrid share.
MAMBA2_HEADS = {
    "mamba_n_heads": 4,
    "mamba_n_groups": 2,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
GATED_DELTA = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# Multi-head latent attention.
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
LINEAR, FULL, SPARSE = "linear_attention", "full_attention", "indexed_attention"


def _mamba() -> PreTrainedConfig:
    return hf.MambaConfig(**TINY, **INIT, **STEPS, num_hidden_layers=2, state_size=8)


def _falcon_mamba() -> PreTrainedConfig:
    return hf.FalconMambaConfig(**TINY, **INIT, **STEPS, num_hidden_layers=2, state_size=8)


def _mamba2() -> PreTrainedConfig:
    return hf.Mamba2Config(
        **TINY,
        **INIT,
        **STEPS,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=16,
        n_groups=2,
        state_size=8,
        chunk_size=8,
    )


def _falcon_h1() -> PreTrainedConfig:
    return hf.FalconH1Config(
        **TINY, **INIT, **ATTENTION, **MAMBA2_HEADS, num_hidden_layers=2, mamba_d_ssm=64
    )


def _granitemoehybrid() -> PreTrainedConfig:
    return hf.GraniteMoeHybridConfig(
        **TINY,
        **INIT,
        **ATTENTION,
        **MAMBA2_HEADS,
        num_hidden_layers=3,
        layer_types=[LINEAR, FULL, LINEAR],
        # The released hybrids use no positions; rotary ones are the harder case.
        position_embedding_type="rope",
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=16,
        attention_multiplier=0.35,
    )


def _bamba() -> PreTrainedConfig:
    return hf.BambaConfig(
        **TINY, **INIT, **ATTENTION, **MAMBA2_HEADS, num_hidden_layers=3, attn_layer_indices=[1]
    )


def _nemotron_h() -> PreTrainedConfig:
    return hf.NemotronHConfig(
        **TINY,
        **INIT,
        **STEPS,
        **ATTENTION,
        layers_block_type=[LINEAR, "moe", FULL, "mlp"],
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=2,
        ssm_state_size=8,
        chunk_size=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
    )


def _zamba() -> PreTrainedConfig:
    return hf.ZambaConfig(
        **TINY,
        **INIT,
        **STEPS,
        **ATTENTION | {"num_key_value_heads": 4},
        num_hidden_layers=3,
        # One hybrid layer alone would have nothing to share its weights with, which is refused.
        layers_block_type=[LINEAR, "hybrid", "hybrid"],
        n_mamba_heads=2,
        mamba_d_state=8,
    )


def _zamba2() -> PreTrainedConfig:
    return hf.Zamba2Config(
        **TINY,
        **INIT,
        **STEPS,
        **ATTENTION | {"num_key_value_heads": 4},
        num_hidden_layers=3,
        layers_block_type=[LINEAR, "hybrid", "hybrid"],
        n_mamba_heads=4,
        mamba_ngroups=2,
        mamba_d_state=8,
        chunk_size=8,
        use_mem_rope=True,
        use_shared_attention_adapter=True,
        adapter_rank=4,
    )


def _jamba() -> PreTrainedConfig:
    return hf.JambaConfig(
        **TINY,
        **INIT,
        **ATTENTION,
        num_hidden_layers=3,
        attn_layer_period=3,
        attn_layer_offset=1,
        num_experts=4,
        num_experts_per_tok=2,
        mamba_d_state=8,
    )


def _qwen3_next() -> PreTrainedConfig:
    return hf.Qwen3NextConfig(
        **TINY,
        **INIT,
        **ATTENTION,
        **EXPERTS,
        **GATED_DELTA,
        num_hidden_layers=2,
        layer_types=[LINEAR, FULL],
        shared_expert_intermediate_size=16,
    )


def _qwen3_5_text() -> PreTrainedConfig:
    return hf.Qwen3_5TextConfig(
        **TINY, **INIT, **ATTENTION, **GATED_DELTA, num_hidden_layers=2, layer_types=[LINEAR, FULL]
    )


def _qwen3_5_moe_text() -> PreTrainedConfig:
    return hf.Qwen3_5MoeTextConfig(
        **TINY,
        **INIT,
        **{name: value for name, value in ATTENTION.items() if name != "intermediate_size"},
        **EXPERTS,
        **GATED_DELTA,
        num_hidden_layers=2,
        layer_types=[LINEAR, FULL],
        shared_expert_intermediate_size=16,
    )


def _qwen4_exp_text() -> PreTrainedConfig:
    return hf.Qwen4ExpTextConfig(
        **TINY,
        **INIT,
        **{name: value for name, value in ATTENTION.items() if name != "intermediate_size"},
        **EXPERTS,
        **GATED_DELTA,
        num_hidden_layers=3,
        layer_types=[LINEAR, LINEAR, SPARSE],
        shared_expert_intermediate_size=16,
        hc_count=2,
        hc_lowrank=4,
        ple_layer_ids=[2],
        ple_embed_dim=16,
        heads_per_ngram=2,
        ngram_vocab_size_base=50,
        make_ngram_vocab_size_divisible_by=8,
        split_ngram_parts=1,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=8,
        indexer_compress_ratio=4,
    )


def _olmo_hybrid() -> PreTrainedConfig:
    return hf.OlmoHybridConfig(
        **TINY,
        **INIT,
        **ATTENTION,
        num_hidden_layers=3,
        layer_types=[LINEAR, LINEAR, FULL],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=16,
    )


def _kimi_linear() -> PreTrainedConfig:
    return hf.KimiLinearConfig(
        **TINY,
        **INIT,
        **ATTENTION | LATENT,
        num_hidden_layers=3,
        layer_types=[LINEAR, FULL, LINEAR],
        mlp_layer_types=["dense", "sparse", "sparse"],
        qk_rope_head_dim=4,
        linear_head_dim=8,
        linear_num_heads=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    )


def _bailing_hybrid() -> PreTrainedConfig:
    return hf.BailingHybridConfig(
        **TINY,
        **INIT,
        **ATTENTION | LATENT,
        num_hidden_layers=3,
        layer_types=[LINEAR, LINEAR, FULL],
        mlp_layer_types=["dense", "sparse", "sparse"],
        qk_rope_head_dim=4,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_group=2,
        topk_group=1,
        num_mtp_layers=0,
    )


def _glm5_next_text() -> PreTrainedConfig:
    return hf.Glm5NextTextConfig(
        **TINY,
        **INIT,
        **ATTENTION | LATENT,
        num_hidden_layers=3,
        layer_types=[LINEAR, SPARSE, SPARSE],
        indexer_types=["full", "full", "shared"],
        mlp_layer_types=["dense", "sparse", "sparse"],
        q_lora_rank=16,
        linear_head_dim=8,
        linear_num_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        hc_mult=2,
        index_topk=8,
        index_kpool=4,
        index_head_dim=8,
        # With few heads most scores are zero, and equal ones are picked by chance.
        index_n_heads=16,
    )


def _lfm2() -> PreTrainedConfig:
    return hf.Lfm2Config(
        **TINY,
        **INIT,
        **ATTENTION,
        num_hidden_layers=3,
        layer_types=["conv", FULL, "conv"],
        block_auto_adjust_ff_dim=False,
    )


def _lfm2_moe() -> PreTrainedConfig:
    return hf.Lfm2MoeConfig(
        **TINY,
        **INIT,
        **ATTENTION,
        **EXPERTS,
        num_hidden_layers=3,
        layer_types=["conv", FULL, "conv"],
        num_dense_layers=1,
    )


def _lfm3() -> PreTrainedConfig:
    return hf.Lfm3Config(
        **TINY,
        **INIT,
        **ATTENTION,
        num_hidden_layers=4,
        layer_types=["conv", FULL, "conv", "sliding_attention"],
        head_dim=8,
        sliding_window=12,
    )


def _zaya() -> PreTrainedConfig:
    return hf.ZayaConfig(
        **TINY,
        **INIT,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        num_hidden_layers=2,
        layer_types=["hybrid", "hybrid_sliding"],
        sliding_window=12,
        head_dim=8,
        num_experts=4,
        moe_intermediate_size=16,
        router_hidden_size=8,
    )


def _inkling_text() -> PreTrainedConfig:
    return hf.InklingTextConfig(
        **TINY,
        **INIT,
        **ATTENTION,
        num_hidden_layers=2,
        layer_types=["hybrid_sliding", "hybrid"],
        mlp_layer_types=["dense", "sparse"],
        head_dim=8,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=8,
        sliding_window_size=12,
        d_rel=4,
        rel_extent=16,
        log_scaling_n_floor=8,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
    )


def _inkling2_text() -> PreTrainedConfig:
    return hf.Inkling2TextConfig(
        **TINY,
        **INIT,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        num_hidden_layers=3,
        layer_types=["hybrid_sliding", "hybrid", "hybrid_sliding"],
        unpadded_vocab_size=64,
        head_dim=8,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=8,
        sliding_window_size=12,
        d_rel=4,
        rel_extent=16,
        log_scaling_n_floor=8,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_layers_per_attn_res_block=2,
    )


def _minimax() -> PreTrainedConfig:
    return hf.MiniMaxConfig(
        **TINY,
        **INIT,
        **ATTENTION,
        num_hidden_layers=2,
        # The config class starts with attention; the released models start with a linear layer.
        layer_types=[LINEAR, FULL],
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        block_size=8,
    )


def _recurrent_gemma() -> PreTrainedConfig:
    return hf.RecurrentGemmaConfig(
        **TINY,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=1,
        num_hidden_layers=3,
        attention_window_size=12,
        w_init_variance_scale=1.0,
    )


def _rwkv() -> PreTrainedConfig:
    return hf.RwkvConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        context_length=512,
        rescale_every=2,
    )


def _xlstm() -> PreTrainedConfig:
    # The config rounds the widths of q, k and v up to a multiple of 64, the layer does not:
    # only such widths run.
    return hf.xLSTMConfig(
        **TINY | {"hidden_size": 64},
        num_hidden_layers=2,
        num_heads=4,
        qk_dim_factor=1.0,
        chunk_size=8,
    )


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "bailing_hybrid": _bailing_hybrid,
    "bamba": _bamba,
    "falcon_h1": _falcon_h1,
    "falcon_mamba": _falcon_mamba,
    "glm5_next_text": _glm5_next_text,
    "granitemoehybrid": _granitemoehybrid,
    "inkling2_text": _inkling2_text,
    "inkling_text": _inkling_text,
    "jamba": _jamba,
    "kimi_linear": _kimi_linear,
    "lfm2": _lfm2,
    "lfm2_moe": _lfm2_moe,
    "lfm3": _lfm3,
    "mamba": _mamba,
    "mamba2": _mamba2,
    "minimax": _minimax,
    "nemotron_h": _nemotron_h,
    "olmo_hybrid": _olmo_hybrid,
    "qwen3_5_moe_text": _qwen3_5_moe_text,
    "qwen3_5_text": _qwen3_5_text,
    "qwen3_next": _qwen3_next,
    "qwen4_exp_text": _qwen4_exp_text,
    "recurrent_gemma": _recurrent_gemma,
    "rwkv": _rwkv,
    "xlstm": _xlstm,
    "zamba": _zamba,
    "zamba2": _zamba2,
    "zaya": _zaya,
}


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, (rows, length), none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 64, (rows, length), generator=generator)


def tiny_model(
    model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """Build the tiny model of a family, without a language model head, in eval mode.

    The weights are drawn in float32, so that those of another dtype are their rounded values.

    Args:
        model_type: A key of `FAMILIES`.
        dtype: The dtype of the parameters. What the model keeps in float32 stays so.
        seed: Seeds the weights. The caller's random state is left alone.
        **overrides: Attributes to set on the config.

    Raises:
        KeyError: If the family is unknown.
        AttributeError: If the config has no attribute of an override's name.
    """
    config = FAMILIES[model_type]()
    for name, value in overrides.items():
        if not hasattr(config, name):
            raise AttributeError(f"{type(config).__name__} has no attribute {name!r} to override")
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(config, dtype=torch.float32)
        _perturb_constants(model)
        if dtype != torch.float32:
            weights = model.state_dict()
            model = AutoModel.from_config(config, dtype=dtype)
            # Only from_pretrained upcasts these.
            kept = [re.compile(pattern) for pattern in model._get_dtype_plan(dtype)]
            for name, tensor in model.state_dict(keep_vars=True).items():
                if any(pattern.search(name) for pattern in kept):
                    tensor.data = tensor.data.float()
            model.load_state_dict(weights)
    return model.eval()


@torch.no_grad()
def _perturb_constants(model: PreTrainedModel) -> None:
    """Add noise to what starts at few values: biases, norms, decays, step sizes, gates."""
    # Other buffers are derived from each other, such as the decays of minimax.
    biases = [(name, buffer) for name, buffer in model.named_buffers() if "bias" in name]
    for name, tensor in [*model.named_parameters(), *biases]:
        if tensor.unique().numel() <= max(1, tensor.numel() // 2):
            tensor.add_(0.1 * torch.randn_like(tensor))
            if name.endswith("dt_bias"):
                # Where all steps start at softplus(1), the state forgets within a few tokens.
                tensor.sub_(3)
