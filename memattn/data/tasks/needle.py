"""A needle in a haystack: one fact in a long text, and a question for it."""

import random
import uuid
from dataclasses import dataclass
from typing import ClassVar

from memattn.checks import check_int, must
from memattn.data.tasks.base import Sample
from memattn.data.tasks.haystack import Haystack

NEEDLES = ("passkey", "number", "uuid", "word")
KEYS = (
    *("apple", "anchor", "basket", "bridge", "candle", "castle", "cotton", "desert", "dragon"),
    *("engine", "feather", "forest", "garden", "guitar", "hammer", "harbour", "island", "jacket"),
    *("kettle", "ladder", "lantern", "marble", "meadow", "mirror", "needle", "orange", "painter"),
    *("pepper", "piano", "pillow", "pocket", "quarry", "rabbit", "ribbon", "river", "saddle"),
    *("shadow", "silver", "spider", "spoon", "stable", "summer", "temple", "thunder", "tiger"),
    *("tunnel", "turtle", "valley", "velvet", "village", "violin", "wagon", "walnut", "window"),
    *("winter", "wizard", "yellow", "zebra", "barrel", "button", "cabin", "carpet", "circle"),
)
_SPACE = {"passkey": 10**5 - 10**4, "number": 10**7 - 10**6, "uuid": 2**122, "word": len(KEYS)}


@dataclass(frozen=True, kw_only=True)
class Needle:
    """Find what a key stands for, in a long text.

    The single needles of NVIDIA/RULER and of the pass-key task are ``num_keys=1`` in noise
    (``passkey``, ``number``) and in prose (``uuid``); more keys, values and queries are its
    multi-key, multi-value and multi-query needles. Answers are asked for in the order of the text.

    Args:
        haystack: The text around.
        needle: What the value is: ``"passkey"``, five digits without a key; ``"number"``, seven
            digits; ``"uuid"``; ``"word"``.
        num_keys: Keys with values of their own in the text.
        num_values: Values of each key.
        num_queries: Keys that are asked for.

    Raises:
        ValueError: If a number is out of range, or a passkey is asked for with more than one key.
    """

    haystack: Haystack
    needle: str = "passkey"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1
    has_depth: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.needle not in NEEDLES:
            must("needle", f"be one of {', '.join(NEEDLES)}", self.needle)
        for name in ("num_keys", "num_values", "num_queries"):
            check_int(name, getattr(self, name), 1)
        if self.needle == "passkey" and (self.num_keys, self.num_values) != (1, 1):
            got = f"{self.num_keys} and {self.num_values}"
            must("num_keys and num_values", "be 1 for the needle passkey", got)
        if self.num_keys > len(KEYS):
            must("num_keys", f"be at most {len(KEYS)}", self.num_keys)
        if self.num_queries > self.num_keys:
            must("num_queries", f"be at most num_keys={self.num_keys}", self.num_queries)
        words = self.num_keys * (self.num_values + 1)
        if self.needle == "word" and words > len(KEYS):
            must("num_keys * (num_values + 1)", f"be at most {len(KEYS)} words", words)

    @property
    def name(self) -> str:
        kind = f"needle ({self.needle})"
        for what in ("keys", "values", "queries"):
            if (n := getattr(self, f"num_{what}")) > 1:
                kind += f", {n} {what}"
        return kind

    @property
    def _chance(self) -> float:
        """One over the values in the text, or over all values there are where it has only one."""
        in_text = self.num_keys * self.num_values
        return 1.0 / (in_text if in_text > 1 else _SPACE[self.needle])

    def draw(self, length: int, depth: float | None, generator: random.Random) -> Sample:
        keys = generator.sample(KEYS, self.num_keys)
        values = self._values(keys, generator)
        asked = keys[: self.num_queries]
        facts, owners = [], []
        for i, value in enumerate(values):
            key = keys[i // self.num_values]
            owners.append(key)
            facts.append(
                f"The pass key is {value}. Remember it."
                if self.needle == "passkey"
                else f"One of the special {self._plural} for {key} is {value}."
            )
        places = self._places(owners, asked, depth, generator)
        answers = [value for value, owner in zip(values, owners, strict=True) if owner in asked]
        first = next(
            i for i in sorted(range(len(facts)), key=places.__getitem__) if owners[i] in asked
        )
        return self.haystack.hide(
            length=length,
            facts=facts,
            places=places,
            needed=first,
            question=self._question(asked),
            answers=answers,
            chance=self._chance,
            generator=generator,
            task=self.name,
        )

    @staticmethod
    def _places(
        owners: list[str], asked: list[str], depth: float | None, generator: random.Random
    ) -> list[float]:
        """Where each fact stands: those of a key that is asked for at the depth, in their order."""
        places = [generator.random() for _ in owners]
        if depth is not None:
            return [depth if a in asked else b for a, b in zip(owners, places, strict=True)]
        # among themselves they keep the order in which they are asked for
        mine = [i for i, owner in enumerate(owners) if owner in asked]
        for i, place in zip(mine, sorted(places[i] for i in mine), strict=True):
            places[i] = place
        return places

    @property
    def _plural(self) -> str:
        return {"number": "numbers", "uuid": "identifiers", "word": "words"}[self.needle]

    def _question(self, asked: list[str]) -> str:
        if self.needle == "passkey":
            return "What is the pass key? The pass key is"
        names = " and ".join(asked)
        verb = "are" if self.num_values * self.num_queries > 1 else "is"
        what = self._plural if verb == "are" else self._plural.removesuffix("s")
        return f"What {verb} the special {what} for {names}? The special {what} for {names} {verb}"

    def _values(self, keys: list[str], generator: random.Random) -> list[str]:
        """Distinct values, those of a key after each other."""
        n = self.num_keys * self.num_values
        if self.needle == "word":
            return generator.sample([word for word in KEYS if word not in keys], n)
        drawn: dict[str, None] = {}
        while len(drawn) < n:
            if self.needle == "uuid":
                value = str(uuid.UUID(int=generator.getrandbits(128), version=4))
            else:
                digits = 5 if self.needle == "passkey" else 7
                value = str(generator.randrange(10 ** (digits - 1), 10**digits))
            drawn[value] = None
        return list(drawn)
