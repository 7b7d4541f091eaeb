"""Prose that facts are hidden in, and how the two become one text of an exact length."""

import random
import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

from memattn.checks import must
from memattn.data.tasks.base import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOISE = (
    *("The grass is green.", "The sky is blue.", "The sun is yellow.", "The snow is white."),
    *("Here we go.", "There and back again.", "The road is long.", "The night is quiet."),
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class Haystack:
    """Sentences of a text as tokens.

    Args:
        tokenizer: A transformers tokenizer.
        texts: Texts; without any, a few short sentences without content are repeated.

    Attributes:
        tokenizer: The tokenizer.
        num_tokens: Tokens of all sentences. A longer text repeats them.

    Raises:
        ValueError: If the texts have no sentence with a token.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str] = ()):
        self.tokenizer = tokenizer
        pieces = [piece for text in texts for piece in _SENTENCE_END.split(text) if piece.strip()]
        if texts and not pieces:
            must("texts", "have at least one sentence", f"{len(texts)} without")
        sentences = [" " + " ".join(piece.split()) for piece in pieces or NOISE]
        self._sentences = [ids for ids in map(self.encode, sentences) if ids]
        self.num_tokens = sum(map(len, self._sentences))

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without special ones."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def prose(self, length: int, generator: random.Random) -> list[list[int]]:
        """Sentences from a random one on, of ``length`` tokens in all; the first may be cut."""
        at, left, drawn = generator.randrange(len(self._sentences)), length, []
        while left > 0:
            sentence = self._sentences[at % len(self._sentences)]
            drawn.append(sentence)
            left, at = left - len(sentence), at + 1
        if left < 0:
            drawn = _last(drawn, length)
        return drawn

    def hide(
        self,
        *,
        length: int,
        facts: Sequence[str],
        places: Sequence[float | None],
        needed: int,
        question: str,
        answers: Sequence[str],
        chance: float,
        generator: random.Random,
        task: str,
    ) -> Sample:
        """Put facts between sentences, and the question and its answers after.

        Args:
            length: Tokens of the sample.
            facts: Sentences, each a fact.
            places: Where each stands in the prose, from 0 to 1; None draws it. Facts whose places
                are all None keep their order.
            needed: Index of the earliest fact that the answers need.
            question: Text before the first answer.
            answers: Answers in the order in which they are asked for, separated by commas.
            chance: Accuracy of guessing.
            generator: Source of random numbers.
            task: Name of the task in messages.

        Raises:
            ValueError: If the length is too short for the facts and the question.
        """
        bos = self.tokenizer.bos_token_id
        start = [bos] if isinstance(bos, int) else []
        fact_ids = [self.encode(" " + fact) for fact in facts]
        tail, spans = self._question(question, answers)
        room = length - len(start) - len(tail) - sum(map(len, fact_ids))
        if room < 0:
            must("length", f"be at least {length - room} for the task {task}", length)
        drawn = [generator.random() for _ in facts]
        if all(place is None for place in places):
            drawn.sort()
        chosen = [a if b is None else b for a, b in zip(drawn, places, strict=True)]
        prose = self.prose(room, generator)
        ids, ends = _merge(prose, fact_ids, chosen)
        offset = len(start) + len(ids)
        return Sample(
            start + ids + tail,
            [(offset + first, offset + stop) for first, stop in spans],
            offset + spans[0][0] - (len(start) + ends[needed]),
            chance,
        )

    def _question(
        self, question: str, answers: Sequence[str]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of question and answers, and the bounds of the answers in them."""
        text, ids, spans = " " + question, [], []
        for i, answer in enumerate(answers):
            text += "," if i else ""
            before, text = self.encode(text), f"{text} {answer}"
            ids = self.encode(text)
            # an answer begins where the text with it differs from the one without it
            same = (a == b for a, b in zip(before, ids, strict=False))
            first = next((at for at, equal in enumerate(same) if not equal), len(before))
            spans.append((first, len(ids)))
        return ids, spans


def _last(sentences: list[list[int]], length: int) -> list[list[int]]:
    """The last ``length`` tokens of the sentences."""
    kept: list[list[int]] = []
    for sentence in reversed(sentences):
        kept.insert(0, sentence[max(0, len(sentence) - length) :])
        length -= len(kept[0])
        if length == 0:
            break
    return kept


def _merge(
    prose: list[list[int]], facts: list[list[int]], places: list[float]
) -> tuple[list[int], list[int]]:
    """Facts between sentences, nearest to their places; and where each of them ends."""
    total = sum(map(len, prose))
    starts = [0]
    for sentence in prose:
        starts.append(starts[-1] + len(sentence))
    # the gap before a sentence that is nearest to the place; facts of one gap keep their order
    gaps = [_nearest(starts, place * total) for place in places]
    order = sorted(range(len(facts)), key=lambda i: (gaps[i], i))
    ids: list[int] = []
    ends, at = [0] * len(facts), 0
    for i in order:
        for sentence in prose[at : gaps[i]]:
            ids += sentence
        at = max(at, gaps[i])
        ids += facts[i]
        ends[i] = len(ids)
    for sentence in prose[at:]:
        ids += sentence
    return ids, ends


def _nearest(starts: list[int], place: float) -> int:
    """Index of the start that is nearest to a place."""
    right = min(bisect_left(starts, place), len(starts) - 1)
    left = max(right - 1, 0)
    return left if place - starts[left] <= starts[right] - place else right
