"""The registry: which model types are read in vertical chunks, and how their state is carried."""

from __future__ import annotations

from typing import cast

from transformers import PreTrainedModel

from compat import _fla, _mamba, _xlstm, _xlstm_large
from compat._errors import UnsupportedModelError
from compat._family import Family
from compat._fused import Mamba2
from compat._mamba import Mamba
from compat._minimax import MiniMax
from compat._patches import Held
from compat._recurrent_gemma import RecurrentGemma
from compat._rwkv import Rwkv
from compat._xlstm import XLstm

_HYBRID = Family("past_key_values", position_ids=True, grows=True)
_MAMBA2_HYBRID = Mamba2("past_key_values", position_ids=True, grows=True)

FAMILIES: dict[str, Family] = {
    "mamba2": Mamba2("cache_params", position_ids=False, grows=False),
    "rwkv": Rwkv("state", position_ids=False, grows=False),
    "xlstm": XLstm("cache_params", position_ids=False, grows=False),
    "mamba": Mamba("cache_params", position_ids=False, grows=False),
    "falcon_mamba": Mamba("cache_params", position_ids=False, grows=False),
    "jamba": Mamba("past_key_values", position_ids=True, grows=True),
    "zamba": Mamba("past_key_values", position_ids=True, grows=True),
    "minimax": MiniMax("past_key_values", position_ids=True, grows=True),
    # Its attention layers look back over a window only.
    "recurrent_gemma": RecurrentGemma("past_key_values", position_ids=True, grows=False),
    "bailing_hybrid": _HYBRID,
    "bamba": _MAMBA2_HYBRID,
    "falcon_h1": _HYBRID,
    "glm5_next_text": _HYBRID,
    "granitemoehybrid": _MAMBA2_HYBRID,
    "inkling2_text": _HYBRID,
    "inkling_text": _HYBRID,
    "kimi_linear": _HYBRID,
    "lfm2": _HYBRID,
    "lfm2_moe": _HYBRID,
    "lfm3": _HYBRID,
    "nemotron_h": _MAMBA2_HYBRID,
    "olmo_hybrid": _HYBRID,
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "qwen4_exp_text": _HYBRID,
    "zamba2": _MAMBA2_HYBRID,
    "zaya": _HYBRID,
}


_TEXT_MODEL = (
    "it reads images or sound beside text, which cannot be cut into chunks of tokens; for texts, "
    "take its text model, model.base_model.language_model (of type {})"
)

# Recurrent models of transformers that are not read in chunks: why, and what to do instead.
UNSUPPORTED: dict[str, str] = {
    "glm5_next": _TEXT_MODEL.format("glm5_next_text"),
    "inkling2": _TEXT_MODEL.format("inkling2_text"),
    "inkling_mm_model": _TEXT_MODEL.format("inkling_text"),
    "jev": "a head for decisions, not embeddings; for those, take its text model, "
    "model.base_model (of type qwen3_5_text)",
    "lfm2_vl": _TEXT_MODEL.format("lfm2"),
    "lfm3_vl": _TEXT_MODEL.format("lfm3"),
    "lfm3_vl_vision": "a vision tower: it reads no text; use an embedding model of text",
    "minicpm_ocr": _TEXT_MODEL.format("qwen3_5_text"),
    "minicpmv4_6": _TEXT_MODEL.format("qwen3_5_text"),
    "minicpmv4_7": _TEXT_MODEL.format("qwen3_5_text"),
    "nemo_speechlm": _TEXT_MODEL.format("nemotron_h"),
    "nemotron_h_omni": _TEXT_MODEL.format("nemotron_h"),
    "qwen3_5": _TEXT_MODEL.format("qwen3_5_text"),
    "qwen3_5_moe": _TEXT_MODEL.format("qwen3_5_moe_text"),
    "qwen4_exp": _TEXT_MODEL.format("qwen4_exp_text"),
}


def family_patches() -> list[Held]:
    """The patches of all families that need one; the chunk loop holds them by itself."""
    return [*_mamba.PATCHED.values(), _xlstm.PATCHED]


def backbone_of(model: PreTrainedModel) -> tuple[PreTrainedModel, Family]:
    """The model without its head, and the way its state is carried.

    Raises:
        UnsupportedModelError: The model is not a transformers model, its type is not one that is
            known to continue exactly from its state, or its state is turned off.
    """
    if _xlstm_large.is_xlstm_large(model):
        return model, _xlstm_large.family_of(model)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"an object of type {type(model).__name__}",
            "a transformers PreTrainedModel with recurrent state, or an xLSTMLarge",
            "pass the transformers model itself, e.g. SentenceTransformer(...).transformers_model",
        )
    backbone = cast(PreTrainedModel, model.base_model)
    if _fla.is_fla(backbone):  # Before the registry: fla has models of the same names.
        return backbone, _fla.family_of(backbone)
    model_type = backbone.config.model_type
    if model_type not in FAMILIES:
        reason = UNSUPPORTED.get(model_type)
        raise UnsupportedModelError(
            f"a model of type {model_type!r} ({type(backbone).__name__})"
            + (f": {reason}" if reason else ""),
            "a model whose recurrent state is known to be carried exactly: "
            + ", ".join(sorted(FAMILIES)),
            "encode it without vertical_chunk_size, or split the text yourself",
        )
    if backbone.training and backbone.is_activation_checkpointing:
        raise UnsupportedModelError(
            "a model in training mode with activation checkpointing, which turns its cache off",
            "a model that gives out its state",
            "call model.eval() first",
        )
    return backbone, FAMILIES[model_type]


def supported_models_table() -> str:
    """The registry as a table: one line for each model type, the supported ones first."""
    families = FAMILIES | {f"{name} (fla)": family for name, family in _fla.FAMILIES.items()}
    refused = {f"{name} (fla)": reason for name, (reason, _) in _fla.REFUSED.items()}
    lines = {
        name: f"supported; its state is in {family.cache}; "
        + ("keys and values grow with the text" if family.grows else "constant memory")
        for name, family in sorted(families.items())
    }
    lines["xLSTMLarge (xlstm)"] = "supported; constant memory"
    for name, reason in sorted((UNSUPPORTED | refused).items()):
        lines[name] = f"not supported: {reason}"
    width = max(map(len, lines))
    return "\n".join(f"{name.ljust(width)}  {line}" for name, line in lines.items())
