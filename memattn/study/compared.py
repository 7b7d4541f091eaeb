"""The measures of each model of a comparison after its run."""

from pathlib import Path
from statistics import median
from typing import Any

from memattn.files import write_json
from memattn.study.cells import Measure
from memattn.train.config import TrainConfig

MEASURED = (
    Measure("perplexity", "perplexity of a token", compared=False),
    Measure("word_perplexity", "perplexity of a word", compared=False),
    Measure("tokens_per_second", "tokens/s", compared=False),
    Measure("peak_mebibytes", "peak memory (MiB)", compared=False),
    Measure("needle_accuracy", "needle", compared=False),
    Measure("needle_loss", "needle loss", compared=False),
    Measure("recall_accuracy", "recall", compared=False),
)
DEPTHS = (0.0, 0.5, 1.0)
SAMPLES = 8
PAIRS = 4


def measure_run(config: TrainConfig, test: str | None) -> dict[str, float]:
    """Perplexity, speed, memory and retrieval of a finished run.

    The run folder gets ``needle.json`` and ``needle.png``, the pass keys by length and depth.

    Args:
        config: The run.
        test: Source of the text whose perplexity is measured; None means the held-out part.

    Returns:
        By the names of ``MEASURED``; memory is left out where it is unknown.
    """
    import torch

    from memattn.data import load_documents
    from memattn.evaluate import perplexity, recall
    from memattn.train.metrics import read_metrics
    from memattn.train.setup import held_out_texts, prepare_data
    from memattn.viz.recall import plot_recall

    folder = Path(config.training.output_dir)
    model = load_trained(folder / "model")
    device = "cpu"
    if torch.accelerator.is_available() and not config.training.cpu:
        device = str(torch.accelerator.current_accelerator())
    model = model.to(device)
    corpus = prepare_data(config)
    tokenizer = corpus.tokenizer
    texts = (
        [document.text for document in load_documents(test)]
        if test
        else held_out_texts(config.data, config.training.training_mode)
    )
    seq_len = config.data.seq_len
    rows = config.training.eval_batch_size or config.training.batch_size
    text = perplexity(model, texts, tokenizer, context_len=seq_len, batch_size=rows)
    needle, pairs = _tasks(tokenizer, texts)
    run: dict[str, Any] = dict(samples=SAMPLES, batch_size=rows, seed=0)
    found = recall(model, needle, lengths=[seq_len, 2 * seq_len], depths=DEPTHS, **run)
    write_json(folder / "needle.json", found.to_dict())
    plot_recall(found, folder / "needle.png", title=f"{folder.parent.name}: {found.task}")
    associated = recall(model, pairs, lengths=[seq_len], **run)
    logged = [row for row in read_metrics(folder / "metrics.csv") if row["loss"] is not None]
    speeds = [row["tokens_per_second"] for row in logged]
    assert text.word_perplexity is not None
    measured = {
        "perplexity": text.perplexity,
        "word_perplexity": text.word_perplexity,
        "tokens_per_second": median(speeds[1:] or speeds),  # in the first, libraries load
        "needle_accuracy": found.accuracy,
        "needle_loss": sum(cell.loss for cell in found.cells) / len(found.cells),
        "recall_accuracy": associated.accuracy,
    }
    peak = _peak_of_step(model, config, corpus)
    return measured if peak is None else {**measured, "peak_mebibytes": peak / 2**20}


def load_trained(folder: Path) -> Any:
    """The model of a finished run, in float32 and in its evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from memattn import models

    assert models  # knows the decoder
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if shown:
        logging.enable_progress_bar()
    return model.eval()


def check_length(tokenizer: Any, seq_len: int) -> None:
    """Raise ValueError where rows are too short for the tasks."""
    from memattn.data.tasks import draw_sample

    needle, pairs = _tasks(tokenizer, ())
    for task, depth in ((needle, 0.5), (pairs, None)):
        try:
            for index in range(SAMPLES):
                draw_sample(task, seq_len, depth, 0, index)
        except ValueError as error:
            raise ValueError(f"seq_len must be long enough for what is measured: {error}") from None


def _tasks(tokenizer: Any, texts: Any) -> tuple[Any, Any]:
    """A pass key in the text, and keys with values in plain tokens."""
    from memattn.data.tasks import Haystack, MultiQueryRecall, Needle

    needle = Needle(haystack=Haystack(tokenizer, texts), needle="passkey")
    return needle, MultiQueryRecall(vocab_size=len(tokenizer), num_pairs=PAIRS)


def _peak_of_step(model: Any, config: TrainConfig, corpus: Any) -> int | None:
    """Bytes of weights, gradients and activations at the peak of a training step."""
    from memattn.bench.memory import step_peak
    from memattn.train.setup import make_batches

    batches = make_batches(
        config,
        corpus.train,
        model=model,
        tokenizer=corpus.tokenizer,
        shuffle=True,
    )
    inputs = {name: value.to(model.device) for name, value in next(batches).items()}
    model.train()

    def step() -> None:
        model(**inputs, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    peak = step_peak(step, str(model.device))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return None if peak is None else peak + weights
