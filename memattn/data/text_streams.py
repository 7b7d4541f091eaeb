"""Streams of real text tasks on frozen embeddings."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from memattn.checks import check_device, must
from memattn.data.embeddings import Encoder, embed_texts, find_encoder
from memattn.data.packages import DEFAULT_CACHE_DIR
from memattn.data.streams import Scenario, Stream, Task
from memattn.data.text_tasks import TextTask, text_domains


def text_stream(
    tasks: Sequence[TextTask],
    encoder: str | Path | Encoder = "auto",
    *,
    name: str = "text",
    scenario: Scenario = "task",
    normalize: bool = True,
    max_length: int = 128,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    cache_dir: str | Path = DEFAULT_CACHE_DIR,
    progress: bool = True,
) -> Stream:
    """A stream of text tasks: each text is its embedding by a frozen encoder.

    Args:
        tasks: Tasks with their texts.
        encoder: A name that ``find_encoder`` knows, or what it returned.
        name: The stream's name.
        scenario: ``"task"``, ``"domain"`` or ``"class"``, see ``Stream``.
        normalize: Whether each embedding is scaled to root mean square 1; otherwise it is the mean
            of hidden states.
        max_length: Tokens of a text that are read, at most.
        batch_size: Texts to encode at a time.
        device: Where to encode. The stream's tensors are on the CPU.
        cache_dir: Folder that keeps archives and embeddings; ``~`` is expanded.
        progress: Whether the encoder and a progress bar are shown on stderr.

    Returns:
        The stream; inputs are float32 ``[n, E]``.

    Raises:
        ValueError: If a label is not among its task's classes, or see ``embed_texts``, ``Stream``.
        FileNotFoundError: If there is no such encoder.
        ConnectionError: If the encoder, or a package, can neither be reached nor is cached.
    """
    if not isinstance(encoder, Encoder):
        encoder = find_encoder(encoder, cache_dir=cache_dir)
    if progress:
        from rich.console import Console

        line = f"encoder: {encoder.name} ({encoder.reason})"
        Console(stderr=True).print(line, soft_wrap=True, highlight=False, markup=False)
    sides = [side for task in tasks for side in task.split]
    texts = [text.text for side in sides for text in side]
    embedded = embed_texts(  # all at once: one load of the encoder, one progress bar
        texts,
        encoder,
        max_length=max_length,
        batch_size=batch_size,
        device=device,
        cache_dir=cache_dir,
        progress=progress,
    )
    if normalize:
        embedded = embedded / embedded.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
    inputs = iter(embedded.split([len(side) for side in sides]))
    built = []
    for task in tasks:
        train_y, test_y = (_labels(task, side) for side in task.split)
        built.append(Task(task.name, next(inputs), train_y, next(inputs), test_y, task.classes))
    return Stream(name, scenario, tuple(built))


def _labels(task: TextTask, side: Sequence) -> Tensor:
    """Labels of one side of a task as indices of its classes."""
    for text in side:
        if text.label not in task.classes:
            must(f"label of task {task.name!r}", f"be one of {task.classes}", repr(text.label))
    return torch.tensor([task.classes.index(text.label) for text in side], dtype=torch.int64)


def text_domains_stream(
    n_tasks: int = 4,
    encoder: str | Path | Encoder = "auto",
    cache_dir: str | Path = DEFAULT_CACHE_DIR,
    seed: int = 0,
    device: str | torch.device = "cpu",
    *,
    domains: Sequence[str] | None = None,
    scenario: Scenario = "task",
    train_per_class: int = 400,
    test_per_class: int = 100,
    normalize: bool = True,
    max_length: int = 128,
    batch_size: int = 32,
    progress: bool = True,
) -> Stream:
    """The benchmark ``text_domains``: ``text_domains`` through ``text_stream``.

    Args:
        n_tasks: How many of the domains.
        encoder: ``"auto"``, ``"minilm"``, a local folder or a name on the hub; see
            ``find_encoder``.
        cache_dir: Folder that keeps archives and embeddings; ``~`` is expanded.
        seed: Seed of the split.
        device: Where to encode.
        domains: Names in ``memattn.data.LABELLED`` in order; None means ``TEXT_DOMAINS``.
        scenario: ``"task"``, ``"domain"`` (the sentiment domains share their classes) or
            ``"class"``.
        train_per_class: Texts of each class to train on, at most.
        test_per_class: Texts of each class to test on, at most.
        normalize: Whether each embedding is scaled to root mean square 1.
        max_length: Tokens of a text that are read, at most.
        batch_size: Texts to encode at a time.
        progress: Whether the encoder and a progress bar are shown on stderr.

    Returns:
        The stream; inputs are float32 ``[n, E]`` on the CPU.

    Raises:
        ValueError: If an argument is out of range.
        FileNotFoundError: If there is no such encoder, or no client that fetches packages.
        ConnectionError: If something that is not cached cannot be reached.
    """
    check_device("device", device)
    tasks = text_domains(
        n_tasks,
        domains=domains,
        train_per_class=train_per_class,
        test_per_class=test_per_class,
        seed=seed,
        cache_dir=cache_dir,
    )
    return text_stream(
        tasks,
        encoder,
        name="text domains",
        scenario=scenario,
        normalize=normalize,
        max_length=max_length,
        batch_size=batch_size,
        device=device,
        cache_dir=cache_dir,
        progress=progress,
    )
