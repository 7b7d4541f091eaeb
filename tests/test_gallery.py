"""The gallery: a picture of each system, by one command."""

import re
from pathlib import Path

import pytest

from memattn.cli import main
from memattn.gallery import DTGMA, PICTURES, neighbours
from memattn.models import PRESETS

ROOT = Path(__file__).parents[1]


def test_a_picture_of_each_system_is_drawn(tmp_path, capsys, monkeypatch):
    text = " ".join(f"the {word} of the sea" for word in map(str, range(400)))
    (tmp_path / "text.txt").write_text(text)
    monkeypatch.setattr("memattn.gallery.TOKENS", 40)
    command = ["gallery", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]
    options = ["--steps", "1", "--epochs", "1", "--cache_dir", str(tmp_path / "cache")]
    assert main([*command, *options]) == 0
    written = re.findall(r"wrote (.*)", capsys.readouterr().out)
    assert written == [str(tmp_path / "out" / f"{name}.png") for name in (*PICTURES, DTGMA)]
    assert all(Path(path).stat().st_size > 5_000 for path in written)


def test_the_page_shows_every_system_in_a_megabyte():
    page = (ROOT / "docs" / "gallery.md").read_text()
    shown = re.findall(r"\]\(gallery/(.*)\.png\)", page)
    assert shown == [*PICTURES, DTGMA] and PICTURES.keys() == PRESETS.keys()
    sizes = [(ROOT / "docs" / "gallery" / f"{name}.png").stat().st_size for name in shown]
    assert sum(sizes) < 1_000_000


def test_neighbours_of_a_patch():
    mask = neighbours(3)
    assert mask[4].nonzero().flatten().tolist() == [1, 3, 4, 5, 7]  # the middle of nine
    assert mask[0].nonzero().flatten().tolist() == [0, 1, 3]
    assert mask[9].all() and not mask[:9, 9].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "steps must be at least 1, got 0"),
        ([], "source must be a file or folder"),
    ],
)
def test_bad_arguments_are_told(options, message, tmp_path, capsys):
    assert main(["gallery", str(tmp_path / "none.txt"), "--out", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err
