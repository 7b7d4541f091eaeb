"""DTG-MA: a classifier that learns tasks one after the other, in columns of a task graph."""

from memattn.dtgma.attention import TaskAttention
from memattn.dtgma.columns import TaskName
from memattn.dtgma.metrics import continual_metrics
from memattn.dtgma.model import DTGMAModel
from memattn.dtgma.options import INFERENCE
from memattn.dtgma.train import train_continual

__all__ = [
    "INFERENCE",
    "DTGMAModel",
    "TaskAttention",
    "TaskName",
    "continual_metrics",
    "train_continual",
]
