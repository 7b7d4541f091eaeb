"""Counted words and pairs against a plain count in Python."""

import math
from collections import Counter

import pytest
import torch

from memattn.evaluate import bits_per_byte, ngram_losses


def test_counts_are_those_of_a_plain_program():
    generator = torch.Generator().manual_seed(0)
    vocab = 7
    train = torch.randint(vocab - 1, (60,), generator=generator)  # the last token is never seen
    ids = torch.randint(vocab, (40,), generator=generator)
    words, pairs = Counter(train.tolist()), Counter(zip(train.tolist(), train[1:].tolist()))  # noqa: B905
    losses = [0.0, 0.0]
    for first, second in zip(ids.tolist(), ids[1:].tolist()):  # noqa: B905
        unigram = (words[second] + 1) / (len(train) + vocab)
        kinds = len({b for a, b in pairs if a == first})
        follows = sum(n for (a, _), n in pairs.items() if a == first)
        bigram = unigram
        if follows:
            weight = follows / (follows + kinds)
            bigram = weight * pairs[first, second] / follows + (1 - weight) * unigram
        losses[0] -= math.log(unigram) / (len(ids) - 1)
        losses[1] -= math.log(bigram) / (len(ids) - 1)
    assert ngram_losses(train.int(), ids, vocab) == pytest.approx(losses, rel=1e-12)


def test_probabilities_sum_to_one():
    train = torch.tensor([0, 1, 2, 0, 1, 1, 3])
    for first in range(5):
        rows = [torch.tensor([first, second]) for second in range(5)]
        found = [ngram_losses(train, row, 5) for row in rows]
        assert sum(math.exp(-x.bigram) for x in found) == pytest.approx(1.0)
        assert sum(math.exp(-x.unigram) for x in found) == pytest.approx(1.0)


def test_bits_per_byte_do_not_depend_on_the_cut():
    assert bits_per_byte(math.log(256.0), 10, 10) == pytest.approx(8.0)
    assert bits_per_byte(2 * math.log(256.0), 5, 10) == pytest.approx(8.0)


def test_wrong_input_is_named():
    good = torch.tensor([0, 1, 0])
    with pytest.raises(ValueError, match="ids must be from 0 to 1, got 2"):
        ngram_losses(good, torch.tensor([0, 2]), 2)
    with pytest.raises(ValueError, match=r"train_ids must have shape \[N\] .*, got \[1\]"):
        ngram_losses(good[:1], good, 2)
    with pytest.raises(ValueError, match="num_bytes must be"):
        bits_per_byte(1.0, 3, 0)
