"""Readers of corpora: documents out of archives as packages have them."""

import bz2
import gzip
import io
import json
import tarfile

import pytest
from corpus_factories import LONG, add, write_tar, write_wiki, write_zip

from memattn.data import (
    Document,
)
from memattn.data.dictionary_readers import (
    read_gcide,
    read_moby,
    read_moby_dick,
    read_wordnet,
)
from memattn.data.doc_readers import read_documentation, read_sql
from memattn.data.readers import read_dictd, read_enwiki_sample, read_sotu, read_wiki


def test_reads_wiki(tmp_path):
    assert list(read_wiki(write_wiki(tmp_path / "a.whl"))) == [Document("A & B", LONG)]


def test_reads_the_enwiki_sample(tmp_path):
    source = (
        "{{Infobox|{{nested}}}}'''Bold''' &lt;!-- no --&gt;[[Link|shown]] [[plain]]"
        "&lt;ref name=x&gt;gone&lt;/ref&gt; [http://x.org site] {| table |}"
        f"[[File:a.png|thumb|with [[link]]]]&lt;br&gt;\n\n\n\n{LONG}"
    )
    pages = [("A", source), ("B", "#REDIRECT [[A]]"), ("C", "short"), ("D", None)]
    raw = "".join(
        f"<page><title>{title}</title>"
        + (f'<text xml:space="preserve">{text}</text>' if text else "")
        + "</page>\n"
        for title, text in pages
    )
    name = "gensim/test/test_data/enwiki-shortened.bz2"
    archive = write_zip(tmp_path / "a.whl", name, bz2.compress(raw.encode()))
    assert list(read_enwiki_sample(archive)) == [Document("A", f"Bold shown plain site \n\n{LONG}")]


def test_reads_sotu(tmp_path):
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        for year in (1791, 1790):
            speech = {"name": "G. W.", "year": year, "text": f" {year} fellow citizens\n"}
            add(archive, f"package/data/{year}_g_w.json", json.dumps(speech).encode())
        add(archive, "package/package.json", b"{}")
    assert list(read_sotu(tmp_path / "a.tgz")) == [
        Document("G. W., 1790_g_w", "1790 fellow citizens"),
        Document("G. W., 1791_g_w", "1791 fellow citizens"),
    ]


def test_reads_a_dictionary(tmp_path):
    entries = b"about\n   about it\nhash\n   a table\n"
    index = "00-database-info\tA\tG\nhash\tS\tQ\ntable\tS\tQ\n"  # S: 18, Q: 16
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        add(archive, "./usr/share/dictd/foldoc.index", index.encode())
        add(archive, "./usr/share/dictd/foldoc.dict.dz", gzip.compress(entries))
    deb = b"!<arch>\n"
    for name, content in (("control.tar.xz", b"odd"), ("data.tar.xz", data.getvalue())):
        deb += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        deb += content + b"\n" * (len(content) % 2)
    (tmp_path / "a.deb").write_bytes(deb)
    assert list(read_dictd(tmp_path / "a.deb")) == [Document("hash #18", "hash\n   a table")]
    (tmp_path / "b.deb").write_bytes(deb[: deb.index(b"data.tar")])
    with pytest.raises(ValueError, match="archive must be a Debian package with data, got .*b.deb"):
        list(read_dictd(tmp_path / "b.deb"))


def test_reads_dictionaries_and_thesauri(tmp_path):
    senses = [
        {"text": "A fiber.", "examples": [" made of bast "]},
        {"text": "A rope.", "examples": []},
    ]
    pos = [
        {"part_of_speech": "n.", "etymology": "[AS. b]", "definitions": senses},
        {"part_of_speech": "v.", "etymology": "", "definitions": [{"text": "", "examples": []}]},
    ]
    entries = {"bast": {"entry": "bast", "pos": pos}, "empty": {"entry": "empty", "pos": pos[1:]}}
    letter = "dictionary/data/en/words_B.json"
    archive = write_zip(tmp_path / "a.whl", letter, json.dumps(entries).encode())
    text = "bast\nn.\n1. A fiber.\n   made of bast\n2. A rope."
    assert list(read_gcide(archive)) == [Document("gcide bast", text)]

    line = "03642182 06 {} 02 lamp_chimney 0 chimney(a) 1 001 @ 0337 n 0000 | a glass flue  \n"
    kinds = {"noun": "n", "verb": "v", "adj": "s", "adv": "r"}
    files = {
        f"package/dict/data.{kind}": "  1 licence\n" + line.format(kinds[kind]) for kind in kinds
    }
    words = [document.text for document in read_wordnet(write_tar(tmp_path / "b.tgz", files))]
    names = ("noun", "verb", "adjective", "adverb")
    assert words == [f"lamp chimney, chimney ({name}): a glass flue" for name in names]

    archive = write_tar(
        tmp_path / "c.tgz", {"package/words.txt": "mad,angry,a la mode\r\nlone\r\n"}
    )
    assert list(read_moby(archive)) == [Document("moby mad", "mad: angry, a la mode.")]

    files = {
        f"package/data/chapter_{n}.json": json.dumps({"title": f"T{n}.", "text": f" text {n}\n"})
        for n in (10, 9)
    }
    files["package/data/contents.json"] = "{}"
    assert list(read_moby_dick(write_tar(tmp_path / "d.tgz", files))) == [
        Document("Moby-Dick 9. T9.", "T9.\n\ntext 9"),
        Document("Moby-Dick 10. T10.", "T10.\n\ntext 10"),
    ]


def test_reads_documentation_without_its_markup(tmp_path):
    rst = """.. _target:

========
 Select
========

.. note::
   :class: wide

   See :func:`_sql.select`, :ref:`the guide <guide>`, `Python <https://x.org>`_ and ``NULL``.

Code::

    >>> print(a == b)
    {printsql}SELECT 1{stop}
"""
    md = (
        "<!-- hidden -->\n# Title\n\n```{note}\nSee [here](https://x.org) and {term}`table`.\n```\n"
    )
    files = {
        "p-1/docs/b.md": md + LONG * 2,
        "p-1/docs/a/a.rst": rst + LONG * 2,
        "p-1/docs/changelog.rst": rst + LONG * 2,
        "p-1/docs/short.rst": rst,
        "p-1/other/c.rst": rst + LONG * 2,
    }
    archive = write_tar(tmp_path / "p-1.tar.gz", files)
    first, second = read_documentation("docs", leave_out="^changelog")(archive)
    code = "Code::\n\n    >>> print(a == b)\n    SELECT 1\n"
    text = f" Select\n\n   See _sql.select, the guide, Python and NULL.\n\n{code}"
    assert first == Document("a/a.rst", (text + LONG * 2).strip())
    assert second == Document("b.md", f"# Title\n\nSee here and table.\n{LONG * 2}")


def test_reads_queries_with_their_rewritten_form(tmp_path):
    rule = "-" * 20
    sql = "".join(
        f"{rule}\n-- TPC-H {n}\n{rule}\n# execute: true\nSELECT {n};\nSELECT {n} AS a;\n\n"
        for n in (1, 2)
    )
    fixtures = "sqlglot-1/tests/fixtures"
    files = {f"{fixtures}/optimizer/tpc-h/tpc-h.sql": sql, f"{fixtures}/identity.sql": "SELECT 3;"}
    assert list(read_sql(write_tar(tmp_path / "a.tar.gz", files))) == [
        Document(f"TPC-H {n}", f"SELECT {n};\nSELECT {n} AS a;") for n in (1, 2)
    ]
