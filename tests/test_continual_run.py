"""Benchmarks: what is measured, kept, gone on with and refused."""

import json
import math
from dataclasses import replace

import pytest
import torch
from continual_streams import SMALL, blobs

from memattn.continual import STRATEGIES, make_strategy, run_benchmark, search_options
from memattn.continual import run as run_module
from memattn.continual.results import BenchmarkResults, StrategyRun

NAMES = ("separate", "finetuning")


def bench(folder=None, strategies=NAMES, seeds=(0, 1), budget=SMALL, scenario="task", **options):
    make_stream = lambda seed: blobs(scenario, n_tasks=2, seed=seed)
    return run_benchmark(make_stream, strategies, seeds, budget, folder, **options)


def without_time(results):
    return [run.__class__(**{**vars(run), "seconds": 0.0}) for run in results.runs]


def test_runs_every_strategy_with_every_seed(tmp_path):
    results = bench(tmp_path)
    assert [(r.strategy, r.seed) for r in results.runs] == [(n, s) for n in NAMES for s in (0, 1)]
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*")) == [
        f"{name}/seed-{seed}.json" for name in sorted(NAMES) for seed in (0, 1)
    ]
    for run in results.runs:
        assert run.accuracy[0][1] is None and run.untrained is None
        assert run.seconds > 0.0
    assert without_time(results) == without_time(bench())


def test_goes_on_where_it_stopped(tmp_path, monkeypatch):
    fit, done = STRATEGIES["finetuning"].fit, []

    def fit_until_stopped(self, index, task):
        done.append((self.name, self.seed, index))
        if len(done) == 6:  # in the second run of seed 0's successor
            raise KeyboardInterrupt
        fit(self, index, task)

    for name in NAMES:
        monkeypatch.setattr(STRATEGIES[name], "fit", fit_until_stopped)
    with pytest.raises(KeyboardInterrupt):
        bench(tmp_path)
    finished = {path: path.read_text() for path in tmp_path.rglob("*.json")}
    assert len(finished) == 2 and not list(tmp_path.rglob(".*"))
    done.clear()
    done.extend([("", 0, 0)] * 6)
    results = bench(tmp_path)
    assert done[6:] == [(name, 1, index) for name in NAMES for index in (0, 1)]
    assert all(path.read_text() == text for path, text in finished.items())
    done.extend([("", 0, 0)] * 6)
    again = bench(tmp_path)
    assert again == results and len(done) == 16


def test_compares_variants_of_a_strategy(tmp_path):
    names = ("lora", "lora,rank=2", "packnet,keep=null")
    results = bench(tmp_path, names, seeds=(0,))
    assert [run.strategy for run in results.runs] == list(names)
    assert sorted(path.parent.name for path in tmp_path.rglob("*.json")) == sorted(names)
    (plain,) = bench(None, ("lora",), seeds=(0,), options={"lora": {"rank": 2}}).runs
    assert results.runs[1].accuracy == plain.accuracy
    assert results.runs[1].parameters == plain.parameters < results.runs[0].parameters
    assert bench(tmp_path, names, seeds=(0,)) == results


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(scenario="class", strategies=("finetuning",)),
            r"data \w+, scenario class, got .*seed-0.json with data \w+, scenario task$",
        ),
        (
            dict(budget=replace(SMALL, epochs=5, lr=0.5)),
            "budget.epochs 5, budget.lr 0.5, got .* with budget.epochs 4, budget.lr 0.02$",
        ),
        (
            dict(strategies=("ewc",), options={"ewc": {"ewc_lambda": 1.0}}),
            "options.ewc_lambda 1.0, got .* with options.ewc_lambda 100.0$",
        ),
    ],
)
def test_refuses_a_folder_of_other_settings(tmp_path, change, message):
    bench(tmp_path, strategies=("finetuning", "ewc"), seeds=(0,))
    with pytest.raises(ValueError, match=f"folder must be a new folder for {message}"):
        bench(tmp_path, **dict(strategies=("finetuning",), seeds=(0,)) | change)


def test_reads_all_files_before_the_first_run(tmp_path):
    """Else runs would be written beside those that they do not go with."""
    bench(tmp_path, strategies=("ewc",), seeds=(1,))
    files = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"budget.epochs 5, got .*ewc/seed-1.json"):
        bench(tmp_path, strategies=("finetuning", "ewc"), budget=replace(SMALL, epochs=5))
    assert sorted(tmp_path.rglob("*")) == files


@pytest.mark.parametrize("place", ["file", "file/below", "loop", "new/" + 300 * "x"])
def test_refuses_a_folder_that_cannot_be_written(tmp_path, place, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("nowhere/at/all")
    monkeypatch.setattr(run_module, "run_strategy", None)  # nothing is trained
    message = f"folder must be a folder that can be written to, got {tmp_path / place} "
    with pytest.raises(ValueError, match=message):
        bench(tmp_path / place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_a_folder_is_not_made_for_a_wrong_call(tmp_path):
    with pytest.raises(ValueError, match="strategy must be one of"):
        bench(tmp_path / "a" / "b", strategies=("sgd",))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "accuracy", [[[0.5]], [[0.5, None], [0.5]], [0.5, 0.5], [], [[0.5, None], [0.5, "x"]]]
)
def test_names_a_file_with_other_accuracies(tmp_path, accuracy):
    bench(tmp_path, strategies=("finetuning",), seeds=(0,))
    (file,) = tmp_path.rglob("*.json")
    content = json.loads(file.read_text())
    content["result"]["accuracy"] = accuracy
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{file} must "):
        bench(tmp_path, strategies=("finetuning",), seeds=(0,))


@pytest.mark.parametrize(
    "content",
    ["", "{}", '{"settings": {}, "result": {"seed": 1}}', "[1]", '{"settings": 1, "result": {}}'],
)
def test_names_a_damaged_file(tmp_path, content):
    file = tmp_path / "finetuning" / "seed-0.json"
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(ValueError, match=f"{file} must be the result of a run, got"):
        bench(tmp_path, strategies=("finetuning",))


def test_domains_have_forward_transfer():
    (run,) = bench(strategies=("finetuning",), seeds=(0,), scenario="domain").runs
    assert len(run.untrained) == 2 and run.accuracy[0][1] is not None
    expected = run.accuracy[0][1] - run.untrained[1]
    assert run.metrics()["forward_transfer"] == pytest.approx(expected)


def made_results():
    """Two strategies over two seeds, with round numbers."""
    runs = []
    for seed, change in ((0, 0.0), (1, 0.1)):
        for name, last in (("separate", 0.9), ("finetuning", 0.5 + change)):
            accuracy = [[0.9, None], [last, 0.9 + change]]
            runs.append(StrategyRun(name, seed, accuracy, None, 1000, 2000, 0, 1.5))
    return BenchmarkResults("made", "task", ("a", "b"), tuple(runs))


def test_means_over_seeds():
    separate, finetuning = made_results().summarise()
    assert finetuning.metrics["avg_forgetting"].mean == pytest.approx(0.35)
    assert finetuning.metrics["avg_forgetting"].sd == pytest.approx(0.1 / math.sqrt(2))
    assert separate.metrics["gain_over_separate"].mean == 0.0
    assert torch.equal(
        made_results().matrices()["finetuning"].nan_to_num(-1.0),
        torch.tensor([[0.9, -1.0], [0.55, 0.95]], dtype=torch.float64),
    )


def test_table():
    lines = made_results().table().to_markdown().splitlines()
    assert lines[0] == "**made, 2 tasks, task-incremental, 2 seeds, %**"
    assert lines[2].startswith("| strategy | accuracy | when learned | forgetting | backward |")
    assert lines[5].startswith("| finetuning | 75.0 ± 7.1 | 92.5 ± 3.5 | 35.0 ± 7.1 |")
    assert lines[5].endswith("| 1,000 | 2,000 | 0 | 1.5 |")
    assert "-0.0" not in lines[4]


def test_results_are_json():
    text = json.dumps(made_results().to_dict(), allow_nan=False)
    assert json.loads(text)["strategies"][1]["metrics"]["avg_forgetting"]["n"] == 2


def test_all_strategies_that_suit():
    results = bench(strategies=None, seeds=(0,), scenario="class")
    assert [run.strategy for run in results.runs] == [
        name for name, kind in STRATEGIES.items() if "class" in kind.scenarios
    ]


def test_progress_bar(capsys):
    bench(strategies=("finetuning",), seeds=(0,), progress=True)
    assert "finetuning, seed 0" in capsys.readouterr().out


def test_search_reads_no_test_sample():
    stream = blobs()
    for task in stream.tasks:
        task.test_x.fill_(math.nan)
    found = search_options("ewc", {"ewc_lambda": [0.0, 10.0]}, stream, (0, 1), SMALL)
    assert sorted(options["ewc_lambda"] for options, _ in found) == [0.0, 10.0]
    assert found[0][1].mean >= found[1][1].mean > 0.5 and found[0][1].n == 2


def test_a_strategy_learns_a_stream_once():
    stream = blobs()
    strategy = make_strategy("finetuning", stream, SMALL, 0)
    run_module.run_strategy(strategy, stream)
    with pytest.raises(ValueError, match="index must be that of the next task, 3, got 0"):
        run_module.run_strategy(strategy, stream)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(stream="digit"), "stream must be one of digits, mnist, got 'digit'"),
        (dict(strategies=("sgd",)), "strategy must be one of joint"),
        (dict(strategies=("ewc,gamma",)), "strategy must read NAME or NAME,option=value,"),
        (dict(strategies=("ewc,gamma=1,gamma=0",)), "each option once, got 'ewc,gamma=1,gamma=0'"),
        (dict(strategies=()), "strategies must have at least one name and none twice"),
        (dict(strategies=("ewc", "ewc")), "strategies must have at least one name and none twice"),
        (dict(seeds=()), "seeds must have at least one seed and none twice"),
        (dict(seeds=(-1,)), "seeds must be at least 0, got -1"),
        (dict(seeds=(0, 2**40)), r"seeds must be below 2\*\*40, got 1099511627776"),
        (
            dict(strategies=("ewc",), options={"ewc": {"ewc_lambda": 1.0, "lambda": 1.0}}),
            "options of strategy 'ewc' must be of ewc_lambda, .*, got 'lambda'",
        ),
        (
            dict(options={"finetuning": {"rank": 1}}),
            "options of strategy 'finetuning' must be left out, got 'rank'",
        ),
        (dict(options={"si": {}}), r"options must be for strategies that are run, got \['si'\]"),
        (dict(stream=blobs("class")), "stream must have scenario task for strategy 'separate'"),
    ],
)
def test_names_what_is_wrong(change, message):
    arguments = dict(stream=blobs(), strategies=NAMES, seeds=(0,), budget=SMALL) | change
    with pytest.raises(ValueError, match=message):
        run_benchmark(**arguments)
