"""Synthetic tasks: each sample is solved again from its text alone, by other means."""

import random
import re
from collections import Counter

import pytest

from memattn.data import WholeBatches, load_tokenizer
from memattn.data.tasks import (
    NEEDLES,
    STORIES,
    CommonWords,
    Facts,
    Haystack,
    MultiQueryRecall,
    Needle,
    VariableTracking,
    draw_sample,
    task_tokens,
)

PROSE = ["It was a cold day. Nobody came by! Was it the wind? It was, they said. So it stayed." * 3]


@pytest.fixture(scope="module")
def bytes_tokenizer():
    return load_tokenizer("bytes")


@pytest.fixture(scope="module")
def noise(bytes_tokenizer):
    return Haystack(bytes_tokenizer)


@pytest.fixture(scope="module")
def prose(bytes_tokenizer):
    return Haystack(bytes_tokenizer, PROSE)


def read(haystack, sample):
    """The text before the answers, and the answers."""
    decode = haystack.tokenizer.decode
    answers = [decode(sample.ids[first:stop]).strip() for first, stop in sample.answers]
    return decode(sample.ids[: sample.answers[0][0]]), answers


def solve_facts(text, question):
    """Where all people and things are, read sentence by sentence."""
    place, holder = {}, {}
    for sentence in re.split(r"(?<=[.?])\s+", text):
        if moved := re.search(r"(\w+) went to the (\w+)\.", sentence):
            place[moved[1]] = moved[2]
        elif took := re.search(r"(\w+) took the (\w+)\.", sentence):
            assert took[2] not in holder
            holder[took[2]] = took[1]
        elif put := re.search(r"(\w+) put down the (\w+)\.", sentence):
            assert holder.pop(put[2]) == put[1]
    if where := re.search(r"Where is (the )?(\w+)\?", question):
        return place[holder[where[2]] if where[1] else where[2]]
    if yes := re.search(r"Is (\w+) in the (\w+)\?", question):
        return "yes" if place[yes[1]] == yes[2] else "no"
    person = re.search(r"How many things does (\w+) carry", question)[1]
    return ["zero", "one", "two", "three", "four", "five"][list(holder.values()).count(person)]


@pytest.mark.parametrize("depth", [None, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("needle", NEEDLES)
def test_needles_stand_at_their_depth_and_answer_the_question(noise, prose, needle, depth):
    for haystack, length in ((noise, 1011), (prose, 1100)):
        for sizes in (
            ({},) if needle == "passkey" else ({}, dict(num_keys=3, num_values=2, num_queries=2))
        ):
            task = Needle(haystack=haystack, needle=needle, **sizes)
            sample = draw_sample(task, length, depth, 0, 3)
            assert len(sample.ids) == length
            text, answers = read(haystack, sample)
            body = text[: text.index("What ")]
            pairs = re.findall(r"One of the special \w+ for (\w+) is ([\w-]+)\.", body)
            pairs += [("", value) for value in re.findall(r"The pass key is (\d+)\.", body)]
            asked = re.search(r"for ([\w ]+)\?", text)
            keys = asked[1].split(" and ") if asked else [""]
            assert answers == [value for key, value in pairs if key in keys]
            assert len(pairs) == task.num_keys * task.num_values
            end = min(body.index(answers[0]), len(body)) + len(answers[0])
            rest = 12 if needle == "passkey" else 0  # "Remember it." belongs to the fact
            assert abs(len(text) - end - rest - sample.distance) <= 3
            if depth is not None and not sizes:
                start = body.rindex(". ", 0, body.index(answers[0]) - 2) if depth else 0
                assert abs(start / len(body) - depth) < 0.2


def test_variables_are_followed(noise):
    for i in range(5):
        task = VariableTracking(haystack=noise, num_chains=3, num_hops=2)
        sample = draw_sample(task, 900, None, 0, i)
        text, answers = read(noise, sample)
        value, order = {}, []
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text):
            value[name] = value.get(source, source)
            order.append(name)
        number = re.search(r"the value (\d+)", text)[1]
        assert answers == [name for name in order if value[name] == number]
        assert len(answers) == 3 and sample.chance == 1 / 9


def test_common_words_are_counted(noise):
    task = CommonWords(haystack=noise, num_words=3, frequency=5, other_frequency=2)
    sample = draw_sample(task, 900, None, 0, 0)
    text, answers = read(noise, sample)
    listed = text[text.index("The list:") + 9 : text.index(" . Which")].split()
    counts = Counter(listed)
    common = [word for word in dict.fromkeys(listed) if counts[word] == 5]
    assert answers == common and set(counts.values()) == {5, 2}
    # the list fills the text, but for less than another word would need
    assert len(sample.ids) == 900 and text.index("The list:") < 40


@pytest.mark.parametrize("story", STORIES)
def test_stories_are_true(noise, story):
    distances = set()
    for i in range(20):
        sample = draw_sample(Facts(haystack=noise, story=story), 700, None, 1, i)
        text, answers = read(noise, sample)
        question = re.search(r"(Where|Is|How many) [^?.]*\?", text)[0]
        assert answers == [solve_facts(text, question)]
        distances.add(sample.distance)
    assert len(distances) > 10


def test_recalled_values_are_those_of_their_keys():
    task = MultiQueryRecall(vocab_size=90, num_pairs=6, first_token=3, power=0.01)
    for length in (24, 61):
        sample = draw_sample(task, length, None, 0, 0)
        known = dict(zip(sample.ids[:12:2], sample.ids[1:12:2], strict=True))
        assert len(sample.ids) == length and len(sample.answers) == 6
        for first, stop in sample.answers:
            assert stop == first + 1 and known.pop(sample.ids[first - 1]) == sample.ids[first]
        assert min(sample.ids) >= 3 and max(sample.ids) < 93
    far = MultiQueryRecall(vocab_size=90, num_pairs=6)
    near, even = (
        sum(draw_sample(t, 400, None, 0, i).distance for i in range(20)) for t in (task, far)
    )
    assert near < even


def test_samples_depend_on_seed_and_index_alone(noise):
    task = Needle(haystack=noise)
    assert draw_sample(task, 300, None, 0, 5) == draw_sample(task, 300, None, 0, 5)
    drawn = {tuple(draw_sample(task, 300, None, seed, i).ids) for seed in (0, 1) for i in (0, 1)}
    assert len(drawn) == 4


def test_prose_has_the_length_that_is_asked_for(prose):
    for length in (0, 1, 7, prose.num_tokens - 1, 3 * prose.num_tokens + 2):
        assert sum(map(len, prose.prose(length, random.Random(length)))) == length


def test_tasks_are_corpora_whose_answers_count():
    task = MultiQueryRecall(vocab_size=30, num_pairs=2)
    tokens = task_tokens(task, [8, 16], samples=6)
    assert tokens.bounds.diff().tolist() == [8, 16] * 3 and tokens.trained.sum() == 12
    batch = next(WholeBatches(tokens, batch_size=1, seq_len=72))
    assert batch["input_ids"].shape == (1, 72) and (batch["labels"] != -100).sum() == 12


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda h: Needle(haystack=h, needle="pin"), "needle must be one of passkey"),
        (lambda h: Needle(haystack=h, num_keys=2), "num_keys and num_values must be 1"),
        (lambda h: Needle(haystack=h, needle="word", num_keys=80), "num_keys must be at most 63"),
        (
            lambda h: Needle(haystack=h, needle="word", num_keys=40),
            "must be at most 63 words, got 80",
        ),
        (lambda h: Needle(haystack=h, needle="uuid", num_queries=2), "num_queries must be at most"),
        (lambda h: Facts(haystack=h, story="qa1"), "story must be one of one_fact"),
        (lambda h: CommonWords(haystack=h, frequency=3), "frequency must be above other_freq"),
        (lambda h: VariableTracking(haystack=h, num_chains=400), "must be at most 676 variables"),
        (lambda h: MultiQueryRecall(vocab_size=20), "vocab_size must be at least 24"),
        (lambda h: MultiQueryRecall(vocab_size=30, power=0.0), "power must be above 0"),
        (lambda h: Haystack(h.tokenizer, [""]), "texts must have at least one sentence"),
        (
            lambda h: draw_sample(Needle(haystack=h), 40, None, 0, 0),
            r"length must be at least \d+ for",
        ),
        (lambda h: draw_sample(Needle(haystack=h), 400, 1.5, 0, 0), "depth must be between 0"),
        (lambda h: draw_sample(Facts(haystack=h), 900, 0.5, 0, 0), "depth must be None for the"),
        (lambda h: task_tokens(Needle(haystack=h), [], 3), "lengths must not be empty"),
    ],
)
def test_bad_input(noise, make, message):
    with pytest.raises(ValueError, match=message):
        make(noise)
