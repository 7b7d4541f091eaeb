"""The demo, small: equal tokens, one page, and nothing done twice."""

import json
import re

import pytest
from rich.console import Console

from memattn.cli import main
from memattn.continual.strategies import Budget
from memattn.demo import DemoConfig, run_demo
from memattn.demo import config as demo_config
from memattn.demo import continual as demo_continual
from memattn.demo import ideas as demo_ideas
from memattn.demo import run as demo_run
from memattn.demo.plan import MAX_EPOCHS, STAGES, WARMUP_STEPS, Plan
from memattn.demo.workers import Workers
from memattn.models import PRESETS, MemAttnConfig
from memattn.train.attached import load_model_folder
from memattn.train.metrics import read_metrics

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
        specialty=str(corpus),
        seq_len=32,
        batch_size=2,
        vocab_size=280,
        sizes=sizes,
        cache_dir=str(tmp_path / "cache"),
        processes=1,
    )


@pytest.fixture
def console(tmp_path):
    with (tmp_path / "log.txt").open("w+") as file:
        yield Console(file=file, width=140)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Short windows, so that the audit is short."""
    short = lambda **sizes: MemAttnConfig.segmented(**{"segment_len": 8, "window_size": 8, **sizes})
    monkeypatch.setitem(PRESETS, "segmented", short)
    small = dict(window_size=8, chunk_size=8, memory_expansion=1)
    monkeypatch.setitem(PRESETS, "titans", lambda **sizes: MemAttnConfig.titans(**sizes | small))
    monkeypatch.setitem(demo_config.OPTIONS, "future", dict(future_dim=8, source="relative"))
    monkeypatch.setattr(demo_ideas, "RECALL_STEPS", 2)
    monkeypatch.setattr(demo_ideas, "SAMPLES", 4)
    budget = Budget(epochs=1, hidden_dim=16, batch_size=128)
    monkeypatch.setattr(demo_continual, "BUDGET", budget)


def written(console):
    console.file.seek(0)
    return console.file.read()


def test_trains_audits_and_reports_every_preset(config, console):
    page = run_demo(config, console=console)
    out = page.parent
    report = json.loads((out / "results.json").read_text())
    assert [result["preset"] for result in report["results"]] == list(PRESETS)
    tokens = {result["preset"]: result["tokens"] for result in report["results"]}
    added = tokens.pop("shiftable")  # it begins with vanilla's weights, which stay
    assert set(tokens.values()) == {report["tokens"]} and 0 < added < report["tokens"]
    base, shiftable = (load_model_folder(out / name / "model") for name in ("vanilla", "shiftable"))
    own = dict(shiftable.named_parameters())
    assert all(parameter.equal(own[name]) for name, parameter in base.named_parameters())
    dtgma, finetuning = report["continual"]
    assert dtgma["largest_change"] == dtgma["avg_forgetting"] == 0.0 < finetuning["largest_change"]
    assert "unchanged" in written(console) and "unchanged" in page.read_text()
    for result in report["results"]:
        assert result["audit"]["verdict"] == "all 0"
        assert 0.0 < result["bits_per_byte"] < 6.0 and result["tokens_per_second"] > 0.0
        # an influence on an earlier position would be a leak
        for i, row in enumerate(result["influence"]["log10"]):
            assert set(row[:i]) <= {None} and row[i] is not None
    states = {r["preset"]: [size for _, size in r["state_bytes"]] for r in report["results"]}
    # 2048 and 1024 tokens, with room for more in proportion
    assert states["vanilla"][-1] == pytest.approx(2 * states["vanilla"][-3], rel=1e-3)
    assert states["segmented"][-1] < states["vanilla"][-1] / 30
    yardsticks = [(found["name"], found["vocab_size"]) for found in report["yardsticks"]]
    assert yardsticks == [("unigram", 280), ("bigram", 280), ("unigram", 560), ("bigram", 560)]
    assert report["yardsticks"][1]["tokens"] == report["tokens"] < report["train_tokens"]
    counted = [found["bits_per_byte"] for found in report["yardsticks"]]
    assert 0.0 < counted[1] < counted[0]  # rows of these words repeat themselves
    assert [row["system"] for row in report["ideas"]] == [
        *("segmented", "future", "memory_transformer", "titans", "shiftable"),
    ]
    assert report["ideas"][0]["without"].endswith("KiB")
    text = written(console)
    assert (
        "bits per byte" in text
        and "bigram, vocabulary of 560" in text
        and "all 0" in text
        and "no claim" in text
    )
    assert "shiftable, from vanilla" in text
    html = page.read_text()
    assert "One seed (0)" in html and html.count("<svg") == 3 + len(PRESETS)
    # one file: nothing is loaded from elsewhere
    assert not re.search(r'(?:src|href)="(?!data:|#)', html)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


MEASURED = {
    "parameters": 1,
    "audit": {"verdict": "all 0", "rows": []},
    "state_bytes": [(1, 2)],
    "influence": {"changed": [0, 1], "log10": [[0.0, 0.0], [None, 0.0]]},
    "prompt": "a",
    "sample": "b <&",
}


def test_goes_on_after_an_interruption_and_trains_nothing_twice(config, console, monkeypatch):
    trained, train = [], demo_run.train

    def interrupted(run, *, stop_step=None, **options):
        trained.append((run.model.preset, stop_step))
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(run, stop_step=stop_step, **options | {"progress": False})

    # what is measured is the other test's part
    monkeypatch.setattr(demo_run, "measure_model", lambda folder, seed: dict(MEASURED))
    monkeypatch.setattr(demo_run, "train", interrupted)
    with pytest.raises(KeyboardInterrupt, match="in segmented; the same command goes on"):
        run_demo(config, console=console)
    assert trained.pop() == ("segmented", WARMUP_STEPS)
    trained.append(())
    run_demo(config, console=console)
    assert trained.pop(1) == ()
    # there was no time after the warm-up
    stops = [WARMUP_STEPS, WARMUP_STEPS + 2]
    begun = [preset for preset in PRESETS if preset != "shiftable"]
    assert trained[: len(begun)] == [(preset, stops[0]) for preset in begun]
    # the slowest first, and then the one that begins with another's weights
    assert sorted(trained[len(begun) : -1]) == sorted((preset, stops[1]) for preset in begun)
    assert trained[-1] == (None, None)
    done = len(trained)
    # a system that lands later gets the same tokens
    monkeypatch.setitem(PRESETS, "late", MemAttnConfig.vanilla)
    page = run_demo(config, console=console)
    report = json.loads((page.parent / "results.json").read_text())
    assert "b &lt;&amp;" in page.read_text()
    assert trained[done:] == [("late", stop) for stop in stops]
    tokens = stops[-1] * config.batch_size * config.seq_len
    assert {r["tokens"] for r in report["results"] if r["preset"] != "shiftable"} == {tokens}
    assert len(report["results"]) == len(PRESETS)
    # and the same learning rates, though their number was not known in the warm-up
    rates = [
        [row["learning_rate"] for row in read_metrics(page.parent / name / "metrics.csv")]
        for name in ("vanilla", "late")
    ]
    assert rates[0] == rates[1]
    assert max(rate for rate in rates[0] if rate) == rates[0][WARMUP_STEPS]

    other = DemoConfig(**{**demo_run.asdict(config), "seed": 1})
    with pytest.raises(
        ValueError,
        match=r"out must be a new folder for seed 1 \(or use --fresh\), got .* with seed 0",
    ):
        run_demo(other, console=console)
    (page.parent / "plan.json").write_text('{"steps": 5}')
    with pytest.raises(ValueError, match=r"plan must be of this version \(or use --fresh\), got"):
        run_demo(config, console=console)


class Machine:
    """Trains by a clock of its own: presets of other speeds, and a load that may change.

    Seconds: 0.6 for each call, and for each token those of its preset times the load.
    """

    def __init__(self, monkeypatch, seconds_per_token, load):
        self.now, self.seconds_per_token, self.load = 0.0, seconds_per_token, load
        self.rows = {preset: [] for preset in seconds_per_token}
        monkeypatch.setattr(demo_run, "PRESETS", seconds_per_token)
        monkeypatch.setattr(DemoConfig, "model_options", lambda config, preset: {})
        monkeypatch.setattr(demo_run, "train", self.train)
        monkeypatch.setattr(demo_run, "read_metrics", lambda file: self.rows[file.parent.name])
        monkeypatch.setattr(demo_run.time, "perf_counter", lambda: self.now)

    def train(self, run, *, stop_step, resume, progress):
        preset, options = run.model.preset, run.training
        rows, tokens = self.rows[preset], options.batch_size * run.data.seq_len
        assert resume and len(rows) < stop_step <= options.max_steps
        self.now += 0.6 * self.load(self.now)
        cost = 0.0
        for step in range(len(rows) + 1, stop_step + 1):
            cost = self.seconds_per_token[preset] * self.load(self.now)
            self.now += tokens * cost
            rows.append({"step": step, "tokens_per_second": 1.0 / cost})
        if options.eval_steps == stop_step:
            self.now += HELD_OUT * cost / 3


HELD_OUT = 18_000


@pytest.mark.parametrize(
    ("presets", "load", "least", "most"),
    [
        pytest.param(2, lambda now: 1.0, 170, 185, id="quiet"),
        pytest.param(5, lambda now: 1.0, 170, 185, id="many"),
        pytest.param(5, lambda now: 3.0, 150, 190, id="busy"),
        pytest.param(5, lambda now: 4.0 if now > 60 else 1.0, 120, 275, id="becomes busy"),
        pytest.param(2, lambda now: 4.0 if now > 30 else 1.0, 120, 200, id="soon busy"),
        pytest.param(2, lambda now: 4.0 if now < 60 else 1.0, 60, 185, id="becomes quiet"),
    ],
)
def test_keeps_its_time_with_equal_tokens(
    monkeypatch, tmp_path, console, presets, load, least, most
):
    speeds = {"vanilla": 1, "segmented": 1.1, "future": 2, "titans": 3, "last": 1}
    speeds = {name: slow / 3000 for name, slow in list(speeds.items())[:presets]}
    machine = Machine(monkeypatch, speeds, load)
    config = DemoConfig(out=str(tmp_path), minutes=3.0, batch_size=1, seq_len=512)
    plan = Plan({}, 512, 472_000, HELD_OUT, 1, "none")
    demo_run._train(config, plan, Workers(1, console), console)
    assert least < machine.now < most
    assert {len(rows) for rows in machine.rows.values()} == {plan.steps}
    assert plan.is_complete and plan.stages[-1].evaluate and len(plan.stages) <= STAGES + 1
    assert Plan.load(tmp_path / "plan.json") == plan
    # learning rates never rise again
    planned = [stage.steps for stage in plan.stages[1:]]
    assert planned == sorted(planned, reverse=True)
    spent = sum(taken.seconds for stage in plan.stages for taken in stage.times.values())
    assert spent == pytest.approx(machine.now)


def test_a_small_text_is_not_learned_by_heart(monkeypatch, tmp_path, console):
    Machine(monkeypatch, {"vanilla": 1 / 3000}, lambda now: 1.0)
    plan = Plan({}, 512, 30_000, 1000, 1, "none")
    config = DemoConfig(out=str(tmp_path), minutes=3.0, batch_size=1, seq_len=512)
    demo_run._train(config, plan, Workers(1, console), console)
    assert plan.tokens <= MAX_EPOCHS * 30_000 < plan.tokens + 512
    assert sum(stage.evaluate for stage in plan.stages) == 4


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
