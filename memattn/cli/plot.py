"""``memattn plot``."""

from typing import Literal


def plot(
    runs: list[str],
    out: str | None = None,
    x: Literal["tokens", "seconds", "step"] = "tokens",
    attention: str | None = None,
) -> int:
    """Draw the loss curves of runs into one picture, or where a model's attention goes.

    With --attention TEXT, a heat map of the share of attention that each layer and head of one
    model puts on each source of keys while it reads the text: tokens of the segment, those of the
    window beside them, persistent keys.

    Args:
        runs: Run folders, as memattn train writes them; with --attention one model, as memattn
            generate takes it.
        out: Picture to write: .png, .svg or .pdf; by default curves.png or attention.png.
        x: What the horizontal axis of loss curves counts.
        attention: Text to read; - for the standard input.
    """
    from rich.console import Console

    if attention is None:
        out = out or "curves.png"
        _plot_curves(runs, out, x)
    else:
        out = out or "attention.png"
        _plot_attention(runs, out, attention)
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
    import sys

    import torch

    from memattn.cli._models import load_model, load_model_tokenizer
    from memattn.viz.attention import attention_mass, plot_attention_mass

    if len(runs) > 1:
        raise ValueError(f"runs must be one model with --attention, got {len(runs)}")
    tokenizer = load_model_tokenizer(runs[0])
    model = load_model(runs[0], None)
    text = sys.stdin.read() if text == "-" else text
    ids = tokenizer(text)["input_ids"]
    if not ids:
        raise ValueError("attention must be a text with at least one token, got none")
    masses = attention_mass(model, torch.tensor([ids], device=model.device))
    plot_attention_mass(masses, out, title=f"{runs[0]}, {len(ids):,} tokens")
