"""The picture of a finished comparison."""

import json
from pathlib import Path

from memattn.study.compare import CompareStudy
from memattn.train.metrics import read_metrics
from memattn.viz.comparison import plot_comparison


def write_pictures(study: CompareStudy) -> Path:
    """Draw the losses and what was measured of a comparison from its results.

    Returns:
        ``comparison.png`` in its folder.
    """
    out, seed = Path(study.out), study.seeds[0]
    runs = json.loads((out / "results.json").read_text(encoding="utf-8"))["runs"]
    curves = {
        name: read_metrics(out / name / f"seed-{seed}" / "metrics.csv") for name in study.cell_names
    }
    bars = {}
    for measure in study.measures:
        values = {
            name: [
                run[measure.name]
                for run in runs
                if run["variant"] == name and run[measure.name] is not None
            ]
            for name in curves
        }
        values = {name: of_seeds for name, of_seeds in values.items() if of_seeds}
        if values:
            bars[measure.head] = values
    path = out / "comparison.png"
    plot_comparison(curves, bars, path, title=study.heading)
    return path
