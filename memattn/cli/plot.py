"""``memattn plot``."""

from typing import Literal


def plot(
    runs: list[str],
    out: str = "curves.png",
    x: Literal["tokens", "seconds", "step"] = "tokens",
) -> int:
    """Draw the loss curves of runs into one picture.

    Args:
        runs: Run folders, as memattn train writes them.
        out: Picture to write: .png, .svg or .pdf.
        x: What the horizontal axis counts.
    """
    from pathlib import Path

    from rich.console import Console

    from memattn.train.metrics import read_metrics
    from memattn.viz import plot_curves

    metrics = {}
    for run in runs:
        file = Path(run).expanduser() / "metrics.csv"
        if not file.is_file():
            raise FileNotFoundError(f"run must be a folder with metrics.csv, got {run}")
        metrics[run if len(runs) > 1 else Path(run).name] = read_metrics(file)
    plot_curves(metrics, out, x=x)
    Console().print(f"wrote {out}", highlight=False)
    return 0
