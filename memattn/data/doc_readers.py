"""Readers of documentation in source packages: text of reStructuredText and Markdown, and SQL."""

import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from memattn.data.document import Document

_MIN_CHARACTERS = 300  # shorter pages are lists of links


def read_documentation(folder: str, leave_out: str = "") -> Callable[[Path], Iterator[Document]]:
    """A reader of the pages in a folder of a source package, markup stripped.

    Args:
        folder: The folder within the package, such as ``"doc/src"``.
        leave_out: Regular expression of paths within it that are no text, such as changelogs.
    """

    def read(archive: Path) -> Iterator[Document]:
        pattern = re.compile(rf"[^/]+/{folder}/(.+\.(?:rst|md))")
        for path, text in _files(archive, pattern):
            if leave_out and re.search(leave_out, path):
                continue
            stripped = strip_markup(text)
            if len(stripped) >= _MIN_CHARACTERS:
                yield Document(title=path, text=stripped)

    return read


def read_sql(archive: Path) -> Iterator[Document]:
    """Queries of TPC-DS and TPC-H, each as written and as an optimizer rewrites it."""
    pattern = re.compile(r"[^/]+/tests/fixtures/optimizer/(tpc-.*\.sql)")
    for _, text in _files(archive, pattern):
        for query in re.split(r"^-+\n(?=-- TPC)", text, flags=re.M):
            name, _, statements = query.partition("\n")
            # lines that steer the tests of the package are none of its SQL
            statements = re.sub(r"^(?:#.*|-+)\n", "", statements, flags=re.M).strip()
            if statements:
                yield Document(title=name.strip("- "), text=statements)


def strip_markup(text: str) -> str:
    """Plain text of reStructuredText or Markdown: prose and code, without targets and roles."""
    text = text.replace("\r\n", "\n")
    # directives with their fields: `.. note::` goes, its text stays
    text = re.sub(r"^ *\.\. [^\n]*\n(?: +:[^\n]*\n)*", "", text, flags=re.M)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"^ *(?:```|~~~|:::)[^\n]*\n", "", text, flags=re.M)
    text = re.sub(r"^([=\-~^\"'`#*+.:_])\1{2,}\n", "", text, flags=re.M)  # lines under headings
    text = re.sub(r"\{(?:printsql|execsql|stop|sql|opensql)\}", "", text)
    # :role:`text <target>`, `text <target>`_ and ``code``
    text = re.sub(r"(?::[\w+.-]+)*:?`([^`<>]+?)\s*<[^`>]*>`_{0,2}", r"\1", text)
    text = re.sub(r"(?::[\w+.-]+)+:`[~!]?([^`]+)`", r"\1", text)
    text = re.sub(r"\{[\w:]+\}`([^`<]+?)(?:\s*<[^`]*>)?`", r"\1", text)
    text = re.sub(r"!?\[([^\[\]]*)\]\([^()\s]*\)", r"\1", text)  # Markdown: [text](address)
    text = re.sub(r"`{1,2}([^`\n]+)`{1,2}_{0,2}", r"\1", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _files(archive: Path, pattern: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """Path and text of the files of a source package whose whole path matches, by path."""
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            if (match := pattern.fullmatch(member.name)) and member.isfile():
                file = tar.extractfile(member)
                assert file is not None
                yield match.group(1), file.read().decode("utf-8", "replace")
