"""The demo, small: equal tokens, one page, and nothing done twice."""

import json
import re

import pytest
from rich.console import Console

from memattn.cli import main
from memattn.demo import DemoConfig, run_demo
from memattn.demo import run as demo_run
from memattn.models import PRESETS, MemAttnConfig

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Twelve documents in a folder."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(12):
        text = " ".join(WORDS[(i * j + j // 3) % 10] for j in range(150))
        (folder / f"{i}.txt").write_text(f"{i} {text}")
    return folder


@pytest.fixture
def config(tmp_path, corpus):
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=1)
    return DemoConfig(
        out=str(tmp_path / "demo"),
        minutes=1e-3,
        corpus=str(corpus),
        seq_len=32,
        batch_size=2,
        vocab_size=280,
        sizes=sizes,
        cache_dir=str(tmp_path / "cache"),
    )


@pytest.fixture
def console(tmp_path):
    with (tmp_path / "log.txt").open("w+") as file:
        yield Console(file=file, width=140)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Short windows, so that the audit is short."""
    short = lambda **sizes: MemAttnConfig.segmented(segment_len=8, window_size=8, **sizes)
    monkeypatch.setitem(PRESETS, "segmented", short)


def written(console):
    console.file.seek(0)
    return console.file.read()


def test_trains_audits_and_reports_every_preset(config, console):
    page = run_demo(config, console=console)
    out = page.parent
    report = json.loads((out / "results.json").read_text())
    assert [result["preset"] for result in report["results"]] == list(PRESETS)
    assert {result["tokens"] for result in report["results"]} == {report["tokens"]}
    for result in report["results"]:
        assert result["audit"]["verdict"] == "all 0"
        assert 0.0 < result["held_out_loss"] < 6.0 and result["tokens_per_second"] > 0.0
        # an influence on an earlier position would be a leak
        for i, row in enumerate(result["influence"]["log10"]):
            assert set(row[:i]) <= {None} and row[i] is not None
    states = {r["preset"]: [size for _, size in r["state_bytes"]] for r in report["results"]}
    assert states["vanilla"][-1] == 2 * states["vanilla"][-3]  # 2048 and 1024 tokens
    assert states["segmented"][-1] < states["vanilla"][-1] / 50
    text = written(console)
    assert "held-out loss" in text and "all 0" in text and "no claim" in text
    html = page.read_text()
    assert "One seed (0)" in html and html.count("<svg") == 5
    # one file: nothing is loaded from elsewhere
    assert not re.search(r'(?:src|href)="(?!data:|#)', html)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_goes_on_after_an_interruption_and_trains_nothing_twice(config, console, monkeypatch):
    trained, train = [], demo_run.train

    def interrupted(run, **options):
        if run.model.preset == "segmented" and len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(run.model.preset)
        return train(run, **options)

    # what is measured is the other test's part
    measured = {
        "parameters": 1,
        "audit": {"verdict": "all 0", "rows": []},
        "state_bytes": [(1, 2)],
        "influence": {"changed": [0, 1], "log10": [[0.0, 0.0], [None, 0.0]]},
        "prompt": "a",
        "sample": "b <&",
    }
    monkeypatch.setattr(demo_run, "measure_model", lambda folder, seed: dict(measured))
    monkeypatch.setattr(demo_run, "train", interrupted)
    with pytest.raises(KeyboardInterrupt, match="in segmented; the same command goes on"):
        run_demo(config, console=console)
    plan = json.loads((demo_run.Path(config.out) / "plan.json").read_text())
    trained.append("-")
    run_demo(config, console=console)
    assert trained == ["vanilla", "-", "segmented"]
    # a system that lands later gets the same tokens
    monkeypatch.setitem(PRESETS, "late", MemAttnConfig.vanilla)
    page = run_demo(config, console=console)
    report = json.loads((page.parent / "results.json").read_text())
    assert "b &lt;&amp;" in page.read_text()
    assert trained[3:] == ["late"]
    assert {result["tokens"] for result in report["results"]} == {plan["tokens"]}
    assert len(report["results"]) == 3

    other = DemoConfig(**{**demo_run.asdict(config), "seed": 1})
    with pytest.raises(ValueError, match="out must be a new folder for another seed"):
        run_demo(other, console=console)


def test_fresh_deletes_an_earlier_demo_only(config, console, monkeypatch):
    out = demo_run.Path(config.out)
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    stop = lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt)
    monkeypatch.setattr(demo_run, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        run_demo(config, fresh=True, console=console)
    assert (out / "mine.txt").exists()  # there was no demo in the folder
    with pytest.raises(KeyboardInterrupt):
        run_demo(config, fresh=True, console=console)
    assert not (out / "mine.txt").exists() and (out / "plan.json").exists()


def test_command_turns_flags_into_the_configuration(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("memattn.demo.run_demo", lambda config, fresh: seen.append((config, fresh)))
    assert main(["demo", "--out", "x", "--minutes", "2", "--seed", "3", "--fresh"]) == 0
    assert seen == [(DemoConfig(out="x", minutes=2.0, seed=3), True)]
    assert main(["demo", "--minutes", "0"]) == 2
    assert "minutes must be positive and finite, got 0.0" in capsys.readouterr().err
