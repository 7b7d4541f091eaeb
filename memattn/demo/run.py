"""Runs the demo: plan, train, measure, report. Each finished part is kept and never done twice."""

import json
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from memattn.data._files import write_text
from memattn.demo.measure import measure_model, measure_speed
from memattn.models import PRESETS
from memattn.train import DataConfig, ModelConfig, TrainConfig, TrainingConfig, train
from memattn.train.metrics import read_metrics
from memattn.train.setup import prepare_data

# small enough for two CPU cores, and large enough that the losses visibly fall
SIZES = dict(
    hidden_size=192,
    num_hidden_layers=6,
    num_attention_heads=3,
    intermediate_size=512,
    max_position_embeddings=2048,
)
EVALUATIONS = 4  # of the held-out part in each run, where they are a fifth of its time or less
MIN_STEPS = 10
MAX_EPOCHS = 4.0  # more would show how well a text is learned by heart


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demo does.

    Attributes:
        out: Folder of the results.
        minutes: Time for training all presets together; speeds are measured first, and the number
            of tokens is what fits, the same for each preset.
        corpus: A corpus, a text file, a folder or a Hugging Face dataset.
        seed: The one seed of weights and order.
        seq_len: Tokens in a row.
        batch_size: Rows in a step.
        vocab_size: Entries of the tokenizer, which is trained on the corpus.
        sizes: Sizes of every model, keywords of the presets.
        cache_dir: Folder for fetched corpora, tokenizers and tokens.
    """

    out: str = "runs/demo"
    minutes: float = 3.0
    corpus: str = "wiki"
    seed: int = 0
    seq_len: int = 512
    batch_size: int = 1  # on so few tokens, more steps learn more than larger ones
    vocab_size: int = 4096
    sizes: dict[str, Any] = field(default_factory=lambda: dict(SIZES))
    cache_dir: str = "~/.cache/memattn"

    def __post_init__(self) -> None:
        if not 0.0 < self.minutes < float("inf"):
            raise ValueError(f"minutes must be positive and finite, got {self.minutes}")

    def train_config(self, preset: str, steps: int = 1, evaluations: int = 1) -> TrainConfig:
        """The training run of one preset, with so many held-out evaluations."""
        return TrainConfig(
            model=ModelConfig(preset=preset, options=self.sizes),
            data=DataConfig(
                dataset_name=self.corpus,
                vocab_size=self.vocab_size,
                seq_len=self.seq_len,
                cache_dir=self.cache_dir,
            ),
            training=TrainingConfig(
                output_dir=str(Path(self.out) / preset),
                max_steps=steps,
                batch_size=self.batch_size,
                base_model_lr=3e-3,
                warmup_steps=max(1, steps // 10),
                eval_steps=-(-steps // evaluations),
                save_steps=max(1, -(-steps // 4)),
                keep_checkpoints=1,
                seed=self.seed,
            ),
        )


def run_demo(config: DemoConfig, *, fresh: bool = False, console: Console | None = None) -> Path:
    """Train, audit and compare every preset of ``memattn.models.PRESETS``.

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
    if fresh and (out / "plan.json").is_file():
        shutil.rmtree(out)
    began = time.perf_counter()
    plan = _plan(config, out, console)
    results = [_result(config, plan, preset, console) for preset in PRESETS]
    report = {
        "config": asdict(config),
        **plan,
        "versions": _versions(),
        "seconds_of_this_call": time.perf_counter() - began,
        "results": results,
    }
    from memattn.demo.page import write_page

    write_text(out / "results.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    curves = {r["preset"]: read_metrics(out / r["preset"] / "metrics.csv") for r in results}
    page = write_page(out, report, curves)
    console.print(_table(report))
    console.print(
        f"One seed, {plan['tokens']:,} tokens, small models: differences in loss are no claim.",
        highlight=False,
    )
    for what, path in (
        ("page", page),
        ("numbers", out / "results.json"),
        ("curves", out / "curves.png"),
    ):
        console.print(f"{what:<8} {path}", highlight=False, soft_wrap=True)
    return page


def _plan(config: DemoConfig, out: Path, console: Console) -> dict[str, Any]:
    """How many steps each preset gets; measured once, and kept."""
    file = out / "plan.json"
    settings = json.loads(json.dumps(asdict(config)))
    settings.pop("out")
    if file.is_file():
        plan = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name, value in settings.items() if plan["settings"].get(name) != value]
        if changed:
            raise ValueError(
                f"out must be a new folder for another {', '.join(changed)} (or use --fresh), "
                f"got {out}"
            )
        console.print(f"going on with the demo in {out}", highlight=False)
        return plan
    with console.status(f"fetching and tokenizing {config.corpus}"):
        corpus = prepare_data(config.train_config(next(iter(PRESETS))))
    held_out = 0 if corpus.held_out is None else len(corpus.held_out.ids)
    console.print(
        f"{config.corpus}: {corpus.train.num_documents} documents, {len(corpus.train.ids):,} "
        f"tokens to train on, {held_out:,} held out",
        highlight=False,
    )
    step_tokens = config.batch_size * config.seq_len
    seconds_per_token = {}
    for preset in PRESETS:
        with console.status(f"measuring the speed of {preset}"):
            speed = measure_speed(config.train_config(preset), corpus)
        console.print(f"{preset}: about {speed:,.0f} tokens/s", highlight=False)
        seconds_per_token[preset] = 1.0 / speed
    # what fits, in tokens of each preset; a forward pass takes a third of a training step's time
    budget = 60.0 * config.minutes / sum(seconds_per_token.values())
    evaluations = max(1, min(EVALUATIONS, int(0.2 * budget / max(held_out / 3, 1))))
    steps = int((budget - evaluations * held_out / 3) / step_tokens)
    longest = int(MAX_EPOCHS * len(corpus.train.ids) / step_tokens)
    steps = max(MIN_STEPS, min(steps, longest))
    plan = {
        "settings": settings,
        "steps": steps,
        "evaluations": evaluations,
        "tokens": steps * step_tokens,
        "train_tokens": len(corpus.train.ids),
        "held_out_tokens": held_out,
        "device": _device(),
    }
    write_text(file, json.dumps(plan, indent=1) + "\n")
    return plan


def _result(
    config: DemoConfig, plan: dict[str, Any], preset: str, console: Console
) -> dict[str, Any]:
    """Train and measure one preset, unless that was done."""
    folder = Path(config.out) / preset
    file = folder / "result.json"
    if file.is_file():
        console.print(f"{preset}: kept from before", highlight=False)
        return json.loads(file.read_text(encoding="utf-8"))
    steps = plan["steps"]
    console.print(f"{preset}: training on {plan['tokens']:,} tokens", highlight=False)
    try:
        trained = train(config.train_config(preset, steps, plan["evaluations"]), resume=True)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"in {preset}; the same command goes on from there") from stop
    rows = read_metrics(folder / "metrics.csv")
    speeds = sorted(row["tokens_per_second"] for row in rows if row["tokens_per_second"])
    with console.status(f"auditing {preset}"):
        measured = measure_model(trained.model_dir, seed=config.seed)
    audit = measured["audit"]
    console.print(f"{preset}: held-out loss {trained.eval_loss:.3f}, audit {audit['verdict']}")
    result = {
        "preset": preset,
        "held_out_loss": trained.eval_loss,
        "train_loss": trained.loss,
        "tokens": trained.tokens,
        # of all steps, those before an interruption too
        "tokens_per_second": speeds[len(speeds) // 2],
        "seconds": trained.seconds,
        **measured,
    }
    write_text(file, json.dumps(result, indent=1, allow_nan=False) + "\n")
    return result


def _table(report: dict[str, Any]) -> Table:
    """The comparison, one row for each preset."""
    n = max(tokens for result in report["results"] for tokens, _ in result["state_bytes"])
    table = Table(title=f"{report['tokens']:,} tokens each, on {report['device']}")
    table.add_column("preset")
    for name in ("held-out loss", "tokens/s", f"state after {n:,} tokens", "parameters"):
        table.add_column(name, justify="right")
    table.add_column("audit")
    for cells in table_rows(report):
        style = "green" if cells[-1].startswith("all 0") else "red"
        table.add_row(*cells[:-1], f"[{style}]{cells[-1]}[/]")
    return table


def table_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of the comparison, as text."""
    return [
        (
            result["preset"],
            f"{result['held_out_loss']:.3f}",
            f"{result['tokens_per_second']:,.0f}",
            format_bytes(result["state_bytes"][-1][1]),
            f"{result['parameters'] / 1e6:.2f} M",
            result["audit"]["verdict"],
        )
        for result in report["results"]
    ]


def format_bytes(size: float) -> str:
    """A size in KiB or MiB."""
    return f"{size / 2**20:,.2f} MiB" if size >= 2**20 else f"{size / 2**10:,.0f} KiB"


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
