"""``memattn evaluate``."""

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

from memattn.cli._evaluate_memory import memory
from memattn.cli._evaluate_tasks import TASKS

if TYPE_CHECKING:
    from memattn.cli._runs import Loaded
    from memattn.train import TrainConfig


def evaluate(
    model: str | None = None,
    config: str | None = None,
    base_model: str | None = None,
    data: str | None = None,
    context_len: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    by_position: bool = False,
    cache_dir: str = "~/.cache/memattn",
    device: str | None = None,
    memory_bits: Literal[8, 4] | None = None,
    json: str | None = None,
) -> int:
    """Measure the perplexity of a model on a text, or its recall of facts in long texts.

    memattn evaluate MODEL measures perplexity: every token is predicted once, with equal weights.
    Bits per byte and perplexity per word are comparable between tokenizers.

    memattn evaluate TASK MODEL measures the accuracy of answers by length of the text. The tasks
    needle, tracking, words, facts and recall have their own options: memattn evaluate TASK --help.

    memattn evaluate memory MODEL measures how its neural memory is used.

    Args:
        model: A folder with a saved model and its tokenizer, a run folder, or a name on the
            Hugging Face hub.
        config: Configuration of a training run, instead of a model: its trained model or, before
            training, its initial model.
        base_model: Folder of the pretrained model, instead of the one in the configuration.
        data: A corpus (memattn data --list), a text file, a folder or a Hugging Face dataset. By
            default the documents that the run held out from training; for conversations and tasks
            only the answers are measured.
        context_len: Tokens in a window; by default the model's own maximum, at most 1024.
        stride: Tokens by which the window moves; by default its length.
        batch_size: Windows in one forward pass.
        by_position: Also print the loss by the number of tokens before the predicted one.
        cache_dir: Folder with fetched corpora.
        device: Device, such as cpu or cuda; by default CUDA if there is one.
        memory_bits: First quantise the memory of the model to 8 or 4 bits.
        json: File to write the numbers to.
    """
    from rich.console import Console
    from rich.table import Table

    from memattn.cli._evaluate_texts import load_texts
    from memattn.cli._runs import load_either
    from memattn.evaluate import loss_by_position, perplexity
    from memattn.evaluate.positions import position_table
    from memattn.files import write_json

    loaded = load_either(model, config, base_model, device)
    if memory_bits is not None:
        from memattn.parts import quantize_memory

        quantize_memory(loaded.model, memory_bits)
    if data is None and loaded.run is not None and _has_answers(loaded.run):
        return _evaluate_answers(loaded, batch_size, json)
    texts, name = load_texts(loaded, data, cache_dir)
    result = perplexity(
        loaded.model,
        texts,
        loaded.tokenizer,
        context_len=context_len,
        stride=stride,
        batch_size=batch_size,
        progress=True,
    )
    positions = []
    if by_position:
        positions = loss_by_position(
            loaded.model, texts, loaded.tokenizer, context_len=context_len, batch_size=batch_size
        )
    if json is not None:
        more = {"by_position": [asdict(bucket) for bucket in positions]} if by_position else {}
        write_json(json, {"model": loaded.name, "data": name, **result.to_dict(), **more})
    table = Table(title=f"{loaded.name} on {name}, {len(texts)} documents", title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for measure, value in (
        ("loss (nats per token)", f"{result.loss:.4f}"),
        ("perplexity of a token", f"{result.perplexity:,.2f}"),
        ("perplexity of a word", f"{result.word_perplexity:,.2f}"),
        ("bits per byte", f"{result.bits_per_byte:.4f}"),
        ("tokens", f"{result.num_tokens:,}"),
        ("words", f"{result.num_words:,}"),
        ("bytes", f"{result.num_bytes:,}"),
        *((name, f"{value:.4f}") for name, value in result.losses.items()),
    ):
        table.add_row(measure, value)
    Console().print(table)
    if by_position:
        Console().print(position_table(positions).to_rich())
    return 0


KINDS = {"perplexity": evaluate, "memory": memory, **TASKS}


def _has_answers(run: "TrainConfig") -> bool:
    """Whether a run was trained on answers, which are then measured instead of whole texts."""
    return run.data.task is not None or run.training.training_mode == "instruction_finetuning"


def _evaluate_answers(loaded: "Loaded", batch_size: int, json: str | None) -> int:
    """Measure the loss on the answers that a run held out."""
    from memattn.files import write_json
    from memattn.train.evaluate_run import answer_losses

    assert loaded.run is not None
    result = answer_losses(loaded.run, loaded.model, loaded.tokenizer, batch_size)
    data = loaded.run.data
    name = f"held-out answers of {data.dataset_name if data.task is None else data.task.name}"
    if json is not None:
        write_json(json, {"model": loaded.name, "data": name, **result})
    for measure, value in result.items():
        sys.stdout.write(f"{loaded.name} on {name}: {measure} {value:.4f}\n")
    return 0
