"""``memattn evaluate``."""


def evaluate(
    model: str,
    data: str | None = None,
    context_len: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    cache_dir: str = "~/.cache/memattn",
    device: str | None = None,
    json: str | None = None,
) -> int:
    """Measure the perplexity of a model on a text.

    Every token is predicted once and weighs the same. Bits per byte and the perplexity of a word
    compare models with different tokenizers.

    Args:
        model: A folder with a saved model and its tokenizer, a run folder, or a name on the
            Hugging Face hub.
        data: A corpus (memattn data --list), a text file, a folder or a Hugging Face dataset. By
            default the documents that the run folder held out from training.
        context_len: Tokens in a window; by default the model's own maximum, at most 1024.
        stride: Tokens by which the window moves; by default as many as it has.
        batch_size: Windows in one forward pass.
        cache_dir: Folder with fetched corpora.
        device: Where to run, such as cpu or cuda; by default CUDA where there is one.
        json: File to write the numbers to.
    """
    from rich.console import Console
    from rich.table import Table

    from memattn.cli._models import load_model, load_model_tokenizer
    from memattn.evaluate import perplexity
    from memattn.files import write_json

    tokenizer = load_model_tokenizer(model)
    texts, name = _load_texts(model, data, cache_dir)
    result = perplexity(
        load_model(model, device),
        texts,
        tokenizer,
        context_len=context_len,
        stride=stride,
        batch_size=batch_size,
        progress=True,
    )
    if json is not None:
        write_json(json, {"model": model, "data": name, **result.to_dict()})
    table = Table(title=f"{model} on {name}, {len(texts)} documents", title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for measure, value in (
        ("loss (nats per token)", f"{result.loss:.4f}"),
        ("perplexity of a token", f"{result.perplexity:,.2f}"),
        ("perplexity of a word", f"{result.word_perplexity:,.2f}"),
        ("bits per byte", f"{result.bits_per_byte:.4f}"),
        ("tokens", f"{result.num_tokens:,}"),
        ("words", f"{result.num_words:,}"),
        ("bytes", f"{result.num_bytes:,}"),
        *((name, f"{value:.4f}") for name, value in result.losses.items()),
    ):
        table.add_row(measure, value)
    Console().print(table)
    return 0


def _load_texts(model: str, data: str | None, cache_dir: str) -> tuple[list[str], str]:
    """The texts and what they are called."""
    from pathlib import Path

    from memattn.data import load_documents, split_documents
    from memattn.train import load_config

    if data is not None:
        documents = load_documents(data, cache_dir=cache_dir)
        return [document.text for document in documents], data
    file = Path(model).expanduser() / "config.yaml"
    if not file.is_file():
        raise ValueError(f"data must be given where the model is not a run folder, got {model}")
    source = load_config(file).data
    if source.held_out == 0.0:
        raise ValueError(f"data must be given where the run held out no documents, got {model}")
    documents = load_documents(
        source.dataset_name,
        subset=source.dataset_subset,
        split=source.dataset_split,
        text_field=source.text_field,
        separator=source.document_separator,
        cache_dir=cache_dir,
    )
    held_out = split_documents(documents, source.held_out, seed=source.split_seed).held_out
    return [document.text for document in held_out], f"held-out part of {source.dataset_name}"
