"""Runs the demo: train, measure, report. Each finished part is kept and never done twice."""

import itertools
import json
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from memattn._settings import check_same_settings
from memattn.demo.config import ADDED_STEPS, STARTS, DemoConfig
from memattn.demo.continual import CONTINUAL, continual_table, has_digits, measure_continual
from memattn.demo.ideas import idea_table, measure_ideas
from memattn.demo.measure import measure_model
from memattn.demo.page import write_page
from memattn.demo.plan import Plan, Stage, StageTime
from memattn.demo.rows import columns, table_rows, yardstick_rows
from memattn.demo.texts import held_out_bits
from memattn.demo.workers import Workers, default_processes
from memattn.demo.yardsticks import measure_yardsticks
from memattn.evaluate import bits_per_byte
from memattn.files import write_json
from memattn.models import PRESETS
from memattn.train import TrainConfig, train
from memattn.train.attached import load_model_folder
from memattn.train.metrics import read_metrics
from memattn.train.setup import prepare_data

PLAN, RESULT = "plan.json", "result.json"


def run_demo(config: DemoConfig, *, fresh: bool = False, console: Console | None = None) -> Path:
    """Train, audit and compare every preset of ``memattn.models.PRESETS``.

    All are trained on equally many tokens, but for those that begin with another's trained weights.
    Writes ``<out>/<preset>/`` (a run folder and ``result.json``), ``results.json``,
    ``curves.png`` and ``index.html``. An interrupted demo goes on where it stopped, and a preset
    that is registered later is trained on as many tokens as the others were.

    Several presets train at a time, in processes that import the main module of the caller: a
    script calls this under ``if __name__ == "__main__":``, or with one process.

    Args:
        config: What to do.
        fresh: Delete an earlier demo in the folder first.
        console: Where to print.

    Returns:
        Path of the page.

    Raises:
        ValueError: If the folder has a demo with another configuration.
        KeyboardInterrupt: On Ctrl-C, after a checkpoint; the same call goes on from there.
        OSError: If the corpus cannot be fetched or the disk is full.
    """
    console = console or Console()
    out = Path(config.out)
    if fresh and (out / PLAN).is_file():
        shutil.rmtree(out)
    began = time.perf_counter()
    plan = _plan(config, out, console)
    with Workers(plan.processes, console) as workers:
        _train(config, plan, workers, console)
        results, continual = _measure(config, plan, workers, console)
        ideas = measure_ideas(config, results, workers)
    yardsticks = measure_yardsticks(config, plan.tokens, console)
    report = {
        "config": asdict(config),
        **asdict(plan),
        "steps": plan.steps,
        "tokens": plan.tokens,
        "versions": _versions(),
        "seconds_of_this_call": time.perf_counter() - began,
        "yardsticks": yardsticks,
        "results": results,
        "ideas": ideas,
        "continual": continual,
    }
    write_json(out / "results.json", report)
    curves = {r["preset"]: read_metrics(out / r["preset"] / "metrics.csv") for r in results}
    page = write_page(out, report, curves)
    console.print(_table(report))
    console.print(
        f"One seed, {plan.tokens:,} tokens, small models: differences in loss are no claim.",
        highlight=False,
    )
    console.print(idea_table(ideas))
    if continual:
        console.print(continual_table(continual))
    for what, path in (
        ("page", page),
        ("numbers", out / "results.json"),
        ("curves", out / "curves.png"),
    ):
        console.print(f"{what:<8} {path}", highlight=False, soft_wrap=True)
    return page


def _plan(config: DemoConfig, out: Path, console: Console) -> Plan:
    """The plan of an earlier call, or a new one."""
    file = out / PLAN
    settings = json.loads(json.dumps(asdict(config)))
    settings.pop("out")
    if file.is_file():
        plan = Plan.load(file)
        check_same_settings("out", file, plan.settings, settings, hint="or use --fresh")
        console.print(f"going on with the demo in {out}", highlight=False, soft_wrap=True)
        return plan
    with console.status(f"fetching and tokenizing {config.corpus}"):
        stage = Stage(1, 1, evaluate=False)
        corpus = prepare_data(config.train_config(next(iter(PRESETS)), stage))
    held_out = corpus.held_out
    assert held_out is not None  # documents are held out, or the split has said why not
    console.print(
        f"{config.corpus}: {corpus.train.num_documents} documents, {len(corpus.train.ids):,} "
        f"tokens to train on, {len(held_out.ids):,} held out",
        highlight=False,
    )
    plan = Plan(
        settings=settings,
        step_tokens=config.batch_size * config.seq_len,
        train_tokens=len(corpus.train.ids),
        held_out_tokens=len(held_out.ids),
        held_out_bytes=held_out.num_bytes,
        device=_device(),
        processes=config.processes or default_processes(len(_from_nothing())),
    )
    plan.save(file)
    return plan


def _train(config: DemoConfig, plan: Plan, workers: Workers, console: Console) -> None:
    """Train all presets, stage by stage, until the plan is complete."""
    for number in itertools.count():
        stage = plan.stages[number]
        first = plan.stages[number - 1].stop if number else 0
        jobs = {
            preset: partial(
                train_stage, config.train_config(preset, stage), stage.stop, first, workers.alone
            )
            for preset in plan.longest_first(_from_nothing())
            if preset not in stage.times
        }
        for preset, time_taken in workers.run(jobs, None if workers.alone else "training"):
            stage.times[preset] = time_taken
            plan.save(Path(config.out) / PLAN)
        if number == len(plan.stages) - 1:
            if plan.is_complete:
                return
            plan.extend(_from_nothing(), 60.0 * config.minutes)
            plan.save(Path(config.out) / PLAN)
        if number == 0:
            speeds = (f"{p} {1.0 / stage.times[p].seconds_per_token:,.0f}" for p in stage.times)
            console.print(f"tokens/s: {', '.join(speeds)}", highlight=False)
        if plan.steps != stage.steps:
            console.print(
                f"planned: {plan.steps:,} steps, {plan.tokens:,} tokens each", highlight=False
            )


def _from_nothing() -> list[str]:
    """The presets that begin with new weights."""
    return [preset for preset in PRESETS if preset not in STARTS]


def _added_steps(plan: Plan) -> int:
    """Steps of a preset that begins with the weights of another."""
    return max(1, round(ADDED_STEPS * plan.steps))


def train_stage(run: TrainConfig, stop: int, first: int, progress: bool) -> StageTime:
    """Train one preset for one stage.

    Args:
        run: The whole run.
        stop: Step at which the stage ends.
        first: Step at which it begins.
        progress: Whether to show a progress bar.
    """
    began = time.perf_counter()
    train(run, resume=True, stop_step=stop, progress=progress)
    seconds = time.perf_counter() - began
    rows = read_metrics(Path(run.training.output_dir) / "metrics.csv")
    speeds = [r["tokens_per_second"] for r in rows if r["tokens_per_second"] and r["step"] > first]
    return StageTime(seconds, sum(1.0 / speed for speed in speeds) / len(speeds))


def _measure(
    config: DemoConfig, plan: Plan, workers: Workers, console: Console
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What each preset and DTG-MA have come to, unless that was measured."""
    out = Path(config.out)
    jobs: dict[str, Any] = {
        preset: partial(measure_preset, config, plan, preset)
        # the longest first: these have to train
        for preset in sorted(PRESETS, key=lambda name: name not in STARTS)
    }
    kept = {preset for preset in jobs if (out / preset / RESULT).is_file()}
    continual: list[dict[str, Any]] = []
    if has_digits():
        jobs = {"dtgma": partial(measure_continual, out, config.seed), **jobs}
        kept |= {"dtgma"} if (out / CONTINUAL).is_file() else set()
    else:
        console.print("dtgma: not run, scikit-learn is not installed (memattn\\[digits])")
    results = {}
    for name, found in workers.run(jobs, "measuring"):
        if name == "dtgma":
            continual, said = found, "measured"
        else:
            results[name] = found
            verdict = found["audit"]["verdict"]
            said = f"{found['bits_per_byte']:.3f} bits per byte, audit {verdict}"
        console.print(f"{name}: {'kept from before' if name in kept else said}", highlight=False)
    return [results[preset] for preset in PRESETS], continual


def measure_preset(config: DemoConfig, plan: Plan, preset: str) -> dict[str, Any]:
    """Measure one trained preset, unless that was done.

    A preset that begins with the weights of another is trained first.
    """
    folder = Path(config.out) / preset
    file = folder / RESULT
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    if preset in STARTS and not (folder / "model").is_dir():
        train(config.added_config(preset, _added_steps(plan)), resume=True, progress=False)
    measured = measure_model(folder / "model", seed=config.seed)
    rows = read_metrics(folder / "metrics.csv")
    trained = [row for row in rows if row["loss"] is not None]
    if preset in STARTS:  # it was trained on another text
        bits = held_out_bits(config, load_model_folder(folder / "model"))
    else:
        bits = bits_per_byte(rows[-1]["eval_loss"], plan.held_out_tokens, plan.held_out_bytes)
    result = {
        "preset": preset,
        "start": STARTS.get(preset),
        "bits_per_byte": bits,
        # of the language model alone, where others are added to it
        "train_loss": trained[-1]["lm_loss"] or trained[-1]["loss"],
        "tokens": trained[-1]["tokens"],
        "tokens_per_second": median(row["tokens_per_second"] for row in trained),
        "seconds": rows[-1]["seconds"],
        **measured,
    }
    write_json(file, result)
    return result


def _table(report: dict[str, Any]) -> Table:
    """The comparison, one row for each preset, and the yardsticks behind them."""
    table = Table(title=f"{report['tokens']:,} tokens each, on {report['device']}")
    names = columns(report)
    for name in names:
        table.add_column(name, justify="left" if name in (names[0], names[-1]) else "right")
    for cells in table_rows(report):
        style = "green" if cells[-1].startswith("all 0") else "red"
        table.add_row(*cells[:-1], f"[{style}]{cells[-1]}[/]")
    table.add_section()
    for cells in yardstick_rows(report):
        table.add_row(*cells)
    return table


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "memattn")
    versions = {"python": platform.python_version()}
    read: Callable[[str], str] = metadata.version
    for name in names:
        try:
            versions[name] = read(name)
        except metadata.PackageNotFoundError:  # memattn, run from a checkout
            from memattn import __version__

            versions[name] = __version__
    return versions
