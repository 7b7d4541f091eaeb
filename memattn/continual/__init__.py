"""Continual learning: streams of tasks, metrics, strategies, benchmarks."""

from memattn.continual.results import BenchmarkResults, StrategyRun
from memattn.continual.run import STREAMS, run_benchmark, run_strategy, search_options
from memattn.continual.strategies import STRATEGIES, Budget, Strategy, make_strategy
from memattn.data.stream_sources import huggingface_stream, mnist_stream, tensor_stream
from memattn.data.streams import Stream, Task, digits_stream, split_stream
from memattn.data.text_streams import text_domains_stream
from memattn.dtgma.metrics import continual_metrics
from memattn.dtgma.train import train_continual

__all__ = [
    "STRATEGIES",
    "STREAMS",
    "BenchmarkResults",
    "Budget",
    "Strategy",
    "StrategyRun",
    "Stream",
    "Task",
    "continual_metrics",
    "digits_stream",
    "huggingface_stream",
    "make_strategy",
    "mnist_stream",
    "run_benchmark",
    "run_strategy",
    "search_options",
    "split_stream",
    "tensor_stream",
    "text_domains_stream",
    "train_continual",
]
