"""Held-out text of the demo, for models that are trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memattn.demo.config import DemoConfig
from memattn.evaluate import bits_per_byte
from memattn.evaluate.batch_loss import Inputs, mean_loss
from memattn.train import ModelConfig, TrainConfig
from memattn.train.setup import Corpus, make_batches, prepare_data


def held_out_bits(
    config: DemoConfig,
    model: Any,
    corpus: str | None = None,
    more: Callable[[Inputs], Inputs] = lambda batch: {},
) -> float:
    """Bits per byte of the held-out documents.

    Args:
        config: The demo.
        model: A trained model of it.
        corpus: Which text; None means the one of the demo.
        more: Further inputs of the model for a batch.
    """
    run, found = _corpus(config, corpus)
    tokens = found.held_out
    assert tokens is not None
    batches = make_batches(
        run,
        tokens,
        model=model,
        tokenizer=found.tokenizer,
        shuffle=False,
    )
    loss = mean_loss(model, batches.one_epoch(), more)
    return bits_per_byte(loss, len(tokens.ids), tokens.num_bytes)


def held_out_ids(config: DemoConfig) -> Tensor:
    """The beginning of the held-out text, as many tokens as two rows, int64."""
    tokens = _corpus(config, None)[1].held_out
    assert tokens is not None
    return tokens.ids[: 2 * config.seq_len].to(torch.int64)


def _corpus(config: DemoConfig, corpus: str | None) -> tuple[TrainConfig, Corpus]:
    """A text in the tokens of the demo's models, and the run that reads it."""
    start = Path(config.out) / "vanilla" / "model"
    run = TrainConfig(
        model=ModelConfig(model_path=str(start)), data=config.data(corpus or config.corpus, None)
    )
    return run, prepare_data(run)
