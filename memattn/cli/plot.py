"""``memattn plot``."""

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor


def plot(
    runs: list[str],
    out: str | None = None,
    x: Literal["tokens", "seconds", "step"] = "tokens",
    attention: str | None = None,
    future: str | None = None,
) -> int:
    """Draw the loss curves of runs into one picture, or what a model's attention does.

    With --attention TEXT, a heat map of the share of attention that each layer and head of one
    model puts on each source of keys while it reads the text: tokens of the segment, those of the
    window beside them, persistent keys, future keys.

    With --future TEXT, the same for future keys alone, and at each position the cosine between the
    future part of a layer's output and what the real keys would have given.

    Args:
        runs: Run folders, as memattn train writes them; with --attention or --future one model,
            as memattn generate takes it.
        out: Picture to write: .png, .svg or .pdf; by default curves.png, attention.png or
            future.png.
        x: What the horizontal axis of loss curves counts.
        attention: Text to read; - for the standard input.
        future: Text to read; - for the standard input.
    """
    from rich.console import Console

    if attention is not None and future is not None:
        raise ValueError("attention must be left out with --future, got both")
    if attention is not None:
        out = out or "attention.png"
        _plot_attention(runs, out, attention)
    elif future is not None:
        out = out or "future.png"
        _plot_future(runs, out, future)
    else:
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


def _plot_attention(runs: list[str], out: str, text: str) -> None:
    from memattn.viz.attention import attention_mass, plot_attention_mass

    model, ids = _read(runs, "attention", text)
    plot_attention_mass(attention_mass(model, ids), out, title=f"{runs[0]}, {ids.numel():,} tokens")


def _plot_future(runs: list[str], out: str, text: str) -> None:
    from memattn.viz.future import measure_future, plot_future

    model, ids = _read(runs, "future", text)
    plot_future(measure_future(model, ids), out, title=f"{runs[0]}, {ids.numel():,} tokens")


def _read(runs: list[str], option: str, text: str) -> "tuple[Any, Tensor]":
    """The model, and the tokens of the text, as many as it takes."""
    import sys

    import torch

    from memattn.cli._models import load_model, load_model_tokenizer

    if len(runs) > 1:
        raise ValueError(f"runs must be one model with --{option}, got {len(runs)}")
    tokenizer = load_model_tokenizer(runs[0])
    model = load_model(runs[0], None)
    text = sys.stdin.read() if text == "-" else text
    ids = tokenizer(text)["input_ids"]
    if not ids:
        raise ValueError(f"{option} must be a text with at least one token, got none")
    limit = getattr(model.config, "position_limit", None)
    if limit is not None and len(ids) > limit:
        sys.stdout.write(f"reading the first {limit} tokens of {len(ids):,}\n")
        ids = ids[:limit]
    return model, torch.tensor([ids], device=model.device)
