"""Runs the demo: train, measure, report. Each finished part is kept and never done twice."""

import itertools
import json
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from memattn.demo.config import ADDED_STEPS, STARTS, DemoConfig
from memattn.demo.continual import continual_table, measure_continual
from memattn.demo.ideas import idea_table, measure_ideas
from memattn.demo.measure import measure_model
from memattn.demo.page import write_page
from memattn.demo.plan import Plan, Stage, StageTime
from memattn.demo.rows import columns, table_rows, yardstick_rows
from memattn.demo.texts import held_out_bits
from memattn.demo.yardsticks import measure_yardsticks
from memattn.evaluate import bits_per_byte
from memattn.files import write_text
from memattn.models import PRESETS
from memattn.train import train
from memattn.train.attached import load_model_folder
from memattn.train.metrics import read_metrics
from memattn.train.setup import prepare_data

PLAN = "plan.json"


def run_demo(config: DemoConfig, *, fresh: bool = False, console: Console | None = None) -> Path:
    """Train, audit and compare every preset of ``memattn.models.PRESETS``.

    All are trained on equally many tokens, but for those that begin with another's trained weights.
    Writes ``<out>/<preset>/`` (a run folder and ``result.json``), ``results.json``,
    ``curves.png`` and ``index.html``. An interrupted demo goes on where it stopped, and a preset
    that is registered later is trained on as many tokens as the others were.

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
    yardsticks = measure_yardsticks(config, console)
    _train(config, plan, console)
    for preset in filter(STARTS.get, PRESETS):
        if not (out / preset / "model").is_dir():
            train(config.added_config(preset, _added_steps(plan)), resume=True)
    results = [_result(config, plan, preset, console) for preset in PRESETS]
    ideas = measure_ideas(config, results, console)
    continual = measure_continual(out, config.seed, console)
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
    write_text(out / "results.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
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
        changed = [name for name, value in settings.items() if plan.settings.get(name) != value]
        if changed:
            raise ValueError(
                f"out must be a new folder for another {', '.join(changed)} (or use --fresh), "
                f"got {out}"
            )
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
    )
    plan.save(file)
    return plan


def _train(config: DemoConfig, plan: Plan, console: Console) -> None:
    """Train all presets in turns, stage by stage, until the plan is complete."""
    for number in itertools.count():
        stage = plan.stages[number]
        for preset in _from_nothing():
            if preset not in stage.times:
                stage.times[preset] = _train_stage(config, plan, number, preset)
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


def _train_stage(config: DemoConfig, plan: Plan, number: int, preset: str) -> StageTime:
    """Train one preset for one stage."""
    stage = plan.stages[number]
    began = time.perf_counter()
    try:
        train(config.train_config(preset, stage), resume=True, stop_step=stage.stop)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"in {preset}; the same command goes on from there") from stop
    seconds = time.perf_counter() - began
    first = plan.stages[number - 1].stop if number else 0
    rows = read_metrics(Path(config.out) / preset / "metrics.csv")
    speeds = [r["tokens_per_second"] for r in rows if r["tokens_per_second"] and r["step"] > first]
    return StageTime(seconds, sum(1.0 / speed for speed in speeds) / len(speeds))


def _result(config: DemoConfig, plan: Plan, preset: str, console: Console) -> dict[str, Any]:
    """Measure one trained preset, unless that was done."""
    folder = Path(config.out) / preset
    file = folder / "result.json"
    if file.is_file():
        console.print(f"{preset}: kept from before", highlight=False)
        return json.loads(file.read_text(encoding="utf-8"))
    with console.status(f"auditing {preset}"):
        measured = measure_model(folder / "model", seed=config.seed)
    rows = read_metrics(folder / "metrics.csv")
    trained = [row for row in rows if row["loss"] is not None]
    if preset in STARTS:  # it was trained on another text
        bits = held_out_bits(config, load_model_folder(folder / "model"))
    else:
        bits = bits_per_byte(rows[-1]["eval_loss"], plan.held_out_tokens, plan.held_out_bytes)
    audit = measured["audit"]
    console.print(f"{preset}: {bits:.3f} bits per byte, audit {audit['verdict']}")
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
    write_text(file, json.dumps(result, indent=1, allow_nan=False) + "\n")
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
