"""Held-out losses of a finished run."""

from dataclasses import replace
from typing import Any

from memattn.checks import must
from memattn.train.config import TrainConfig


def answer_losses(
    config: TrainConfig, model: Any, tokenizer: Any, batch_size: int
) -> dict[str, float]:
    """Losses on the held-out answers of a run, as in the run's own evaluation.

    Args:
        config: The run.
        model: Its model, on its device.
        tokenizer: Its tokenizer.
        batch_size: Rows in one forward pass.

    Returns:
        ``eval_loss`` in nats per token, and those of the model's parts.

    Raises:
        ValueError: If the run has no held-out data.
        OSError, ImportError: If the text cannot be loaded.
    """
    from accelerate import Accelerator

    from memattn.train.setup import make_batches, prepare_data
    from memattn.train.step import held_out_losses

    corpus = prepare_data(config)
    if corpus.held_out is None:
        must("data.held_out", "be above 0 to evaluate on what is held out", config.data.held_out)
    batches = make_batches(
        replace(config, training=replace(config.training, eval_batch_size=batch_size)),
        corpus.held_out,
        model=model,
        tokenizer=tokenizer,
        shuffle=False,
    )
    accelerator = Accelerator(cpu=model.device.type == "cpu")
    return held_out_losses(accelerator, model, batches)
