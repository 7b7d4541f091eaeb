"""Losses of unigram and bigram models, a lower bar for language models."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from memattn.checks import check_int, must


class NgramLosses(NamedTuple):
    """Mean negative log-likelihoods of a text, nats per token."""

    unigram: float
    bigram: float


def ngram_losses(train_ids: Tensor, ids: Tensor, vocab_size: int) -> NgramLosses:
    """Count tokens and pairs of one text, and measure another with the counts.

    The unigram adds one to every count. The bigram is interpolated with it by Witten and Bell:
    after a token that was followed ``c`` times by ``t`` different ones, the counts of its pairs
    weigh ``c / (c + t)``. No constant is chosen. The first token of ``ids`` is not measured.

    Source: Witten and Bell (1991), https://doi.org/10.1109/18.87000, method C.

    Args:
        train_ids: Tokens to count, integers ``[N]``.
        ids: Tokens to measure, integers ``[M]``, of the same tokenizer.
        vocab_size: Entries of the tokenizer.

    Raises:
        ValueError: If either text has less than two tokens, or a token is none of the tokenizer's.
    """
    check_int("vocab_size", vocab_size, 1)
    train_ids, ids = train_ids.long(), ids.long()
    for name, text in (("train_ids", train_ids), ("ids", ids)):
        if text.dim() != 1 or len(text) < 2:
            must(name, "have shape [N] with at least two tokens", list(text.shape))
        if int(text.min()) < 0 or int(text.max()) >= vocab_size:
            must(name, f"be from 0 to {vocab_size - 1}", int(text.max()))
    counts = torch.bincount(train_ids, minlength=vocab_size).double() + 1.0
    unigram = counts / counts.sum()
    pairs, times = torch.unique(_pairs(train_ids, vocab_size), return_counts=True)
    first = pairs // vocab_size
    kinds = torch.bincount(first, minlength=vocab_size).double()
    follows = torch.bincount(train_ids[:-1], minlength=vocab_size).double()

    wanted = _pairs(ids, vocab_size)
    place = torch.searchsorted(pairs, wanted).clamp(max=len(pairs) - 1)
    count = torch.where(pairs[place] == wanted, times[place], 0).double()
    before, target = ids[:-1], unigram[ids[1:]]
    whole = follows[before] + kinds[before]
    seen = whole > 0  # a token that never came before another says nothing
    mixed = (count + kinds[before] * target) / whole.clamp(min=1.0)
    bigram = torch.where(seen, mixed, target)
    return NgramLosses(-target.log().mean().item(), -bigram.log().mean().item())


def bits_per_byte(loss: float, num_tokens: int, num_bytes: int) -> float:
    """A mean loss in nats per token as bits per byte of the text.

    Tokenizers cut a text into more or fewer tokens; bits per byte compare across them.

    Args:
        loss: Mean loss of a token, nats.
        num_tokens: Tokens of the text.
        num_bytes: Its bytes in UTF-8.
    """
    check_int("num_bytes", num_bytes, 1)
    return loss / math.log(2.0) * num_tokens / num_bytes


def _pairs(ids: Tensor, vocab_size: int) -> Tensor:
    return ids[:-1] * vocab_size + ids[1:]
