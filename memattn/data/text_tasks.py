"""Classification tasks on real texts, split without leaks within a task and between tasks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from memattn.checks import check_int, must
from memattn.data.labelled import (
    LABELLED,
    LabelledSplit,
    get_labelled,
    load_labelled,
    split_labelled,
    words_of,
)
from memattn.data.packages import DEFAULT_CACHE_DIR

# the first are of different kinds; `news` is for research only, so it comes by name or last
TEXT_DOMAINS = tuple(LABELLED)


@dataclass(frozen=True)
class TextTask:
    """A classification task on texts.

    Attributes:
        name: Its name in tables.
        classes: Names of its classes, as the texts' labels have them.
        split: Texts to train on and texts to test on.
    """

    name: str
    classes: tuple[str, ...]
    split: LabelledSplit


def text_domains(
    n_tasks: int = 4,
    *,
    domains: Sequence[str] | None = None,
    train_per_class: int = 400,
    test_per_class: int = 100,
    seed: int = 0,
    cache_dir: str | Path = DEFAULT_CACHE_DIR,
) -> tuple[TextTask, ...]:
    """Real text tasks, split without leaks within a task and between tasks.

    A text with the words of one that an earlier task took, for either side, is left out.

    Args:
        n_tasks: How many of the domains.
        domains: Names in ``memattn.data.LABELLED`` in order; None means ``TEXT_DOMAINS``.
        train_per_class: Texts of each class to train on, at most.
        test_per_class: Texts of each class to test on, at most.
        seed: Seed of the split, see ``split_labelled``.
        cache_dir: Folder that keeps archives; ``~`` is expanded.

    Returns:
        The first ``n_tasks`` of the domains.

    Raises:
        ValueError: If a name is unknown or comes twice, or ``n_tasks`` is not in 1..number of
            domains, or see ``split_labelled``.
        ConnectionError: If a package that is not in the cache cannot be fetched.
    """
    names = tuple(TEXT_DOMAINS if domains is None else domains)
    for name in names:
        get_labelled(name)
    if len(set(names)) < len(names):
        must("domains", "be different", names)
    check_int("n_tasks", n_tasks, 1)
    if n_tasks > len(names):
        must("n_tasks", f"be at most {len(names)}, the number of domains", n_tasks)
    taken: set[str] = set()
    tasks = []
    for name in names[:n_tasks]:
        texts = load_labelled(name, cache_dir=cache_dir)
        texts = [text for text in texts if words_of(text.text) not in taken]
        split = split_labelled(
            texts, train_per_class=train_per_class, test_per_class=test_per_class, seed=seed
        )
        taken.update(words_of(text.text) for side in split for text in side)
        tasks.append(TextTask(name, LABELLED[name].classes, split))
    return tuple(tasks)
