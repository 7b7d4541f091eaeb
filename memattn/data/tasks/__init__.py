"""Synthetic tasks: texts with facts in them and a question after, of any length."""

from memattn.data.tasks.base import Sample, Task, draw_sample, task_tokens
from memattn.data.tasks.facts import STORIES, Facts
from memattn.data.tasks.haystack import Haystack
from memattn.data.tasks.needle import NEEDLES, Needle
from memattn.data.tasks.recall import MultiQueryRecall
from memattn.data.tasks.tracking import VariableTracking
from memattn.data.tasks.words import CommonWords

# by the names that commands and configurations have for them
TASKS: dict[str, type[Task]] = {
    "needle": Needle,
    "tracking": VariableTracking,
    "words": CommonWords,
    "facts": Facts,
    "recall": MultiQueryRecall,
}

__all__ = [
    "NEEDLES",
    "STORIES",
    "TASKS",
    "CommonWords",
    "Facts",
    "Haystack",
    "MultiQueryRecall",
    "Needle",
    "Sample",
    "Task",
    "VariableTracking",
    "draw_sample",
    "task_tokens",
]
