"""The registry: the model types that are read in vertical chunks, and how each carries a state."""

from __future__ import annotations

from dataclasses import asdict
from typing import cast

from transformers import PreTrainedModel

from compat.families import delta, fla, mamba1, rwkv4, xlstm, xlstm_large
from compat.families.base import Family
from compat.families.delta import DeltaRule
from compat.families.exact import require_exact
from compat.families.mamba1 import Mamba
from compat.families.mamba2 import Mamba2
from compat.families.minimax import MiniMax
from compat.families.recurrent_gemma import RecurrentGemma
from compat.families.rwkv4 import Rwkv
from compat.families.supported import MODELS, UNSUPPORTED, look_up
from compat.families.wrapped import unwrapped
from compat.families.xlstm import XLstm
from compat.installed.patches import Held
from compat.ops.waiting import wait_asleep

# Model types that need more than the name of their state. The rest have an entry in `supported`.
_CLASSES: dict[str, type[Family]] = dict.fromkeys(delta.RULES, DeltaRule) | {
    "bamba": Mamba2,
    "falcon_mamba": Mamba,
    "granitemoehybrid": Mamba2,
    "jamba": Mamba,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "minimax": MiniMax,
    "nemotron_h": Mamba2,
    "recurrent_gemma": RecurrentGemma,
    "rwkv": Rwkv,
    "xlstm": XLstm,
    "zamba": Mamba,
    "zamba2": Mamba2,
}

FAMILIES: dict[str, Family] = {
    name: _CLASSES.get(name, Family)(**asdict(family)) for name, family in MODELS.items()
}


def family_patches() -> list[Held]:
    """Return the patches of all families that need one; the chunk loop holds them by itself."""
    return [*mamba1.PATCHED.values(), rwkv4.PATCHED, xlstm.PATCHED]


def backbone_of(model: PreTrainedModel) -> tuple[PreTrainedModel, Family]:
    """Return the model without its head and wrappers, and the way its state is carried.

    Raises:
        UnsupportedModelError: The model is not a transformers model, its type is not one that is
            known to continue exactly from its state, it does not do so when it is asked, or its
            state is turned off.
    """
    model = unwrapped(model)
    if xlstm_large.is_xlstm_large(model):
        return model, xlstm_large.family_of(model)
    # This comes before the registry, because fla has models of the same names.
    if isinstance(model, PreTrainedModel) and fla.is_fla(model.base_model):
        backbone = cast(PreTrainedModel, model.base_model)
        family = fla.family_of(backbone)
        if backbone.device.type == "cpu":
            wait_asleep()
        return backbone, family
    backbone, family = look_up(model, FAMILIES)
    if backbone.device.type == "cpu":
        wait_asleep()
    require_exact(backbone, family)
    return backbone, family


def supported_models_table() -> str:
    """Return the registry as a table: a line for each model type, the supported ones first."""
    families = FAMILIES | {f"{name} (fla)": family for name, family in fla.FAMILIES.items()}
    refused = {f"{name} (fla)": reason for name, (reason, _) in fla.REFUSED.items()}
    lines = {
        name: "supported; "
        + ("keys and values grow with the text" if family.grows else "constant memory")
        for name, family in sorted(families.items())
    }
    lines["xLSTMLarge (xlstm)"] = "supported; constant memory"
    for name, reason in sorted((UNSUPPORTED | refused).items()):
        lines[name] = f"not supported: {reason}"
    width = max(map(len, lines))
    return "\n".join(f"{name.ljust(width)}  {line}" for name, line in lines.items())
