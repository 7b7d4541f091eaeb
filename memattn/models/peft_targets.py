"""Default ``target_modules`` of PEFT for the models of this package.

PEFT looks up ``config.model_type`` in one table for each kind of adapter, and has no function to
register a model type. The entries added here are those of Llama: its layers have the same names,
except for the norms.
"""

from typing import Any

from memattn._when_imported import when_imported
from memattn.models.config import MemAttnConfig

HOME = "peft.utils.constants"
TABLE = "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"
LIKE = "llama"
NAMES = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}


def register_peft_targets() -> None:
    """Add the models to the tables of PEFT, now or after a later import of PEFT."""
    when_imported(HOME, TABLE, _enter)


def _enter(module: Any) -> None:
    """Add the models to each table that has lists of module names."""
    for name, table in vars(module).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table.get(LIKE), list):
            own = [NAMES.get(target, target) for target in table[LIKE]]
            table.setdefault(MemAttnConfig.model_type, own)
