"""WikiText with its standard splits, from files or the Hugging Face hub, as whole articles."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from memattn.data.document import Document
from memattn.data.hub import load_hub_rows
from memattn.data.json_lines import read_utf8
from memattn.files import sha256_of, write_text

REPOSITORY = "Salesforce/wikitext"
SPLITS = {
    "train": ("wiki.train.tokens", "wiki.train.raw", "train.txt"),
    "validation": ("wiki.valid.tokens", "wiki.valid.raw", "valid.txt", "validation.txt"),
    "test": ("wiki.test.tokens", "wiki.test.raw", "test.txt"),
}
_HEADING = re.compile(r"= [^=].*[^=] =")


def find_wikitext(split: str, data_dir: str | Path | None, version: int = 103) -> Path | None:
    """The file of a split, in a folder or in its folder of the version; None where there is none.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        data_dir: The folder; None for none.
        version: 2 or 103.
    """
    if data_dir is None:
        return None
    folder, name = Path(data_dir).expanduser(), f"wikitext-{version}"
    folders = [folder, *(folder / f"{name}{end}" for end in ("", "-raw", "-v1", "-raw-v1"))]
    files = (at / file for at in folders for file in SPLITS[split])
    return next((file for file in files if file.is_file()), None)


def load_wikitext(
    split: str,
    *,
    data_dir: str | Path | None = None,
    version: int = 103,
    cache_dir: str | Path = "~/.cache/memattn",
) -> list[Document]:
    """The articles of a split of WikiText; see ``wikitext_file``.

    Raises:
        FileNotFoundError: If it is nowhere.
    """
    file = wikitext_file(split, data_dir=data_dir, version=version, cache_dir=cache_dir)
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [Document(row["title"], row["text"]) for row in rows]


def wikitext_file(
    split: str,
    *,
    data_dir: str | Path | None = None,
    version: int = 103,
    cache_dir: str | Path = "~/.cache/memattn",
) -> Path:
    """The articles of a split of WikiText as JSON Lines, for ``load_documents``.

    The lines that the data set consists of are put together: an article begins at its heading. They
    are looked for in ``data_dir``, in the cache folder, and on the Hugging Face hub or in its own
    cache, by ``datasets``.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        data_dir: Folder with the files of the data set, such as ``wiki.train.tokens`` or
            ``train.txt``, or with a folder ``wikitext-103`` of them.
        version: 2 or 103.
        cache_dir: Folder that keeps the articles.

    Returns:
        A file in the cache folder.

    Raises:
        FileNotFoundError: If it is nowhere; names where it was looked for.
    """
    kept = Path(cache_dir).expanduser() / "wikitext"
    source = find_wikitext(split, data_dir, version)
    if source is not None:
        articles = kept / f"{sha256_of(source)[:32]}.jsonl"
        if not articles.is_file():
            _write(articles, read_utf8(source).removesuffix("\n").split("\n"))
        return articles
    articles = kept / f"{version}-{split}.jsonl"
    if not articles.is_file():
        try:
            rows = load_hub_rows(REPOSITORY, f"wikitext-{version}-raw-v1", split)
        except (ImportError, ValueError, OSError) as error:
            raise FileNotFoundError(
                f"dataset wikitext must be in a folder ({SPLITS[split][0]}, got no such file in "
                f"{data_dir}) or on a Hugging Face hub: {' '.join(str(error).split())}"
            ) from error
        _write(articles, (row["text"] for row in rows))
    return articles


def split_articles(lines: Iterable[str]) -> Iterator[Document]:
    """Articles of the lines of the data set; titles are unique, since articles may share one."""
    seen: set[str] = set()
    title, text, blank = "", [], True
    for line in lines:
        bare = line.strip()
        if blank and _HEADING.fullmatch(bare):
            if "".join(text).strip():
                yield Document(_unique(title, text, seen), "".join(text))
            title, text = bare[2:-2], []
        text.append(line.removesuffix("\n") + "\n")
        blank = not bare
    if "".join(text).strip():
        yield Document(_unique(title, text, seen), "".join(text))


def _unique(title: str, text: list[str], seen: set[str]) -> str:
    """The title; with a mark where another article has it: many names are <unk>."""
    if title in seen:
        title = f"{title} ({hashlib.sha256(''.join(text).encode()).hexdigest()[:8]})"
    seen.add(title)
    return title


def _write(path: Path, lines: Iterable[str]) -> None:
    """Write the articles, in one step."""
    rows = (json.dumps(article._asdict()) for article in split_articles(lines))
    write_text(path, "\n".join(rows) + "\n")
