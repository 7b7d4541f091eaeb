"""``memattn plot``."""

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor


def plot(
    runs: list[str],
    out: str | None = None,
    x: Literal["tokens", "seconds", "step"] = "tokens",
    text: str | None = None,
    texts: tuple[str, ...] = (),
    tokens: int | None = None,
) -> int:
    """Draw the loss curves of runs, or pictures of a model while it reads a text.

    memattn plot RUN ... draws loss curves.

    memattn plot attention MODEL --text TEXT draws heat maps of the attention mass of each layer and
    head on each source of keys: tokens of the segment, other tokens of the window, persistent keys,
    and keys that a part adds.

    memattn plot state MODEL --text TEXT draws the model's state after the text: changes of its
    memories, norms of the cached keys, and update magnitude, surprise and relevance over the
    tokens. memattn plot state FILE draws a file of memattn memorize.

    memattn plot gates MODEL --text TEXT prints and draws the gates of base and specialists; --texts
    general data-engineering compares texts. Same as memattn gates.

    memattn plot tasks MODEL draws, for each task of a file that DTGMAModel.save wrote, which tokens
    it may see and what it attends to, layer by layer.

    memattn plot influence MODEL --text TEXT changes one token after the other, and draws which
    positions of the output move, and how much: how far back the model looks.

    memattn plot page RUN ... --text TEXT writes one HTML page with the loss curves of the runs and
    the attention and state of each model. memattn compare writes such a page, too.

    memattn plot VIEW MODEL --text TEXT draws another picture of a part of the model. The error
    message for an unknown view lists the available ones.

    Args:
        runs: Run folders, as memattn train writes them; or a view, and one model, as memattn
            generate takes it, for tasks a file. A run folder of such a name is ./attention, for
            example.
        out: Picture to write: .png, .svg, .pdf or .html; by default curves.png, VIEW.png or
            page.html.
        x: What the horizontal axis of loss curves counts.
        text: Text that the model reads; - for the standard input.
        texts: For gates: corpora, files or folders to compare.
        tokens: For gates: largest number of tokens of each text, 4096 by default. For influence:
            number of tokens of the text, 384 by default.
    """
    from pathlib import Path

    from rich.console import Console

    from memattn import models  # knows the parts
    from memattn.parts.views import part_views

    assert models
    view, names = runs[0], ("attention", "state", "influence", *part_views())
    if view == "page":
        if text is None or len(runs) < 2:
            got = "none" if len(runs) < 2 else "no text"
            raise ValueError(f"runs must be page and one run at least, with a text, got {got}")
        out = out or "page.html"
        _write_page(runs[1:], out, x, text)
    elif view == "tasks":
        if len(runs) != 2:
            raise ValueError(f"runs must be tasks and one file, got {len(runs) - 1} files")
        if text is not None or texts:
            raise ValueError("text must be left out to plot tasks, got a text")
        out = out or "tasks.png"
        _plot_tasks(runs[1], out)
    elif view in names:
        if len(runs) != 2:
            raise ValueError(f"runs must be {view} and one model, got {len(runs) - 1} models")
        if view == "gates":
            from memattn.cli.gates import gates

            return gates(
                runs[1], text, texts, 4096 if tokens is None else tokens, out or "gates.png"
            )
        if tokens is not None and tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {tokens}")
        if tokens is not None and view != "influence":
            raise ValueError(f"tokens must be left out but for gates and influence, got {tokens}")
        if texts:
            raise ValueError(f"texts must be left out but for gates, got {', '.join(texts)}")
        is_file = view == "state" and Path(runs[1]).expanduser().is_file()
        if text is not None and is_file:
            raise ValueError("text must be left out to plot the state of a file, got a text")
        if text is None and view == "state" and not is_file:
            raise ValueError(
                "text must be given to plot the state of a model; only a file of memattn memorize "
                f"needs none, got {runs[1]}"
            )
        if text is None and not is_file:
            raise ValueError(f"text must be given to plot {view}, got None")
        out = out or f"{view}.png"
        _plot_view(view, runs[1], out, text, 384 if tokens is None else tokens)
    else:
        if text is not None:
            others = ", ".join(("page", *names))
            raise ValueError(f"text must be left out but for {others}, got a text")
        if texts:
            raise ValueError(f"texts must be left out but for gates, got {', '.join(texts)}")
        out = out or "curves.png"
        _plot_curves(runs, out, x)
    Console().print(f"wrote {out}", highlight=False, soft_wrap=True)
    return 0


def _plot_curves(runs: list[str], out: str, x: str) -> None:
    from memattn.viz import plot_curves

    plot_curves(_read_metrics(runs), out, x=x)


def _read_metrics(runs: list[str]) -> "dict[str, list[dict[str, Any]]]":
    """Rows of metrics.csv by the name of the run."""
    from pathlib import Path

    from memattn.train.metrics import read_metrics

    metrics = {}
    for run in runs:
        file = Path(run).expanduser() / "metrics.csv"
        if not file.is_file():
            lacks = "" if file.parent.is_dir() else ", which does not exist"
            raise FileNotFoundError(f"run must be a folder with metrics.csv, got {run}{lacks}")
        metrics[run if len(runs) > 1 else Path(run).name] = read_metrics(file)
    return metrics


def _plot_tasks(name: str, out: str) -> None:
    from pathlib import Path

    from memattn.dtgma import DTGMAModel
    from memattn.viz import plot_tasks

    path = Path(name).expanduser()
    plot_tasks(DTGMAModel.load(path), out, title=path.stem)


def _write_page(runs: list[str], out: str, x: str, text: str) -> None:
    import sys
    from pathlib import Path

    from memattn.viz import write_figures
    from memattn.viz.curves import curves_figure
    from memattn.viz.models import model_figures

    if Path(out).suffix != ".html":
        raise ValueError(f"out must end in .html for page, got {out}")
    text = sys.stdin.read() if text == "-" else text
    metrics = _read_metrics(runs)
    figures = {"Losses": curves_figure(metrics, x=x)}
    for run, name in zip(runs, metrics, strict=True):
        figures |= model_figures(name, *_read(run, text))
    write_figures(figures, out, title=", ".join(metrics))


def _plot_view(view: str, name: str, out: str, text: str | None, tokens: int) -> None:
    from pathlib import Path

    from memattn.evaluate import influence
    from memattn.models import KeptMemory
    from memattn.parts.views import part_views
    from memattn.viz import (
        attention_mass,
        plot_attention_mass,
        plot_influence,
        plot_view,
        visualize_model_state,
    )

    if text is None:
        kept = KeptMemory.load(Path(name).expanduser())
        title = f"{name}, {kept.num_tokens:,} tokens"
        visualize_model_state(kept, out, title=title)
        return
    model, ids = _read(name, text)
    ids = ids[:, :tokens] if view == "influence" else ids
    title = f"{view} of {name}, {ids.numel():,} tokens"
    if view == "attention":
        plot_attention_mass(attention_mass(model, ids), out, title=title)
    elif view == "influence":
        plot_influence(influence(model, ids), out, title=title)
    elif view == "state":
        kept = KeptMemory.of(model)
        kept.read(model, ids)
        visualize_model_state(kept, out, title=title)
    else:
        plot_view(view, part_views()[view].measure(model, ids), out, title=title)


def _read(name: str, text: str) -> "tuple[Any, Tensor]":
    """The model, and the tokens of the text, as many as it takes."""
    from memattn.cli._models import load_model, load_model_tokenizer, read_text

    tokenizer = load_model_tokenizer(name)
    model = load_model(name, None)
    return model, read_text(model, tokenizer, text)
