"""Variable tracking: which variables were given a value, directly or through others."""

import random
import string
from dataclasses import dataclass
from typing import ClassVar

from memattn.checks import check_int, must
from memattn.data.tasks.base import Sample
from memattn.data.tasks.haystack import Haystack

_NAMES = string.ascii_uppercase


@dataclass(frozen=True, kw_only=True)
class VariableTracking:
    """Follow assignments through a long text, as NVIDIA/RULER's variable tracking does.

    A chain is ``VAR AB = 12345``, ``VAR CD = VAR AB`` and so on, in this order, anywhere in the
    text; the question names the number, and the answers are the variables of its chain in order.

    Args:
        haystack: The text around.
        num_chains: Chains, each with a number of its own; one is asked for.
        num_hops: Assignments of a chain after its first one.

    Raises:
        ValueError: If a number is out of range.
    """

    haystack: Haystack
    num_chains: int = 1
    num_hops: int = 4
    has_depth: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_int("num_chains", self.num_chains, 1)
        check_int("num_hops", self.num_hops, 1)
        if (n := self.num_chains * (self.num_hops + 1)) > len(_NAMES) ** 2:
            must("num_chains * (num_hops + 1)", f"be at most {len(_NAMES) ** 2} variables", n)

    @property
    def name(self) -> str:
        return f"variable tracking, {self.num_chains} x {self.num_hops} hops"

    def draw(self, length: int, depth: float | None, generator: random.Random) -> Sample:
        size = self.num_hops + 1
        every = [a + b for a in _NAMES for b in _NAMES]
        names = generator.sample(every, self.num_chains * size)
        numbers = generator.sample(range(10**4, 10**5), self.num_chains)
        # chains are interleaved at random, each in its own order
        turns = [chain for chain in range(self.num_chains) for _ in range(size)]
        generator.shuffle(turns)
        facts, seen, needed = [], [0] * self.num_chains, None
        for chain in turns:
            at = chain * size + seen[chain]
            source = f"VAR {names[at - 1]}" if seen[chain] else str(numbers[chain])
            facts.append(f"VAR {names[at]} = {source}.")
            seen[chain] += 1
            if chain == 0 and needed is None:
                needed = len(facts) - 1
        assert needed is not None
        return self.haystack.hide(
            length=length,
            facts=facts,
            places=[None] * len(facts),
            needed=needed,
            question=f"Which variables have the value {numbers[0]}, in order? They are",
            answers=names[:size],
            chance=1.0 / len(names),
            generator=generator,
            task=self.name,
        )
