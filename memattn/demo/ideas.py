"""One small task for each system, of the kind that its idea is for, beside the model without it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from memattn.demo.config import STARTS, DemoConfig
from memattn.demo.plan import Stage
from memattn.demo.rows import format_bytes
from memattn.demo.texts import held_out_bits, held_out_ids
from memattn.demo.workers import Workers
from memattn.evaluate import recall
from memattn.evaluate.batch_loss import base_alone
from memattn.files import write_json
from memattn.models import PRESETS
from memattn.nn.chapter_memory import MemoryCrossAttention
from memattn.parts.future import measure_future
from memattn.train import DataConfig, ModelConfig, TaskConfig, TrainConfig, train
from memattn.train.attached import load_model_folder
from memattn.train.setup import run_tokenizer
from memattn.train.task_corpus import make_task

IDEA_HEADS = ("system", "task", "with its idea", "without")
# recall beyond what windows reach: models of two small layers learn it in seconds
RECALL_STEPS, RECALL_WINDOW, RECALL_LEN, RECALL_BATCH = 400, 16, 64, 16
RECALL_SIZES = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=96,
    initializer_range=0.1,
)
RECALL_TITANS = dict(
    variant="mag", chunk_size=16, lr=0.1, max_norm=1.0, momentum=None, num_persistent_tokens=0
)
SAMPLES = 64

Row = dict[str, str]


def measure_ideas(
    config: DemoConfig, results: Sequence[Mapping[str, Any]], workers: Workers
) -> list[Row]:
    """Measure every preset that has such a task, unless that was done.

    Args:
        config: The demo, whose models are trained.
        results: What the demo measured of each preset.
        workers: Who measures.
    """
    file = Path(config.out) / "ideas.json"
    rows: dict[str, Row] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    states = {result["preset"]: result["state_bytes"][-1] for result in results}
    jobs = {
        preset: partial(measure, config, states)
        # the longest first: these have to train
        for preset, measure in reversed(_MEASURES.items())
        if preset in PRESETS and preset not in rows
    }
    for preset, cells in workers.run(jobs, "what each idea is for:"):
        rows[preset] = dict(zip(IDEA_KEYS, (preset, *cells), strict=True))
        write_json(file, rows)
    return [rows[preset] for preset in _MEASURES if preset in rows]


IDEA_KEYS = ("system", "task", "found", "without")


def idea_rows(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The cells, as text."""
    return [tuple(row[key] for key in IDEA_KEYS) for row in rows]


def idea_table(rows: Sequence[Row]) -> Table:
    """One row for each system."""
    table = Table(title="what each idea is for")
    for name in IDEA_HEADS:
        table.add_column(name)
    for cells in idea_rows(rows):
        table.add_row(*cells)
    return table


def _segmented(config: DemoConfig, states: Mapping[str, Any]) -> tuple[str, str, str]:
    """A state that does not grow with the text."""
    (tokens, size), (_, whole) = states["segmented"], states["vanilla"]
    return (
        f"state after {tokens:,} tokens, beside all keys",
        format_bytes(size),
        format_bytes(whole),
    )


def _future(config: DemoConfig, states: Mapping[str, Any]) -> tuple[str, str, str]:
    """Predicted attention to the tokens ahead against the true one."""
    model = load_model_folder(Path(config.out) / "future" / "model")
    ids = held_out_ids(config)[None]
    torch.manual_seed(config.seed)
    untrained = type(model)(model.config)
    trained, new = (measure_future(x, ids).cosine.nanmean() for x in (model, untrained))
    task = "predict what attention to the tokens ahead will say: cosine, after and before training"
    return task, f"{trained:.2f}", f"{new:.2f}"


def _memory(config: DemoConfig, states: Mapping[str, Any]) -> tuple[str, str, str]:
    """The text with the chapters, and with what they add taken away."""
    model = load_model_folder(Path(config.out) / "memory_transformer" / "model")
    opened = held_out_bits(config, model)
    with _closed_memory(model):
        closed = held_out_bits(config, model)
    task = "bits per byte of the held-out text, with its memory and with that closed"
    return task, f"{opened:.3f}", f"{closed:.3f}"


@contextmanager
def _closed_memory(model: nn.Module) -> Iterator[None]:
    """Chapters add nothing meanwhile."""
    layers: list[Any] = [m.o_proj for m in model.modules() if isinstance(m, MemoryCrossAttention)]
    kept = [layer.weight.detach().clone() for layer in layers]
    with torch.no_grad():
        for layer in layers:
            layer.weight.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, weight in zip(layers, kept, strict=True):
                layer.weight.copy_(weight)


def _titans(config: DemoConfig, states: Mapping[str, Any]) -> tuple[str, str, str]:
    """Pairs that stand farther back than windows reach."""
    window = dict(window_size=RECALL_WINDOW)
    accuracy = [
        _recall(config, preset, options)
        for preset, options in (
            ("titans", RECALL_TITANS | window),
            ("segmented", dict(segment_len=None, num_persistent_tokens=0) | window),
        )
    ]
    task = (
        f"recall pairs in {4 * RECALL_LEN} tokens through windows of {RECALL_WINDOW}: right answers"
    )
    return task, f"{accuracy[0]:.0%}", f"{accuracy[1]:.0%}"


def _recall(config: DemoConfig, preset: str, options: dict[str, Any]) -> float:
    """Train a small model on recall, and ask it in texts four times as long."""
    run = TrainConfig(
        model=ModelConfig(preset=preset, options={**RECALL_SIZES, **options}),
        data=DataConfig(
            task=TaskConfig(options=dict(vocab_size=24, num_pairs=4), samples=4000),
            held_out=0.02,
            seq_len=RECALL_LEN,
            packed=False,
            cache_dir=config.cache_dir,
        ),
        training=replace(
            config.training(f"recall/{preset}", Stage(RECALL_STEPS, RECALL_STEPS, evaluate=False)),
            batch_size=RECALL_BATCH,
            base_model_lr=6e-3,
            embedding_lr=None,
            memory_lr=None,
            weight_decay=0.0,
        ),
    )
    result = train(run, resume=True, progress=False)
    assert run.data.task is not None
    found = recall(
        load_model_folder(result.output_dir / "model"),
        make_task(run.data.task, run_tokenizer(run)),
        lengths=[4 * RECALL_LEN],
        samples=SAMPLES,
    )
    return found.accuracy


def _shiftable(config: DemoConfig, states: Mapping[str, Any]) -> tuple[str, str, str]:
    """The text that specialists have learned, and the base, which has stayed."""
    model = load_model_folder(Path(config.out) / "shiftable" / "model")
    base = lambda batch: base_alone(model, batch)
    learned = held_out_bits(config, model, config.specialty)
    before = held_out_bits(config, model, config.specialty, base)
    task = f"bits per byte of {config.specialty}, which {STARTS['shiftable']} has not read"
    return task, f"{learned:.3f}", f"{before:.3f}"


_MEASURES = {
    "segmented": _segmented,
    "future": _future,
    "memory_transformer": _memory,
    "titans": _titans,
    "shiftable": _shiftable,
}
