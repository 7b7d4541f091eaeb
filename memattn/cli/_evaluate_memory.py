"""``memattn evaluate memory``."""


def memory(
    model: str,
    data: str | None = None,
    context_len: int | None = None,
    samples: int = 4,
    cache_dir: str = "~/.cache/memattn",
    device: str | None = None,
    out: str | None = None,
    json: str | None = None,
) -> int:
    """Measure how the neural memory of a model is used while it reads a text.

    For each layer: surprise of the tokens, update of the weights per chunk, relevance (the memory's
    share of the layer's output), utilisation of the directions of its weights, and retrieval of
    tokens by distance from the end (1 is perfect, 0 no better than before the text).

    Args:
        model: A folder with a saved model and its tokenizer, or a run folder.
        data: A corpus (memattn data --list), a text file, a folder or a Hugging Face dataset; by
            default the documents that the run held out from training.
        context_len: Tokens in a window; by default the model's own maximum, at most 1024.
        samples: Largest number of windows.
        cache_dir: Folder with fetched corpora.
        device: Device, such as cpu or cuda; by default CUDA if there is one.
        out: Picture of the measures: .png, .svg, .pdf or .html.
        json: File to write the numbers to.
    """
    from rich.console import Console

    from memattn.cli._evaluate_texts import load_texts
    from memattn.cli._runs import load_either
    from memattn.evaluate.memory import memory_tables, memory_use, memory_values
    from memattn.files import write_json
    from memattn.parts.memory_measures import memory_layers
    from memattn.viz import plot_view

    loaded = load_either(model, None, None, device)
    memory_layers(loaded.model)  # fails before texts are fetched
    texts, name = load_texts(loaded, data, cache_dir)
    use = memory_use(
        loaded.model, texts, loaded.tokenizer, context_len=context_len, samples=samples
    )
    n, length = use.uses[0].relevance.shape
    title = f"{loaded.name} on {name}, {n} window{'s' * (n > 1)} of {length:,} tokens"
    if json is not None:
        facts = {"model": loaded.name, "data": name, "samples": n, "context_len": length}
        write_json(json, {**facts, "layers": memory_values(use)})
    console = Console()
    console.print(title, highlight=False)
    for table in memory_tables(use):
        console.print(table.to_rich())
    if out is not None:
        plot_view("memory", use, out, title=title)
        console.print(f"wrote {out}", highlight=False, soft_wrap=True)
    return 0
