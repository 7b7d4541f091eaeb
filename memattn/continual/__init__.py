"""Continual learning: streams of tasks, metrics, strategies, benchmarks."""

from memattn.continual.metrics import continual_metrics
from memattn.continual.streams import (
    Stream,
    Task,
    digits_stream,
    split_stream,
)
from memattn.continual.train import train_continual

__all__ = [
    "Stream",
    "Task",
    "continual_metrics",
    "digits_stream",
    "split_stream",
    "train_continual",
]
