"""A synthetic task as a corpus, for ``data.task`` of a training run."""

import hashlib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memattn.checks import must
from memattn.data.tasks import TASKS, Haystack, Task, draw_sample, task_tokens
from memattn.data.tokens import Tokens, read_tokens, tokenizer_identity, write_tokens
from memattn.train.config import DataConfig, TaskConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS, BYTES_PER_TOKEN = 256, 8  # number of texts to train a tokenizer on, and their length


def make_task(config: TaskConfig, tokenizer: "PreTrainedTokenizerBase") -> Task:
    """The task of a configuration.

    Args:
        config: Name and options of the task.
        tokenizer: The model's tokenizer; a task of plain tokens draws from its vocabulary.

    Raises:
        ValueError: If an option is unknown or wrong.
    """
    options: dict[str, Any] = dict(config.options)
    if has_text(config):
        options["haystack"] = Haystack(tokenizer)
    else:
        options.setdefault("vocab_size", len(tokenizer) - options.get("first_token", 0))
    try:
        return TASKS[config.name](**options)
    except TypeError as error:
        raise ValueError(f"data.task.options: {error}") from error


def has_text(config: TaskConfig) -> bool:
    """Whether samples of the task are text, rather than plain tokens."""
    kind: Any = TASKS[config.name]
    return any(field.name == "haystack" for field in fields(kind))


def texts_of_task(data: DataConfig, task: TaskConfig) -> Iterator[str]:
    """Texts to train a tokenizer on, about as long as the samples."""
    from memattn.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("bytes")
    source = make_task(task, tokenizer)
    for i in range(TEXTS):
        sample = draw_sample(source, BYTES_PER_TOKEN * data.seq_len, None, _seed(data, "train"), i)
        yield str(tokenizer.decode(sample.ids, skip_special_tokens=True))


def task_corpus(
    data: DataConfig, task: TaskConfig, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[Tokens, Tokens | None]:
    """Training samples and held-out samples (None if nothing is held out).

    Raises:
        ValueError: If the task or the share that is held out does not fit.
    """
    source = make_task(task, tokenizer)
    n = round(data.held_out * task.samples)
    if n == task.samples or (n == 0 and data.held_out > 0.0):
        must("data.held_out", f"leave samples on both sides of {task.samples}", data.held_out)
    make = lambda side, count: _samples(data, source, tokenizer, count, _seed(data, side))
    return make("train", task.samples - n), make("held out", n) if n else None


def _samples(
    data: DataConfig, source: Task, tokenizer: "PreTrainedTokenizerBase", n: int, seed: int
) -> Tokens:
    """Samples of a task, cached like tokenized documents."""
    about = {field.name: getattr(source, field.name) for field in fields(source)}  # pyright: ignore[reportArgumentType]
    about |= {"haystack": None, "task": type(source).__name__, "length": data.seq_len}
    digest = hashlib.sha256(repr((about, n, seed, tokenizer_identity(tokenizer))).encode())
    folder = Path(data.cache_dir).expanduser() / "tokens" / digest.hexdigest()[:32]
    first = draw_sample(source, data.seq_len, None, seed, 0)
    kept = read_tokens(folder / "tokens.safetensors")
    # samples of another version of the task are drawn again
    if kept is not None and kept[0].ids[: data.seq_len].tolist() == first.ids:
        return kept[0]
    tokens = task_tokens(source, [data.seq_len], n, seed)
    write_tokens(folder / "tokens.safetensors", tokens)
    return tokens


def _seed(data: DataConfig, side: str) -> int:
    """Seed of the samples of a side; below 0, unlike the seed of any other evaluation."""
    return -1 - 2 * data.split_seed - (side != "train")
