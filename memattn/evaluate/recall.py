"""Recall of facts earlier in the text: accuracy on synthetic tasks by length and depth."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memattn._tables import Table
from memattn.checks import check_int, must
from memattn.data.tasks import Sample, Task, draw_sample
from memattn.evaluate.perplexity import run_in_eval_mode, with_progress


@dataclass(frozen=True, kw_only=True)
class RecallCell:
    """Answers at one length and depth.

    Attributes:
        length: Tokens of a sample.
        depth: Where the fact stood, from 0 to 1; None where it was drawn.
        num_samples: Samples.
        accuracy: Share of the answers that are right, each after the right ones before it.
        exact: Share of the samples of which every answer is right.
        chance: Accuracy of guessing.
        loss: Mean negative log-likelihood of a token of the answers, nats.
        distance: Mean number of tokens from the earliest fact that is needed to the first answer.
        beyond_reach: Share of the samples whose distance is beyond the reach of windows of
            attention through all layers; None if attention has no window.
    """

    length: int
    depth: float | None
    num_samples: int
    accuracy: float
    exact: float
    chance: float
    loss: float
    distance: float
    beyond_reach: float | None


@dataclass(frozen=True, kw_only=True)
class RecallReport:
    """All cells of a task.

    Attributes:
        task: Name of the task.
        cells: By length, then by depth.
        reach: Tokens that windows of attention reach back through all layers; None for no window.
        seed: Seed of the samples.
    """

    task: str
    cells: tuple[RecallCell, ...]
    reach: int | None
    seed: int

    @property
    def accuracy(self) -> float:
        """Mean over the cells."""
        return sum(cell.accuracy for cell in self.cells) / len(self.cells)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {**asdict(self), "cells": [asdict(cell) for cell in self.cells]}

    def table(self) -> Table:
        """A row for each cell."""
        heads = (
            "length",
            "depth",
            "accuracy",
            "chance",
            "exact",
            "loss",
            "distance",
            "beyond reach",
        )
        rows = [
            (
                f"{cell.length:,}",
                "any" if cell.depth is None else f"{cell.depth:g}",
                f"{cell.accuracy:.3f}",
                f"{cell.chance:.2g}",
                f"{cell.exact:.3f}",
                f"{cell.loss:.3f}",
                f"{cell.distance:,.0f}",
                "-" if cell.beyond_reach is None else f"{cell.beyond_reach:.2f}",
            )
            for cell in self.cells
        ]
        return Table(self.task, heads, rows)


def recall(
    model: nn.Module,
    task: Task,
    *,
    lengths: Sequence[int],
    depths: Sequence[float] | None = None,
    samples: int = 10,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> RecallReport:
    """Measure how many answers of a task a causal language model gives, by length and depth.

    An answer is right if each of its tokens is the most likely one after the right text before it.
    With one answer a sample this equals greedy decoding, at less cost. Samples of a length have
    exactly that length, so nothing is padded.

    Args:
        model: A causal language model as transformers calls one. It runs in evaluation mode and is
            put back into the mode it was in.
        task: A task of ``memattn.data.tasks``.
        lengths: Tokens of a sample, the answers included.
        depths: Place of the required fact, from 0, the start of the text, to 1, its end; None draws
            places at random.
        samples: Samples of each length and depth.
        batch_size: Samples in one forward pass.
        seed: Seed of the samples, the same ones for every model with the same tokenizer.
        progress: Whether to show a progress bar on stderr.

    Returns:
        Accuracy, chance and loss of every cell.

    Raises:
        ValueError: If there is no length, a length is too short for the task or longer than the
            model takes, or a depth is given to a task that has none.
    """
    check_int("samples", samples, 1)
    check_int("batch_size", batch_size, 1)
    grid: list[tuple[int, float | None]]
    grid = [(n, d) for n in lengths for d in (depths if depths is not None else (None,))]
    if not grid:
        name = "depths" if lengths else "lengths"
        must(name, "not be empty", "none")
    limit = getattr(getattr(model, "config", None), "position_limit", None)
    if limit is not None and max(lengths) > limit:
        must("lengths", f"be at most {limit}, which the model has positions for", max(lengths))
    reach = reach_of(model)
    # drawn before anything runs, so that a length that is too short costs no time
    drawn = [
        [draw_sample(task, length, depth, seed, i) for i in range(samples)]
        for length, depth in grid
    ]
    cells = []
    with run_in_eval_mode(model):
        pairs = zip(grid, drawn, strict=True)
        for (length, depth), cell in with_progress(pairs, len(grid)) if progress else pairs:
            batches = [cell[at : at + batch_size] for at in range(0, samples, batch_size)]
            results = [result for batch in batches for result in _answer(model, batch)]
            cells.append(_cell(length, depth, cell, results, reach))
    return RecallReport(task=task.name, cells=tuple(cells), reach=reach, seed=seed)


def reach_of(model: nn.Module) -> int | None:
    """Tokens that windows of attention reach back through all layers; None for no window.

    Information from farther back can only come through a memory.
    """
    config: Any = getattr(model, "config", None)
    layers = getattr(config, "num_hidden_layers", None)
    window = getattr(getattr(config, "attention", None), "reach", None)
    if window is None:  # another decoder of transformers, each of whose layers may have a window
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
        is_windowed = set(kinds) == {"sliding_attention"} and getattr(
            config, "use_sliding_window", True
        )
        window = getattr(config, "sliding_window", None) if is_windowed else None
    return window * layers if window and layers else None


class _Result:
    """Results of one sample: which answers are right, and the loss of their tokens."""

    def __init__(self, right: list[bool], loss: float, num_tokens: int):
        self.right, self.loss, self.num_tokens = right, loss, num_tokens


@torch.no_grad()
def _answer(model: nn.Module, batch: list[Sample]) -> Iterator[_Result]:
    """Let a model predict the answers of samples of one length."""
    ids = torch.tensor([sample.ids for sample in batch], device=next(model.parameters()).device)
    # logits of a long text before its answers would be most of the memory
    kept = ids.shape[1] - min(sample.answers[0][0] for sample in batch) + 1
    options = {"logits_to_keep": kept} if _keeps_logits(model) else {}
    logits: Tensor = model(input_ids=ids, use_cache=False, **options).logits
    offset = ids.shape[1] - logits.shape[1]
    for row, sample in enumerate(batch):
        right, loss, num_tokens = [], 0.0, 0
        for first, stop in sample.answers:
            predicted = logits[row, first - 1 - offset : stop - 1 - offset].float()
            target = ids[row, first:stop]
            right.append(bool((predicted.argmax(-1) == target).all()))
            loss += F.cross_entropy(predicted, target, reduction="sum").item()
            num_tokens += stop - first
        yield _Result(right, loss, num_tokens)


def _keeps_logits(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _cell(
    length: int,
    depth: float | None,
    samples: list[Sample],
    results: list[_Result],
    reach: int | None,
) -> RecallCell:
    right = [answer for result in results for answer in result.right]
    n = len(samples)
    beyond = None if reach is None else sum(s.distance > reach for s in samples) / n
    return RecallCell(
        length=length,
        depth=depth,
        num_samples=n,
        accuracy=sum(right) / len(right),
        exact=sum(all(result.right) for result in results) / n,
        chance=sum(sample.chance for sample in samples) / n,
        loss=sum(r.loss for r in results) / sum(r.num_tokens for r in results),
        distance=sum(sample.distance for sample in samples) / n,
        beyond_reach=beyond,
    )
