"""Loss by position: whether a model gains from more text before a token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memattn._tables import Table
from memattn.checks import check_int, must
from memattn.evaluate.perplexity import (
    IGNORE,
    check_window,
    padded,
    run_in_eval_mode,
    tokenize,
    windows_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class PositionLoss:
    """Loss of the tokens with ``first`` to ``last`` tokens before them.

    Attributes:
        first: Fewest tokens before one of them, a power of two.
        last: Most tokens before one of them.
        num_tokens: Tokens that were predicted.
        loss: Mean negative log-likelihood, nats.
    """

    first: int
    last: int
    num_tokens: int
    loss: float


def loss_by_position(
    model: nn.Module,
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    context_len: int | None = None,
    batch_size: int = 8,
) -> list[PositionLoss]:
    """Measure the loss of tokens by the number of tokens before them.

    Texts are cut into windows of ``context_len`` tokens without overlap, as ``perplexity`` cuts
    them. If the model uses the additional text, later positions have a lower loss.

    Args:
        model: A causal language model as transformers calls one.
        texts: Texts. Only those longer than a bucket's first position count in it.
        tokenizer: A transformers tokenizer.
        context_len: Tokens in a window; None means the model's ``max_position_embeddings``, at
            most 1024.
        batch_size: Windows in one forward pass.

    Returns:
        One entry for 1, 2 to 3, 4 to 7, ... tokens before, where there are any.

    Raises:
        ValueError: If there is nothing to predict, a length is out of range, or the tokenizer has
            neither a begin- nor an end-of-text token.
    """
    check_int("batch_size", batch_size, 1)
    context_len, stride = check_window(model, context_len, None)
    windows = [
        window
        for tokens in tokenize(list(texts), tokenizer)
        for window in windows_of(tokens, context_len, stride)
    ]
    sums = torch.zeros(context_len + 1, dtype=torch.float64)
    counts = torch.zeros_like(sums)
    for losses, before in _losses(model, windows, batch_size):
        sums.index_add_(0, before, losses)
        counts.index_add_(0, before, torch.ones_like(losses))
    buckets = []
    for first in (2**i for i in range(context_len.bit_length())):
        last = min(2 * first - 1, context_len)
        if (n := int(counts[first : last + 1].sum())) > 0:
            loss = sums[first : last + 1].sum().item() / n
            buckets.append(PositionLoss(first=first, last=last, num_tokens=n, loss=loss))
    if not buckets:
        must("texts", "have at least one token to predict", "none")
    return buckets


def position_table(buckets: Sequence[PositionLoss]) -> Table:
    """A row for each bucket."""
    rows = [
        (
            f"{b.first:,}" if b.first == b.last else f"{b.first:,} to {b.last:,}",
            f"{b.num_tokens:,}",
            f"{b.loss:.4f}",
        )
        for b in buckets
    ]
    heads = ("tokens before", "predicted", "loss (nats)")
    return Table("loss by position", heads, rows)


@torch.no_grad()
def _losses(
    model: nn.Module, windows: list[tuple[list[int], list[int]]], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Losses of the tokens of a batch, float64 ``[n]``, and how many others are before each."""
    device = next(model.parameters()).device
    with run_in_eval_mode(model):
        for inputs, targets in padded(windows, batch_size):
            inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
            logits = model(**inputs).logits.flatten(0, 1).float()
            losses = F.cross_entropy(
                logits, targets.flatten().to(device), ignore_index=IGNORE, reduction="none"
            )
            before = torch.arange(1, targets.shape[1] + 1).expand_as(targets).flatten()
            wanted = (targets != IGNORE).flatten()
            yield losses.cpu().double()[wanted], before[wanted]
