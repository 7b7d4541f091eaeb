"""Common words: which words of a long list occur most."""

import random
from dataclasses import dataclass
from typing import ClassVar

from memattn.checks import check_int, must
from memattn.data.tasks.base import Sample
from memattn.data.tasks.haystack import Haystack

_SYLLABLES = tuple(a + b for a in "bdfgklmnprstvz" for b in "aeiou")


@dataclass(frozen=True, kw_only=True)
class CommonWords:
    """Name the words that a long list has most often, as NVIDIA/RULER's common words does.

    The list has ``num_words`` words ``frequency`` times and as many others as the length allows
    ``other_frequency`` times, in random order. Answers are asked for in the order of their first
    places in the list, and need all of it. Words are made of syllables, so that there are enough
    of them; what room is left is prose before the list.

    Args:
        haystack: The text before the list, and the tokenizer.
        num_words: Common words.
        frequency: How often each of them occurs.
        other_frequency: How often each other word occurs, less than ``frequency``.

    Raises:
        ValueError: If a number is out of range.
    """

    haystack: Haystack
    num_words: int = 10
    frequency: int = 30
    other_frequency: int = 3
    has_depth: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("num_words", "frequency", "other_frequency"):
            check_int(name, getattr(self, name), 1)
        if self.frequency <= self.other_frequency:
            must("frequency", f"be above other_frequency={self.other_frequency}", self.frequency)

    @property
    def name(self) -> str:
        return f"common words, {self.num_words} x {self.frequency} among x {self.other_frequency}"

    def draw(self, length: int, depth: float | None, generator: random.Random) -> Sample:
        drawn: set[str] = set()
        common = [_new_word(drawn, generator) for _ in range(self.num_words)]
        entries = common * self.frequency
        room = length - self._size(entries, common)
        while True:
            # one common word at least stands beside one that is not
            word = _new_word(drawn, generator)
            more = [word] * self.other_frequency
            room -= self._size(more, ())
            if room < 0:
                break
            entries += more
        generator.shuffle(entries)
        first = {word: entries.index(word) for word in common}
        sample = self.haystack.hide(
            length=length,
            facts=[_listed(entries)],
            places=[1.0],
            needed=0,
            question=self._question,
            answers=sorted(common, key=first.__getitem__),
            chance=1.0 / len(set(entries)),
            generator=generator,
            task=self.name,
        )
        size = len(self.haystack.encode(f" {_listed(entries)}"))
        return sample._replace(distance=sample.distance + size)

    @property
    def _question(self) -> str:
        return f"Which {self.num_words} words occur most in the list, in order? They are"

    def _size(self, entries: list[str], answers: "list[str] | tuple[()]") -> int:
        """Tokens of entries and, with answers, of all that stands around them; never too few."""
        size = sum(len(self.haystack.encode(f" {entry}")) for entry in entries)
        if answers:
            size += len(self.haystack.encode(_listed([]))) + 2
            size += sum(len(self.haystack.encode(f", {answer}")) for answer in answers)
            size += len(self.haystack.encode(f" {self._question}"))
        return size


def _listed(entries: list[str]) -> str:
    return " ".join(["The list:", *entries, "."])


def _new_word(drawn: set[str], generator: random.Random) -> str:
    """A word of three syllables that has not been drawn."""
    while True:
        word = "".join(generator.choices(_SYLLABLES, k=3))
        if word not in drawn:
            drawn.add(word)
            return word
