"""Training with accelerate: configuration, one loop, and checkpoints that resume bit for bit."""

from typing import TYPE_CHECKING, Any

from memattn.train.config import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    TaskConfig,
    TrainConfig,
    TrainingConfig,
)
from memattn.train.load import load_config

if TYPE_CHECKING:
    from memattn.train.loop import NonFiniteError, TrainResult, train

__all__ = [
    "DataConfig",
    "LoraConfig",
    "ModelConfig",
    "NonFiniteError",
    "TaskConfig",
    "TrainConfig",
    "TrainResult",
    "TrainingConfig",
    "load_config",
    "train",
]


def __getattr__(name: str) -> Any:
    # the loop imports transformers and accelerate, which are not needed to read a configuration
    if name in ("NonFiniteError", "TrainResult", "train"):
        from memattn.train import loop

        return getattr(loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
