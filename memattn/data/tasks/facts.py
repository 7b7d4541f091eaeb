"""Facts about people, places and things, and questions that need some of them together."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from memattn.checks import check_int, must
from memattn.data.tasks.base import Sample
from memattn.data.tasks.haystack import Haystack

PEOPLE = ("Mary", "John", "Daniel", "Sandra", "Emma", "Peter")
PLACES = ("kitchen", "garden", "office", "bathroom", "hallway", "bedroom")
THINGS = ("ball", "book", "lamp", "milk", "hat")


class _Story(NamedTuple):
    facts: list[str]
    needed: int  # the earliest fact that the answer needs
    question: str
    answer: str
    candidates: int  # answers that fit the question


class _World:
    """Where people and things are, and since which fact."""

    def __init__(self, generator: random.Random):
        self.generator = generator
        self.facts: list[str] = []
        self.place: dict[str, tuple[str, int]] = {}  # of people
        self.holder: dict[str, tuple[str, int]] = {}  # of things
        self.left: dict[str, str] = {}  # where things were put down

    def move(self) -> None:
        person = self.generator.choice(PEOPLE)
        here = self.place.get(person, ("", 0))[0]
        place = self.generator.choice([place for place in PLACES if place != here])
        self.facts.append(f"{person} went to the {place}.")
        self.place[person] = place, len(self.facts) - 1

    def handle(self) -> None:
        """Somebody whose place is known takes a thing, or puts down one; or else moves."""
        thing = self.generator.choice(THINGS)
        if thing in self.holder:
            person, _ = self.holder.pop(thing)
            self.facts.append(f"{person} put down the {thing}.")
            self.left[thing] = self.place[person][0]
            return
        here = self.left.get(thing)
        near = [p for p, (place, _) in self.place.items() if here in (None, place)]
        if not near:
            self.move()
            return
        person = self.generator.choice(near)
        self.facts.append(f"{person} took the {thing}.")
        self.holder[thing] = person, len(self.facts) - 1
        self.left.pop(thing, None)


def _moves(generator: random.Random, n: int) -> tuple[list[str], str, str, int]:
    """Facts about where people went; one of them, where that person is, and since which fact."""
    world = _World(generator)
    for _ in range(n):
        world.move()
    person = generator.choice(sorted(world.place))
    return world.facts, person, *world.place[person]


def _one_fact(generator: random.Random, n: int) -> _Story:
    facts, person, place, since = _moves(generator, n)
    question = f"Where is {person}? {person} is in the"
    return _Story(facts, since, question, place, len(PLACES))


def _two_facts(generator: random.Random, n: int) -> _Story:
    world = _World(generator)
    while len(world.facts) < n or not world.holder:
        (world.handle if world.place and generator.random() < 0.5 else world.move)()
    thing = generator.choice(sorted(world.holder))
    person, taken = world.holder[thing]
    place, moved = world.place[person]
    question = f"Where is the {thing}? The {thing} is in the"
    return _Story(world.facts, min(taken, moved), question, place, len(PLACES))


def _yes_no(generator: random.Random, n: int) -> _Story:
    facts, person, place, since = _moves(generator, n)
    asked, answer = place, "yes"
    if generator.random() < 0.5:
        asked, answer = generator.choice([p for p in PLACES if p != place]), "no"
    question = f"Is {person} in the {asked}? The answer is"
    return _Story(facts, since, question, answer, 2)


def _counting(generator: random.Random, n: int) -> _Story:
    world = _World(generator)
    while len(world.facts) < n or not world.holder:
        (world.handle if world.place and generator.random() < 0.7 else world.move)()
    person = generator.choice(sorted({person for person, _ in world.holder.values()}))
    since = [at for owner, at in world.holder.values() if owner == person]
    words = ("one", "two", "three", "four", "five")
    question = f"How many things does {person} carry? The answer is"
    return _Story(world.facts, min(since), question, words[len(since) - 1], len(THINGS))


_STORIES: dict[str, Callable[[random.Random, int], _Story]] = {
    "one_fact": _one_fact,
    "two_facts": _two_facts,
    "yes_no": _yes_no,
    "counting": _counting,
}
STORIES = tuple(_STORIES)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Answer a question about facts that are spread over a long text, in the order they happened.

    In the manner of BABILong, which hides the stories of bAbI in books: ``"one_fact"`` (its qa1)
    asks where a person is, ``"two_facts"`` (qa2) where a thing is that somebody carries,
    ``"yes_no"`` (qa6) whether a person is at a place, ``"counting"`` (qa7) how many things a
    person carries. The stories come from a generator of our own, so that numbers compare models
    with each other and not with published tables.

    Args:
        haystack: The text around.
        story: Which question.
        num_facts: Facts in the text, or a few more where the question needs them.

    Raises:
        ValueError: If the story is unknown or the number below 1.
    """

    haystack: Haystack
    story: str = "one_fact"
    num_facts: int = 8
    has_depth: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.story not in STORIES:
            must("story", f"be one of {', '.join(STORIES)}", self.story)
        check_int("num_facts", self.num_facts, 1)

    @property
    def name(self) -> str:
        return f"facts ({self.story}, {self.num_facts} in the text)"

    def draw(self, length: int, depth: float | None, generator: random.Random) -> Sample:
        story = _STORIES[self.story](generator, self.num_facts)
        return self.haystack.hide(
            length=length,
            facts=story.facts,
            places=[None] * len(story.facts),
            needed=story.needed,
            question=story.question,
            answers=[story.answer],
            chance=1.0 / story.candidates,
            generator=generator,
            task=self.name,
        )
