"""``memattn plot``."""

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor


VIEWS = ("attention", "future")


def plot(
    runs: list[str],
    out: str | None = None,
    x: Literal["tokens", "seconds", "step"] = "tokens",
    text: str | None = None,
) -> int:
    """Draw the loss curves of runs into one picture, or what a model does with a text.

    memattn plot RUN ... draws loss curves.

    memattn plot attention MODEL --text TEXT draws a heat map of the share of attention that each
    layer and head of the model puts on each source of keys while it reads the text: tokens of the
    segment, those of the window beside them, persistent keys, future keys.

    memattn plot future MODEL --text TEXT draws the same for future keys alone, and at each
    position the cosine between the future part of a layer's output and what the real keys would
    have given.

    Args:
        runs: Run folders, as memattn train writes them; or attention or future, and one model, as
            memattn generate takes it. A run folder of such a name is ./attention.
        out: Picture to write: .png, .svg or .pdf; by default curves.png, attention.png or
            future.png.
        x: What the horizontal axis of loss curves counts.
        text: Text that the model reads; - for the standard input.
    """
    from rich.console import Console

    view, models = runs[0], runs[1:]
    if view in VIEWS:
        if len(models) != 1:
            raise ValueError(f"runs must be {view} and one model, got {len(models)} models")
        if text is None:
            raise ValueError(f"text must be given to plot {view}, got None")
        out = out or f"{view}.png"
        {"attention": _plot_attention, "future": _plot_future}[view](models[0], out, text)
    else:
        if text is not None:
            raise ValueError(f"text must be left out but for {' and '.join(VIEWS)}, got a text")
        out = out or "curves.png"
        _plot_curves(runs, out, x)
    Console().print(f"wrote {out}", highlight=False)
    return 0


def _plot_curves(runs: list[str], out: str, x: str) -> None:
    from pathlib import Path

    from memattn.train.metrics import read_metrics
    from memattn.viz import plot_curves

    metrics = {}
    for run in runs:
        file = Path(run).expanduser() / "metrics.csv"
        if not file.is_file():
            raise FileNotFoundError(f"run must be a folder with metrics.csv, got {run}")
        metrics[run if len(runs) > 1 else Path(run).name] = read_metrics(file)
    plot_curves(metrics, out, x=x)


def _plot_attention(name: str, out: str, text: str) -> None:
    from memattn.viz.attention import attention_mass, plot_attention_mass

    model, ids = _read(name, text)
    plot_attention_mass(attention_mass(model, ids), out, title=f"{name}, {ids.numel():,} tokens")


def _plot_future(name: str, out: str, text: str) -> None:
    from memattn.viz.future import measure_future, plot_future

    model, ids = _read(name, text)
    plot_future(measure_future(model, ids), out, title=f"{name}, {ids.numel():,} tokens")


def _read(name: str, text: str) -> "tuple[Any, Tensor]":
    """The model, and the tokens of the text, as many as it takes."""
    import sys

    import torch

    from memattn.cli._models import load_model, load_model_tokenizer

    tokenizer = load_model_tokenizer(name)
    model = load_model(name, None)
    text = sys.stdin.read() if text == "-" else text
    ids = tokenizer(text)["input_ids"]
    if not ids:
        raise ValueError("text must be one with at least one token, got none")
    limit = getattr(model.config, "position_limit", None)
    if limit is not None and len(ids) > limit:
        sys.stdout.write(f"reading the first {limit} tokens of {len(ids):,}\n")
        ids = ids[:limit]
    return model, torch.tensor([ids], device=model.device)
