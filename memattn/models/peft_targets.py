"""Where PEFT puts adapters into the models of this package, when it is not told.

PEFT looks the type of a model up in tables of its own, one for each kind of adapter, and has no
function by which others enter theirs. The entries are those of Llama, whose layers have the same
names, but for norms.
"""

from typing import Any

from memattn._when_imported import when_imported
from memattn.models.config import MemAttnConfig

HOME = "peft.utils.constants"
TABLE = "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"
LIKE = "llama"
NAMES = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}


def register_peft_targets() -> None:
    """Enter the models into the tables of PEFT, now or when it is imported."""
    when_imported(HOME, TABLE, _enter)


def _enter(module: Any) -> None:
    """Add the models to each table of modules."""
    for name, table in vars(module).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table.get(LIKE), list):
            own = [NAMES.get(target, target) for target in table[LIKE]]
            table.setdefault(MemAttnConfig.model_type, own)
