"""``memattn bench --all``: records, pages of several machines, and what it refuses."""

import json

import pytest
import torch
from bench_factories import QUICK, longer_window, plant, small

from memattn.bench import __main__, pages, run_all
from memattn.bench.bars import FlatTimeBar, RoofBar, SpeedBar
from memattn.bench.case import operators
from memattn.bench.segmented_attention import SegmentedCase

pytestmark = pytest.mark.usefixtures("one_thread")


def bars(cls, suite):
    case = small("window", T=32)
    return [
        SpeedBar(
            case=case, direction="forward", target=1e9, against=("naive",), limited_by="the sun."
        ),
        RoofBar(case=case, direction="forward", target=1e-9, limited_by="not said where met"),
        FlatTimeBar(case=case, direction="forward", target=1e9, lengths=(16, 32)),
    ]


@pytest.fixture
def quick(monkeypatch):
    """Small bars of one operator, and none of the others."""
    for cls in operators().values():
        own = bars if cls is SegmentedCase else lambda cls, suite: []
        monkeypatch.setattr(cls, "bars", classmethod(own))
    monkeypatch.setattr(run_all, "suite_timing_budget", lambda budget: QUICK)


def test_a_second_machine_stands_beside_the_first(quick, tmp_path, capsys, monkeypatch):
    assert __main__.main(["--all", "--device", "cpu", "--out", str(tmp_path)]) == 0
    (folder,) = (tmp_path / "machines").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "segmented_attention.json",
        "segmented_attention.png",
    }
    record = json.loads((folder / "segmented_attention.json").read_text())
    assert record["machine"]["versions"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert "MISSED" in printed and "bench.md" in printed

    first = (tmp_path / "bench.md").read_text()
    reached = record["bars"][0]["reached"]
    assert f"| >= 1e+09 x | {reached:.3g} **missed** |" in first
    assert f"Missed ({record['bars'][0]['bar']}): the sun." in first
    assert "not said where met" not in first
    assert record["machine"]["date"] in first and torch.__version__ in first
    ours = record["rows"][0]["seconds"]
    assert f"{1e3 * ours['median']:.3g} ms ({1e3 * ours['q20']:.3g}-" in first
    own = (tmp_path / f"bench-{folder.name}.md").read_text()
    assert f"machines/{folder.name}/segmented_attention.png" in own
    assert record["machine"]["date"] in own and "the best of 2 samples" in own

    # the same on another processor: what the first measured stays, letter by letter
    monkeypatch.setattr("memattn.bench.report._cpu_name", lambda: "Another CPU (R) 9")
    name = run_all.run_all(["segmented_attention"], device="cpu", out=tmp_path, budget=QUICK)
    assert name.startswith("another-cpu-r-9-")
    both = (tmp_path / "bench.md").read_text()
    heads = [line for line in both.splitlines() if line.startswith("| bar |")]
    columns = [cell.removesuffix(" |") for cell in heads[0].split(" | ")[2:]]
    assert len(heads) == 1 and columns == sorted([folder.name, name])
    assert f"{reached:.3g} **missed**" in both
    assert (tmp_path / f"bench-{folder.name}.md").read_text() == own


def test_a_page_says_where_the_machine_was_disturbed_and_what_was_not_measured():
    record = {
        "suite": "cpu-bars",
        "machine": {
            "date": "2020-01-01",
            "gpu": None,
            "cpu": {"name": "C", "capability": "AVX2", "threads": 2},
            "versions": {"torch": "2"},
            "commit": None,
        },
        "rows": [_row(0.9, 0.3, None), _row(None, None, "not run: too large")],
        "roofs": [],
        "sweeps": [],
        "bars": [],
    }
    text = pages.page("c", {"op": record})
    assert "90 %*" in text
    assert "- disturbed: around 1 of 1 rows" in text
    assert "- memattn: not run: too large" in text
    assert "90 %* of the roof" in pages.overview({"c": {"op": record}})


def _row(roof, share, reason):
    found = {"label": "case", "direction": "forward", "competitor": "memattn", "reason": reason}
    found |= {"tokens": 8, "peak_bytes": None, "memattn_speedup": None, "seconds": None}
    if roof is not None:
        found["seconds"] = dict.fromkeys(("median", "q20", "q80"), 1.0)
        found |= {"roof_share": roof, "machine_share": share}
        found |= {"flops_per_second": 1.0, "bytes_per_second": 1.0}
    return found


def test_nothing_is_written_of_a_wrong_operator(quick, monkeypatch, tmp_path, capsys):
    plant(monkeypatch, longer_window)
    assert __main__.main(["--all", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "wrong result, so no times are printed: segmented_attention" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attention"], "operators must be one of"),
        (["--out", "{}/file"], "out must be a folder that can be written to, got {}/file"),
        (["--out", "{}/old"], "out must hold records of format 2, got {}/old/machines/m/op.json"),
        (["--out", "{}/broken"], "out must hold records that can be read, got {}/broken"),
        (["--quick"], "quick must be left out with all, got True"),
        (["--suite", "cpu-bars"], "suite must be left out with all, got cpu-bars"),
        (["--shape", "H=2"], "shape must be left out with all, got"),
        (["--dtype", "float16"], "dtype must be left out with all, got float16"),
        (["--retune"], "all must be left out with retune, got True"),
        (["--device", "cuda"], "device must be there: torch sees no CUDA device, got cuda"),
    ],
    ids=str,
)
def test_refuses_before_anything_is_timed(words, message, tmp_path, capsys, monkeypatch):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("tests what is said without CUDA")
    monkeypatch.setattr(run_all, "run_suite", None)  # calling it would fail otherwise
    (tmp_path / "file").touch()
    for name, text in (("old", '{"format": 0}'), ("broken", "{")):
        (tmp_path / name / "machines" / "m").mkdir(parents=True)
        (tmp_path / name / "machines" / "m" / "op.json").write_text(text)
    words = ["--all", "--out", str(tmp_path / "new"), *(w.format(tmp_path) for w in words)]
    assert __main__.main(words) == 2
    said = capsys.readouterr().err
    assert f"memattn bench: error: {message.format(tmp_path)}" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_other_runs_refuse_a_folder_before_anything_is_timed(tmp_path, capsys):
    (tmp_path / "file").touch()
    for words in (["--quick"], ["--suite", "cpu-bars"]):
        assert __main__.main([*words, "--out", str(tmp_path / "file")]) == 2
        assert "out must be a folder that can be written to" in capsys.readouterr().err


def test_machines_have_names_for_files():
    cpu = {"name": "AMD EPYC", "capability": "AVX512", "threads": 2}
    machine = {"cpu": cpu, "gpu": "NVIDIA H100 80GB HBM3"}
    assert run_all.machine_name(machine, "cuda") == "nvidia-h100-80gb-hbm3"
    assert run_all.machine_name(machine, "cpu") == "amd-epyc-avx512-2-threads"
