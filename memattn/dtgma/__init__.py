"""DTG-MA: a classifier that learns tasks one after the other, in columns of a task graph."""

from memattn.dtgma.attention import TaskAttention
from memattn.dtgma.layers import TaskName
from memattn.dtgma.model import INFERENCE, DTGMAModel

__all__ = ["INFERENCE", "DTGMAModel", "TaskAttention", "TaskName"]
