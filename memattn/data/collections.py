"""Collections of corpora under one name: a general one, and one for each specialty."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from memattn.data.corpora import fetch_corpus, get_corpus
from memattn.data.document import Document
from memattn.data.packages import DEFAULT_CACHE_DIR

PAGE = 4000  # characters of a page, at least; the last one of a corpus is shorter


class Share(NamedTuple):
    """What a collection takes of a corpus."""

    corpus: str
    every: int = 1  # only each n-th document, in the corpus's order
    pages: bool = False  # whether short entries are joined into pages, which are then documents


@dataclass(frozen=True, kw_only=True)
class Collection:
    """Corpora that are read together.

    Attributes:
        name: Its name, for use wherever a corpus is named.
        description: One line on what it is.
        shares: What it takes of which corpora.
    """

    name: str
    description: str
    shares: tuple[Share, ...]


def _registry(*collections: Collection) -> dict[str, Collection]:
    return {collection.name: collection for collection in collections}


COLLECTIONS: dict[str, Collection] = _registry(
    Collection(
        name="general",
        description="dictionary, thesauri and encyclopedia, about 6 MB of each",
        # only parts of the large ones; with all of them Wikipedia would be a twelfth of the text
        shares=(
            Share("gcide", every=3, pages=True),
            Share("wordnet", every=2, pages=True),
            Share("moby-thesaurus", every=5, pages=True),
            Share("wiki"),
            Share("enwiki-sample"),
        ),
    ),
    Collection(
        name="data-engineering",
        description="SQL, databases and parallel data frames",
        shares=(Share("sqlalchemy-docs"), Share("dask-docs"), Share("tpc-queries")),
    ),
    Collection(
        name="mathematics",
        description="mathematics by computer",
        shares=(Share("sympy-docs"),),
    ),
    Collection(
        name="literature",
        description="a novel",
        shares=(Share("moby-dick"),),
    ),
    Collection(
        name="politics",
        description="addresses of presidents",
        shares=(Share("sotu"),),
    ),
)


def read_collection(name: str, *, cache_dir: str | Path = DEFAULT_CACHE_DIR) -> Iterator[Document]:
    """Yield the documents of a collection, corpus by corpus.

    Args:
        name: A name in ``COLLECTIONS``.
        cache_dir: Folder that keeps archives; ``~`` is expanded.

    Raises:
        ValueError, FileNotFoundError, ConnectionError, OSError: What ``fetch_corpus`` raises.
    """
    for corpus, every, pages in COLLECTIONS[name].shares:
        archive = fetch_corpus(corpus, cache_dir=cache_dir)
        taken = islice(get_corpus(corpus).read(archive), 0, None, every)
        yield from _join(taken) if pages else taken


def _join(entries: Iterable[Document]) -> Iterator[Document]:
    """Pages of entries that follow each other, each with the title of its first one."""
    page: list[Document] = []
    for entry in entries:
        page.append(entry)
        if sum(len(entry.text) for entry in page) >= PAGE:
            yield _page(page)
            page = []
    if page:
        yield _page(page)


def _page(entries: list[Document]) -> Document:
    return Document(entries[0].title, "\n\n".join(entry.text for entry in entries))
