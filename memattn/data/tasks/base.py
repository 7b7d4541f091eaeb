"""What a synthetic task is: samples of exactly the length that is asked for, from a seed."""

import random
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch

from memattn.checks import check_int, must
from memattn.data.tokens import Tokens


class Sample(NamedTuple):
    """One text and the answers in it.

    Attributes:
        ids: Tokens of the text, the answers included.
        answers: Bounds ``(first, stop)`` of each answer in ``ids``. An answer is right if the model
            predicts each of its tokens from those before; greedy decoding gives the same result.
        distance: Tokens from the end of the earliest fact that the answers need to the first
            answer.
        chance: Accuracy of guessing among the candidates in the text, or among all answers of the
            right form if there is only one.
    """

    ids: list[int]
    answers: list[tuple[int, int]]
    distance: int
    chance: float


class Task(Protocol):
    """A source of samples.

    Attributes:
        name: Its name in tables.
        has_depth: Whether the place of the fact that is asked for can be chosen.
    """

    has_depth: ClassVar[bool]

    @property
    def name(self) -> str: ...

    def draw(self, length: int, depth: float | None, generator: random.Random) -> Sample:
        """Draw a sample of ``length`` tokens.

        Args:
            length: Tokens of the sample, the answers included.
            depth: Where the fact stands that is asked for, from 0, the start, to 1, the end; None
                draws it.
            generator: Source of random numbers.

        Raises:
            ValueError: If the length is too short for the task, or the depth out of range.
        """
        ...


def draw_sample(task: Task, length: int, depth: float | None, seed: int, index: int) -> Sample:
    """Sample ``index`` of a seed: the same one whatever else is drawn.

    Raises:
        ValueError: If the length is too short for the task, or the depth is out of range or given
            to a task that has none.
    """
    check_int("length", length, 1)
    if depth is not None:
        if not task.has_depth:
            must("depth", f"be None for the task {task.name}", depth)
        if not 0.0 <= depth <= 1.0:
            must("depth", "be between 0 and 1", depth)
    return task.draw(length, depth, random.Random(f"{seed} {length} {depth} {index}"))


def task_tokens(task: Task, lengths: Sequence[int], samples: int, seed: int = 0) -> Tokens:
    """Samples as a corpus to train on: only answers count in the loss.

    Args:
        task: The task.
        lengths: Tokens of a sample; the samples use them one after another.
        samples: Number of samples.
        seed: Seed of the samples. Evaluation with another seed draws other ones.

    Returns:
        A corpus of one document a sample, for ``WholeBatches``.

    Raises:
        ValueError: If a length is too short for the task, or there are no samples.
    """
    check_int("samples", samples, 1)
    if not lengths:
        must("lengths", "not be empty", lengths)
    ids, trained, bounds = [], [], [0]
    for i in range(samples):
        sample = draw_sample(task, lengths[i % len(lengths)], None, seed, i)
        is_answer = torch.zeros(len(sample.ids), dtype=torch.bool)
        for first, stop in sample.answers:
            is_answer[first:stop] = True
        ids.append(torch.tensor(sample.ids, dtype=torch.int32))
        trained.append(is_answer)
        bounds.append(bounds[-1] + len(sample.ids))
    return Tokens(torch.cat(ids), torch.tensor(bounds), 0, torch.cat(trained))
