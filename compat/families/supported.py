"""The models of transformers that carry their state, and its names; those that do not, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from transformers import PreTrainedModel

from compat.errors import UnsupportedModelError
from compat.families.base import Family

_RECURRENT = Family(grows=False)
_HYBRID = Family(grows=True)

MODELS: dict[str, Family] = {
    "falcon_mamba": _RECURRENT,
    "mamba": _RECURRENT,
    "mamba2": _RECURRENT,
    "xlstm": _RECURRENT,
    "rwkv": _RECURRENT,
    # Its attention layers look back over a window only.
    "recurrent_gemma": _RECURRENT,
    "bailing_hybrid": _HYBRID,
    "bamba": _HYBRID,
    "falcon_h1": _HYBRID,
    "glm5_next_text": _HYBRID,
    "granitemoehybrid": _HYBRID,
    "inkling2_loop_text": _HYBRID,
    "inkling2_text": _HYBRID,
    "inkling_text": _HYBRID,
    "jamba": _HYBRID,
    "kimi_linear": _HYBRID,
    "lara_mini": _HYBRID,
    "lfm2": _HYBRID,
    "lfm2_moe": _HYBRID,
    "lfm3": _HYBRID,
    "minimax": _HYBRID,
    "nemotron_h": _HYBRID,
    "olmo_hybrid": _HYBRID,
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "qwen4_exp_text": _HYBRID,
    "zamba": _HYBRID,
    "zamba2": _HYBRID,
    "zaya": _HYBRID,
}

_TEXT_MODEL = (
    "it reads images or sound beside text, which cannot be cut into chunks of tokens; for texts, "
    "take its text model, model.base_model.language_model (of type {})"
)

# Recurrent models of transformers that are not read in chunks: the reason, and the remedy.
UNSUPPORTED: dict[str, str] = {
    "glm5_next": _TEXT_MODEL.format("glm5_next_text"),
    "inkling2": _TEXT_MODEL.format("inkling2_text"),
    "inkling2_loop": _TEXT_MODEL.format("inkling2_loop_text"),
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


def look_up(
    model: object, families: Mapping[str, Family] = MODELS
) -> tuple[PreTrainedModel, Family]:
    """Return the model without its head, and the way its state is carried.

    Raises:
        UnsupportedModelError: The model is not a transformers model, its type is not one of
            `families`, or its state is turned off.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"an object of type {type(model).__name__}",
            "a transformers PreTrainedModel with recurrent state",
            "pass the transformers model itself, e.g. SentenceTransformer(...).transformers_model",
        )
    backbone = cast(PreTrainedModel, model.base_model)
    model_type = backbone.config.model_type
    if model_type not in families:
        reason = UNSUPPORTED.get(model_type)
        raise UnsupportedModelError(
            f"a model of type {model_type!r} ({type(backbone).__name__})"
            + (f": {reason}" if reason else ""),
            "a model whose recurrent state is known to be carried exactly: "
            + ", ".join(sorted(families)),
            "encode it without vertical_chunk_size, or split the text yourself",
        )
    if backbone.training and backbone.is_activation_checkpointing:
        raise UnsupportedModelError(
            "a model in training mode with activation checkpointing, which turns its cache off",
            "a model that gives out its state",
            "call model.eval() first",
        )
    return backbone, families[model_type]
