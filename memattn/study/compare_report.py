"""The pictures of a finished comparison, and one page that joins them."""

import json
from pathlib import Path
from typing import Any

from memattn._tables import Table
from memattn.study.compare import CompareStudy
from memattn.train.metrics import read_metrics
from memattn.viz.comparison import comparison_figure
from memattn.viz.curves import save_figure
from memattn.viz.pages import write_figures


def write_pictures(study: CompareStudy) -> tuple[Path, Path]:
    """Draw what a comparison trained and measured, from its results and its models.

    Returns:
        ``comparison.png`` in its folder, and ``report.html``: the table, losses and measures, and
        of each model where its attention goes and what its state is after a held-out text.
    """
    out, seed = Path(study.out), study.seeds[0]
    report = json.loads((out / "results.json").read_text(encoding="utf-8"))
    runs = report["runs"]
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
    path, page = out / "comparison.png", out / "report.html"
    figure = comparison_figure(curves, bars, title=study.heading)
    save_figure(figure, path)
    figure = comparison_figure(curves, bars)  # drawn for a page, it takes other colours
    table = Table.of_markdown((out / "results.md").read_text(encoding="utf-8"))
    figures: dict[str, Any] = {"": table, "Losses and measures": figure}
    for name in study.cell_names:
        figures |= _model_figures(name, out / name / f"seed-{seed}" / "model", study)
    write_figures(figures, page, title=study.heading)
    return path, page


def _model_figures(name: str, folder: Path, study: CompareStudy) -> dict[str, Any]:
    """What a model does with the beginning of the texts that are held out."""
    import torch

    from memattn.study.compared import load_trained
    from memattn.train.setup import held_out_texts, run_tokenizer
    from memattn.viz.models import model_figures

    tokenizer = run_tokenizer(study.text_config())
    ids: list[int] = []
    for text in held_out_texts(study.data):
        ids += tokenizer(text)["input_ids"]
        if len(ids) >= study.data.seq_len:
            break
    return model_figures(name, load_trained(folder), torch.tensor([ids[: study.data.seq_len]]))
