"""The training and test texts of a comparison by the name of a dataset."""

from pathlib import Path
from typing import NamedTuple

from memattn.data.corpora import CORPORA
from memattn.data.wikitext import find_wikitext, wikitext_file


class ComparedText(NamedTuple):
    """Sources for ``load_documents``.

    Attributes:
        train: The text to train on, of which a part is held out.
        test: The text whose perplexity is reported; None means the held-out part.
        test_name: Name of the test text.
    """

    train: str
    test: str | None
    test_name: str


def find_text(
    dataset: str, *, data_dir: str | None, version: int, cache_dir: str | Path
) -> ComparedText:
    """The texts of a dataset.

    Args:
        dataset: ``wikitext``, whose standard test text is reported, or what ``load_documents``
            takes. Where ``data_dir`` has the test text of WikiText, it is reported with that, too.
        data_dir: Folder with files of WikiText; None for none.
        version: Version of WikiText, 2 or 103.
        cache_dir: Folder for fetched corpora.

    Raises:
        FileNotFoundError: If WikiText is asked for and is nowhere; names a dataset that is.
    """
    where = {"data_dir": data_dir, "version": version, "cache_dir": cache_dir}
    name = f"the standard test text of wikitext-{version}"
    if dataset != "wikitext":
        if find_wikitext("test", data_dir, version) is None:
            return ComparedText(dataset, None, "the documents that are held out")
        return ComparedText(dataset, str(wikitext_file("test", **where)), name)
    try:
        train, test = (str(wikitext_file(split, **where)) for split in ("train", "test"))
    except FileNotFoundError as error:
        small = next(iter(CORPORA))
        raise FileNotFoundError(f"{error}; --dataset {small} needs no hub") from error
    return ComparedText(train, test, name)
