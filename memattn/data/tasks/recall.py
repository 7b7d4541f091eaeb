"""Multi-query associative recall: pairs of tokens, and later each key again."""

import random
from dataclasses import dataclass
from typing import ClassVar

from memattn.checks import check_int, must
from memattn.data.tasks.base import Sample


@dataclass(frozen=True, kw_only=True)
class MultiQueryRecall:
    """Recall the value of each of several keys, in plain tokens.

    The task of Arora et al. 2023 (HazyResearch/zoology): the sequence begins with pairs of a key
    and its value; every key comes once more, and the token after it is to be its value. Keys,
    values and filler each have a third of the vocabulary, so that filler is never a key; in the
    original filler may be any token.

    Args:
        vocab_size: Tokens to draw from, from ``first_token`` on.
        num_pairs: Pairs, each asked for once.
        power: How far away keys come again: the density of a distance is proportional to
            ``distance^(power - 1)``. The original has 0.01; 1 spreads them evenly.
        first_token: The lowest token, so that special ones can be left out.

    Raises:
        ValueError: If a number is out of range, or there are too few tokens for the pairs.
    """

    vocab_size: int
    num_pairs: int = 8
    power: float = 1.0
    first_token: int = 0
    has_depth: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_int("num_pairs", self.num_pairs, 1)
        check_int("first_token", self.first_token, 0)
        check_int("vocab_size", self.vocab_size, 1)
        if not 0.0 < self.power <= 1.0:
            must("power", "be above 0 and at most 1", self.power)
        if self.vocab_size < 3 * self.num_pairs:
            must("vocab_size", f"be at least {3 * self.num_pairs} for the pairs", self.vocab_size)

    @property
    def name(self) -> str:
        return f"multi-query recall, {self.num_pairs} pairs"

    def draw(self, length: int, depth: float | None, generator: random.Random) -> Sample:
        n, third = self.num_pairs, self.vocab_size // 3
        if length < 4 * n:
            must("length", f"be at least {4 * n} for the task {self.name}", length)
        first = self.first_token
        keys = generator.sample(range(first, first + third), n)
        values = [generator.randrange(first + third, first + 2 * third) for _ in keys]
        filler = range(first + 2 * third, first + self.vocab_size)
        ids = [token for pair in zip(keys, values, strict=True) for token in pair]
        ids += [generator.choice(filler) for _ in range(length - 2 * n)]
        # places of two tokens; drawn without putting back by the largest of weighted exponentials
        places = range((length - 2 * n) // 2)
        rank = {i: generator.expovariate(1.0) * (i + 1) ** (1.0 - self.power) for i in places}
        chosen = sorted(rank, key=rank.__getitem__)[:n]
        answers, distance = [], 0
        for i, place in enumerate(chosen):
            at = 2 * n + 2 * place
            ids[at], ids[at + 1] = keys[i], values[i]
            answers.append((at + 1, at + 2))
            distance = max(distance, at + 1 - (2 * i + 2))
        return Sample(ids, sorted(answers), distance, 1.0 / n)
