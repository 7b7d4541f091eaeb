"""Readers of dictionaries and thesauri: each entry is a document."""

import json
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memattn.data.document import Document

_PARTS_OF_SPEECH = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}


def read_gcide(archive: Path) -> Iterator[Document]:
    """Entries of the GNU Collaborative International Dictionary of English, one JSON a letter."""
    with zipfile.ZipFile(archive) as wheel:
        for name in sorted(wheel.namelist()):
            if re.fullmatch(r"dictionary/data/en/words_[A-Z]\.json", name):
                for word, entry in json.loads(wheel.read(name)).items():
                    lines = [_gcide_sense(sense) for sense in entry["pos"]]
                    text = "\n".join(line for line in lines if line)
                    if text:
                        yield Document(title=f"gcide {word}", text=f"{entry['entry']}\n{text}")


def _gcide_sense(sense: dict[str, Any]) -> str:
    """One part of speech, its definitions and their examples; "" without any."""
    definitions = [item for item in sense["definitions"] if item["text"].strip()]
    if not definitions:
        return ""
    # etymologies are cut short in this package, so they are left out
    lines = [sense["part_of_speech"]] if sense["part_of_speech"] else []
    for number, item in enumerate(definitions, 1):
        mark = f"{number}. " if len(definitions) > 1 else ""
        lines.append(f"{mark}{item['text'].strip()}")
        lines += [f"   {example.strip()}" for example in item["examples"] if example.strip()]
    return "\n".join(lines)


def read_wordnet(archive: Path) -> Iterator[Document]:
    """Sets of synonyms with their glosses."""
    with tarfile.open(archive) as tar:
        for kind in ("noun", "verb", "adj", "adv"):
            file = tar.extractfile(f"package/dict/data.{kind}")
            assert file is not None
            for line in file.read().decode("utf-8").splitlines():
                if line.startswith(" "):  # the licence
                    continue
                fields, _, gloss = line.partition(" | ")
                place, _, letter, count, *rest = fields.split(" ")
                words = [word.split("(")[0] for word in rest[: 2 * int(count, 16) : 2]]
                names = ", ".join(word.replace("_", " ") for word in words)
                text = f"{names} ({_PARTS_OF_SPEECH[letter]}): {gloss.strip()}"
                # several sets may share their words, which are then no name of a document
                yield Document(title=f"wordnet {kind} {place}", text=text)


def read_moby(archive: Path) -> Iterator[Document]:
    """Entries of the Moby thesaurus: a word, and words that are close to it."""
    with tarfile.open(archive) as tar:
        file = tar.extractfile("package/words.txt")
        assert file is not None
        for line in file.read().decode("utf-8", "replace").splitlines():
            word, _, near = line.partition(",")
            if near:
                yield Document(title=f"moby {word}", text=f"{word}: {near.replace(',', ', ')}.")


def read_moby_dick(archive: Path) -> Iterator[Document]:
    """Chapters of Melville's novel, one JSON file each."""
    with tarfile.open(archive) as tar:
        members = {}
        for member in tar.getmembers():
            if match := re.fullmatch(r"package/data/chapter_(\d+)\.json", member.name):
                members[int(match.group(1))] = member
        for number in sorted(members):
            file = tar.extractfile(members[number])
            assert file is not None
            chapter = json.load(file)
            title = f"Moby-Dick {number}. {chapter['title']}"
            yield Document(title=title, text=f"{chapter['title']}\n\n{chapter['text'].strip()}")
