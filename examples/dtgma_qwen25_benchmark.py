"""DTG-MA on text domains: one classification task after the other, on frozen embeddings.

    python examples/dtgma_qwen25_benchmark.py --benchmark text_domains --tasks 4 --epochs 50 \
        --device cpu

The texts are real and come from published packages; texts of one film, president, review or mail
thread are either trained or tested on. The encoder is Qwen2.5-1.5B where the Hugging Face hub can
be reached, and otherwise MiniLM from a package; ``--encoder`` names another one. Embeddings are
kept in the cache folder, so that a second run takes seconds.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from memattn import DTGMAModel, train_continual
from memattn.continual import Stream, continual_metrics
from memattn.continual.embeddings import find_encoder
from memattn.continual.text import text_domains_stream


def main(argv: list[str] | None = None) -> None:
    """Build the stream, train on its tasks in order and print what was forgotten."""
    args = parse(argv)
    encoder = find_encoder(args.encoder, cache_dir=args.cache_dir)
    stream = text_domains_stream(
        args.tasks, encoder, cache_dir=args.cache_dir, seed=args.seed, device=args.device
    )
    torch.manual_seed(args.seed)
    model = DTGMAModel(
        input_dim=stream.input_shape[0],
        hidden_dim=256,
        num_classes=stream.n_outputs,
        n_layers=2,
        n_heads=4,
    )
    tasks = {t.name: (t.train_x, t.train_y, t.test_x, t.test_y) for t in stream.tasks}
    for task in stream.tasks:
        model.register_task(task.name, len(task.classes))
    results = train_continual(
        model, tasks, epochs=args.epochs, device=args.device, seed=args.seed, verbose=True
    )
    report(stream, encoder.name, results["accuracy_matrix"])


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--benchmark", choices=["text_domains"], default="text_domains", help="-")
    parser.add_argument("--tasks", type=int, default=4, help="how many text domains")
    parser.add_argument("--epochs", type=int, default=50, help="passes over each task")
    parser.add_argument("--device", default="cpu", help="where to encode and train")
    parser.add_argument("--encoder", default="auto", help="auto, minilm, a folder or a hub name")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of training")
    parser.add_argument("--cache_dir", type=Path, default=Path("~/.cache/memattn"), help="folder")
    return parser.parse_args(argv)


def report(stream: Stream, encoder: str, accuracy: torch.Tensor) -> None:
    """Print accuracy of each task after its own training and after that of all."""
    table = Table(
        *("task", "classes", "train / test", "always the largest", "learned", "at the end"),
        title=f"DTG-MA on {stream.name}, {encoder}",
    )
    for i, task in enumerate(stream.tasks):
        majority = task.test_y.bincount().max().item() / len(task.test_y)
        shares = (majority, accuracy[i, i].item(), accuracy[-1, i].item())
        sizes = f"{len(task.train_y)} / {len(task.test_y)}"
        table.add_row(task.name, ", ".join(task.classes), sizes, *(f"{s:.1%}" for s in shares))
    metrics = continual_metrics(accuracy)
    console = Console()
    console.print(table)
    console.print(f"Average accuracy:   {metrics['avg_accuracy']:.1%}")
    console.print(f"Average forgetting: {metrics['avg_forgetting']:.1%}")


if __name__ == "__main__":
    main()
