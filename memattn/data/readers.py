"""Readers of the corpora's archives: each yields the documents of one format."""

import bz2
import gzip
import html
import io
import json
import re
import string
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from memattn.data.document import Document

_MIN_WORDS = 50  # shorter Wikipedia articles are stubs and lists


def read_wiki(archive: Path) -> Iterator[Document]:
    """Articles in ``<doc id url title>`` marks, stubs left out."""
    with zipfile.ZipFile(archive) as wheel:
        raw = wheel.read("exllamav2/conversion/standard_cal_data/wiki.utf8").decode("utf-8")
    raw = raw.replace("\r\n", "\n")
    article = r'<doc id="\d+" url="[^"]*" title="([^"]*)">\n(.*?)\n</doc>'
    for match in re.finditer(article, raw, re.S):
        title, text = match.groups()
        if len(text.split()) >= _MIN_WORDS:
            yield Document(title=html.unescape(title), text=text.strip())


def read_enwiki_sample(archive: Path) -> Iterator[Document]:
    """Articles of a MediaWiki dump, markup stripped."""
    with zipfile.ZipFile(archive) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith("-shortened.bz2"))
        raw = bz2.decompress(wheel.read(name)).decode("utf-8")
    for page in re.findall(r"<page>(.*?)</page>", raw, re.S):
        title = re.search(r"<title>(.*?)</title>", page)
        text = re.search(r"<text[^>]*>(.*?)</text>", page, re.S)
        if title is None or text is None:
            continue
        source = html.unescape(text.group(1))
        if source.lstrip().lower().startswith("#redirect"):
            continue
        stripped = strip_wiki_markup(source)
        if len(stripped.split()) >= _MIN_WORDS:
            yield Document(title=html.unescape(title.group(1)), text=stripped)


def strip_wiki_markup(text: str) -> str:
    """Plain text of MediaWiki source: no templates, tables, references, files or tags."""
    text = re.sub(r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>", "", text, flags=re.S)
    for _ in range(6):  # templates nest
        text = re.sub(r"\{\{[^{}]*\}\}", "", text)
    text = re.sub(r"\{\|.*?\|\}", "", text, flags=re.S)
    special = r"(?:File|Image|Category|[a-z\-]{2,12}):"
    for _ in range(3):  # captions of files have links: the innermost ones first
        text = re.sub(rf"\[\[{special}[^\[\]]*\]\]", "", text)
        text = re.sub(rf"\[\[(?!{special})(?:[^|\[\]]*\|)?([^\[\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"<[^>]+>", "", re.sub(r"'{2,}", "", text))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def read_sotu(archive: Path) -> Iterator[Document]:
    """Addresses, one JSON file each."""
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            if re.fullmatch(r"package/data/\d{4}_.*\.json", member.name):
                file = tar.extractfile(member)
                assert file is not None
                speech = json.load(file)
                title = f"{speech['name']}, {Path(member.name).stem}"
                yield Document(title=title, text=speech["text"].strip())


def read_dictd(archive: Path) -> Iterator[Document]:
    """Entries of the one dictd dictionary in a Debian package."""
    with tarfile.open(fileobj=io.BytesIO(_deb_data(archive))) as tar:
        members = {Path(member.name).suffix: member for member in tar.getmembers()}
        index, data = (tar.extractfile(members[suffix]) for suffix in (".index", ".dz"))
        assert index is not None and data is not None
        lines = index.read().decode("utf-8", "replace").splitlines()
        text = gzip.decompress(data.read())
    seen = set()
    for line in lines:
        word, *place = line.split("\t")[:3]
        start, size = map(_dictd_number, place)
        if word.startswith("00") or (start, size) in seen:  # 00...: facts on the dictionary
            continue
        seen.add((start, size))
        entry = text[start : start + size].decode("utf-8", "replace").strip()
        # several entries may share a headword, which is then no name of a document
        yield Document(title=f"{word} #{start}", text=entry)


_DICTD_DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"


def _dictd_number(digits: str) -> int:
    """A number in the base 64 of dictd's index."""
    number = 0
    for digit in digits:
        number = number * 64 + _DICTD_DIGITS.index(digit)
    return number


def _deb_data(archive: Path) -> bytes:
    """The compressed ``data.tar`` of a Debian package, which is an ``ar`` archive."""
    raw, at = archive.read_bytes(), 8
    while at < len(raw):
        name, size = raw[at : at + 16].strip(), int(raw[at + 48 : at + 58])
        if name.startswith(b"data.tar"):
            return raw[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise ValueError(f"archive must be a Debian package with data, got {archive}")
