"""DTG-MA on text domains: one classification task after the other, on frozen embeddings.

    python examples/dtgma_qwen25_benchmark.py --benchmark text_domains --tasks 4 --epochs 50 \
        --device cpu

The texts are real and come from published packages; texts of one film, president, review or mail
thread are either trained or tested on. The encoder is Qwen2.5-1.5B where the Hugging Face hub can
be reached, and otherwise MiniLM from a package; ``--encoder`` names another one. Embeddings are
kept in the cache folder, so that a second run takes seconds.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from memattn import DTGMAModel, train_continual
from memattn.continual import Stream
from memattn.data.embeddings import find_encoder
from memattn.data.packages import DEFAULT_CACHE_DIR
from memattn.data.text_streams import text_domains_stream


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code, 2 after an error that the user can put right."""
    args = parse(argv)
    try:
        run(args)
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    """Build the stream, train on its tasks in order and print what was forgotten."""
    encoder = find_encoder(args.encoder, cache_dir=args.cache_dir)
    stream = text_domains_stream(
        args.tasks, encoder, cache_dir=args.cache_dir, seed=args.seed, device=args.device
    )
    torch.manual_seed(args.seed)
    model = DTGMAModel(
        input_dim=stream.input_shape[0],
        hidden_dim=128,
        num_classes=stream.n_outputs,
        n_layers=2,
        n_heads=4,
    )
    results = train_continual(
        model,
        stream,
        epochs=args.epochs,
        device=args.device,
        verbose=True,
        input_noise=args.input_noise,
        seed=args.seed,
    )
    report(stream, encoder.name, results)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--benchmark", choices=["text_domains"], default="text_domains", help="the only one"
    )
    parser.add_argument("--tasks", type=int, default=4, help="how many text domains")
    parser.add_argument("--epochs", type=int, default=50, help="passes over each task")
    parser.add_argument("--device", default="cpu", help="where to encode and train")
    parser.add_argument("--encoder", default="auto", help="auto, minilm, a folder or a hub name")
    parser.add_argument(
        "--input_noise", type=float, default=0.5, help="of embeddings in training, against overfit"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split and of training")
    parser.add_argument(
        "--cache_dir",
        type=Path,
        default=DEFAULT_CACHE_DIR,
        help="keeps what is fetched and embeddings",
    )
    args = parser.parse_args(argv)
    # before the texts are embedded, which may take minutes
    for name, minimum in (("epochs", 1), ("seed", 0), ("input_noise", 0)):
        if getattr(args, name) < minimum:
            parser.error(f"--{name} must be at least {minimum}, got {getattr(args, name)}")
    return args


def report(stream: Stream, encoder: str, results: dict[str, Any]) -> None:
    """Print the accuracy on each task after its own training and after that of all."""
    columns = ("task", "classes", "train", "test", "largest class", "when learned", "at the end")
    table = Table(*columns, title=f"DTG-MA on {stream.name}, embedded with {encoder}")
    accuracy = results["accuracy_matrix"]
    for i, task in enumerate(stream.tasks):
        largest = task.test_y.bincount().max() / len(task.test_y)
        sizes = (str(len(task.train_y)), str(len(task.test_y)))
        shares = (f"{share.item():.1%}" for share in (largest, accuracy[i, i], accuracy[-1, i]))
        table.add_row(task.name, ", ".join(task.classes), *sizes, *shares)
    console = Console()
    console.print(table)
    console.print(f"Average accuracy:   {results['avg_accuracy']:.1%}")
    console.print(f"Average forgetting: {results['avg_forgetting']:.1%}")
    console.print(f"Parameters: {results['parameters']:,}, seconds: {results['time']:.0f}")


if __name__ == "__main__":
    sys.exit(main())
