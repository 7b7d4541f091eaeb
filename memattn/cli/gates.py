"""``memattn gates`` and ``memattn plot gates``."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memattn.parts.gate_report import LayerGates


def gates(
    model: str,
    text: str | None = None,
    texts: tuple[str, ...] = (),
    tokens: int = 4096,
    out: str = "gates.png",
) -> int:
    """Print and draw the gates of base and specialists for the tokens of a text.

    With --text, the mean gates of each layer are printed, and a heat map of layers and tokens is
    drawn. With --texts, the mean gates on several texts, such as a general and a specialist text,
    are printed in columns and drawn over the layers.

    Args:
        model: A model with specialists: a folder, a run folder or a name on the Hugging Face hub.
        text: Text that the model reads; - for the standard input.
        texts: Corpora, files or folders; if they have several documents, those that training holds
            out by default are read.
        tokens: Largest number of tokens of each text.
        out: Picture to write: .png, .svg, .pdf or .html.
    """
    from rich.console import Console

    from memattn.cli._models import load_model, load_model_tokenizer, read_text
    from memattn.parts.gate_report import gate_lines, measure_gates
    from memattn.viz import plot_gate_comparison, plot_view

    if (text is None) == (not texts):
        raise ValueError("text must be given, or texts, and not both")
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    tokenizer, loaded = load_model_tokenizer(model), load_model(model, None)
    console = Console()
    if text is not None:
        ids = read_text(loaded, tokenizer, text)
        layers = measure_gates(loaded, ids)
        lines = "\n".join(gate_lines(layers))
        console.print(lines, highlight=False, markup=False, soft_wrap=True)
        plot_view("gates", layers, out, title=f"{model}, {ids.numel():,} tokens")
    else:
        found = {name: _means(loaded, tokenizer, name, tokens) for name in texts}
        console.print(_table(found))
        first = next(iter(found.values()))
        means = {
            name: {branch: [layer.gates[0, 0, i].item() for layer in layers]
                   for i, branch in enumerate(layers[0].names)}
            for name, layers in found.items()
        }  # fmt: skip
        plot_gate_comparison(means, [layer.layer for layer in first], out, title=model)
    console.print(f"wrote {out}", highlight=False, soft_wrap=True)
    return 0


def _means(model: Any, tokenizer: Any, name: str, tokens: int) -> "list[LayerGates]":
    """Mean gates of each layer over ``tokens`` tokens of a text, as gates of one token."""
    import torch

    from memattn.data import load_documents, split_documents
    from memattn.parts.gate_report import LayerGates, measure_gates

    documents = load_documents(name)
    if len(documents) > 1:
        documents = split_documents(documents).held_out
    limit = getattr(model.config, "position_limit", None) or 512
    sums: list[LayerGates] = []
    left = tokens
    for document in documents:
        ids = tokenizer(document.text)["input_ids"][: min(limit, left)]
        if not ids:
            continue
        layers = measure_gates(model, torch.tensor([ids], device=model.device))
        totals = [layer.gates.double().sum(1, keepdim=True) for layer in layers]
        sums = [
            layer._replace(gates=total + (sums[i].gates if sums else 0.0))
            for i, (layer, total) in enumerate(zip(layers, totals, strict=True))
        ]
        left -= len(ids)
        if not left:
            break
    return [layer._replace(gates=layer.gates / (tokens - left)) for layer in sums]


def _table(found: "dict[str, list[LayerGates]]") -> Any:
    """Table of mean gates of each layer and branch, with a column per text and their difference."""
    from rich.table import Table

    names = list(found)
    table = Table("layer", "branch", *names, *([f"{names[-1]} - {names[0]}"] * (len(names) > 1)))
    for i, layer in enumerate(found[names[0]]):
        for j, branch in enumerate(layer.names):
            values = [found[name][i].gates[0, 0, j].item() for name in names]
            gap = [f"{values[-1] - values[0]:+.3f}"] * (len(names) > 1)
            table.add_row(str(layer.layer), branch, *(f"{value:.3f}" for value in values), *gap)
    return table
