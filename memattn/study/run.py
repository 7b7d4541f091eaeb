"""Runs a study: one training run for each cell and seed; finished runs are kept."""

import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from memattn._settings import check_same_settings
from memattn.checks import must
from memattn.files import write_json, write_text
from memattn.study.base import Study
from memattn.study.cells import Cell
from memattn.study.report import print_report, write_parts, write_report
from memattn.study.results import MEASURES, read_run
from memattn.train import TrainConfig, load_config, train
from memattn.train.metrics import read_metrics
from memattn.train.setup import prepare_data

# what may differ between a run of the study and the same run as it is planned now
_FREE = {"output_dir", "cache_dir", "cpu", "log_steps", "save_steps", "keep_checkpoints"}


@dataclass(frozen=True)
class StudyRun:
    """One cell with one seed."""

    cell: Cell
    seed: int
    config: TrainConfig

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.config.training.output_dir)

    @property
    def is_finished(self) -> bool:
        """Whether it has written its model."""
        return (self.folder / "model").is_dir()

    @property
    def max_steps(self) -> int:
        return self.config.training.num_steps()

    def __str__(self) -> str:
        return f"{self.cell.name}, seed {self.seed}"


def run_study(
    study: Study,
    *,
    max_minutes: float | None = None,
    page: str | Path | None = None,
    command: str | None = None,
    console: Console | None = None,
) -> Path | None:
    """Train all cells of a study with all seeds, and compare them.

    ``<out>/<cell>/seed-<n>/`` are run folders of ``memattn.train``. Finished runs are kept, an
    interrupted one goes on at its last checkpoint. At the end ``results.json``, ``results.csv``,
    ``results.md`` and ``curves.png`` are written. Seeds are the outer loop, so that cells stay
    comparable whenever it is stopped. The parts of a study that has some are run one after
    another, in folders of their own, and ``results.md`` and the page have those of all.

    Args:
        study: The study.
        max_minutes: Stop with a checkpoint after so many minutes, or earlier; None runs to the
            end. An evaluation that is due and the last checkpoint come on top.
        page: A Markdown file to write as well, with the tables and the curves, whose picture stands
            beside it. What an earlier one has from its heading ``Reading`` on is kept.
        command: What to print as the command that made the results; None takes that of the
            process.
        console: Where to print.

    Returns:
        Path of ``results.md``, or None where runs are left to do.

    Raises:
        ValueError: If a size or an option is wrong, or the folder has runs of another study.
        KeyboardInterrupt: On Ctrl-C, after a checkpoint; the same call goes on from there.
        OSError: If the corpus cannot be fetched or the disk is full.
    """
    # a pipe has no width to keep to
    console = console or Console(width=None if sys.stdout.isatty() else 160)
    if max_minutes is not None and not max_minutes > 0.0:
        must("max_minutes", "be above 0", max_minutes)
    began = time.perf_counter()
    left = lambda: None if max_minutes is None else 60.0 * max_minutes - time.perf_counter() + began
    program = Path(sys.argv[0])
    if program.name == "__main__.py":  # python -m memattn
        program = program.parent
    command = command or shlex.join([program.name, *sys.argv[1:]])
    if parts := study.parts():
        for name, part in parts.items():
            seconds = left()
            _say(console, f"part {name}")
            if seconds is not None and seconds <= 0.0:
                _say(console, f"{name} is not finished; the same command goes on")
                return None
            minutes = None if seconds is None else seconds / 60.0
            if run_study(part, max_minutes=minutes, command=command, console=console) is None:
                return None
        return _written(write_parts(study, None if page is None else Path(page)), page, console)
    first = _first_run(study)
    if first is not None and not first.is_finished:
        _say(console, f"first {first}")
        if not _train(study, first, left(), console):
            _say(console, f"{first} is not finished; the same command goes on")
            return None
    with console.status("fetching and tokenizing the text"):
        corpus = prepare_data(study.text_config())
        cells = study.plan(len(corpus.tokenizer))
    runs = plan_runs(study, cells)
    for run in runs:
        _check_same(run, study.folder_option)
    write_text(Path(study.out) / "config.yaml", study.to_yaml())
    for cell in cells:
        _say(console, str(cell))
    for number, run in enumerate(runs, 1):
        if run.is_finished:
            continue
        seconds = left()
        if seconds is not None and seconds <= 0.0:
            break
        _say(console, f"run {number} of {len(runs)}: {run}{_time_left(runs)}")
        if not _train(study, run, seconds, console):
            break
        _measure(run, study)
    done = [run for run in runs if run.is_finished]
    if len(done) < len(runs):
        _say(
            console,
            f"{len(done)} of {len(runs)} runs are finished{_time_left(runs)}; "
            "the same command goes on",
        )
        return None
    for run in runs:
        _measure(run, study)  # where a run was stopped in between
    results = [
        read_run(run.folder, run.cell.name, run.seed, run.max_steps, study.measures) for run in runs
    ]
    facts = {
        "command": command,
        "config": study.to_dict(),
        "train_tokens": len(corpus.train.ids),
        "held_out_tokens": 0 if corpus.held_out is None else len(corpus.held_out.ids),
    }
    metrics = {(r.cell.name, r.seed): read_metrics(r.folder / "metrics.csv") for r in runs}
    page = None if page is None else Path(page)
    report = write_report(study, cells, results, metrics, facts, page)
    print_report(console, study, cells, results)
    return _written(report, page, console)


def _written(report: Path, page: str | Path | None, console: Console) -> Path:
    """Say what was written."""
    _say(console, f"wrote {report}")
    if page is not None:
        _say(console, f"wrote {page}")
    return report


def plan_runs(study: Study, cells: list[Cell]) -> list[StudyRun]:
    """Every cell that is trained with every seed, seed by seed."""
    return [
        StudyRun(cell, seed, study.run_config(cell, seed))
        for seed in study.seeds
        for cell in cells
        if cell.fixed is None
    ]


def _first_run(study: Study) -> StudyRun | None:
    """The run of the weights that the cells start from, with the same checks."""
    config = study.first_run()
    if config is None:
        return None
    run = StudyRun(
        Cell(name=Path(config.training.output_dir).name, model=config.model),
        config.training.seed,
        config,
    )
    _check_same(run, study.folder_option)
    return run


def _check_same(run: StudyRun, option: str) -> None:
    """Raise unless the run's folder is new or holds the same run."""
    file = run.folder / "config.yaml"
    if not file.is_file():
        return
    check_same_settings(option, file, load_config(file).to_dict(), run.config.to_dict(), _FREE)


def _train(study: Study, run: StudyRun, seconds: float | None, console: Console) -> bool:
    """Train until the run is finished or time is up; return whether it is finished."""
    try:
        if not study.trains_itself(run.config):
            train(run.config, resume=True, max_seconds=seconds, progress=console.is_terminal)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"in {run}; the same command goes on from there") from stop
    return run.is_finished


def _measure(run: StudyRun, study: Study) -> None:
    """Write the measures of a finished run that the study computes itself, once."""
    file = run.folder / MEASURES
    if not file.is_file():
        measured = study.measure(run.config)
        if measured:
            write_json(file, measured)


def _time_left(runs: list[StudyRun]) -> str:
    """Estimate of the remaining time, from the speed of the runs so far."""
    steps = seconds = 0.0
    for run in runs:
        file = run.folder / "metrics.csv"
        rows = read_metrics(file) if file.is_file() else []
        if rows:
            steps += rows[-1]["step"]
            seconds += rows[-1]["seconds"]
    if not steps:
        return ""
    left = sum(run.max_steps for run in runs) - steps
    minutes = left * seconds / steps / 60.0
    return f", about {minutes:.0f} min left" if minutes >= 1.0 else ", less than a minute left"


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)
