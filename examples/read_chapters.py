"""Can a memory learn to read chapters of texts? Train on with them open, and measure.

    memattn train --config configs/memory_reader.yaml
    python examples/read_chapters.py runs/memory_reader/model --steps 200

Two copies of the trained model go on, on the second halves of the same documents in the same order:
one as before, one with a chapter of the document's first half open. Then both are measured on
documents that neither was trained on, as ``memattn chapters effect`` does: with chapters closed,
with that of the document open, with that of another document open, and with the first half in the
context instead.
"""

import argparse
import copy
import random
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from memattn import MemAttnForCausalLM, chapter_from_text, chapters_of
from memattn.data import load_documents, load_tokenizer, split_documents
from memattn.evaluate.chapters import ChapterEffect, document_effect

CONDITIONS = ("closed", "open", "control", "context")


def main(argv: list[str] | None = None) -> int:
    """Train both copies and print what was measured; returns 2 after an error of the user's."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder of a saved model")
    parser.add_argument("--data", default="wiki", help="corpus, file or folder")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each copy")
    parser.add_argument("--documents", type=int, default=4, help="documents in a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a second half, at most")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate, constant")
    parser.add_argument("--held_out", type=int, default=40, help="documents that are measured")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    """Train and measure."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = MemAttnForCausalLM.from_pretrained(args.model).to(device)
    tokenizer = load_tokenizer(args.model)
    # the split of the run, so that held-out documents are new to the model
    split = split_documents(load_documents(args.data), 0.05, seed=0)
    texts = [
        [d.text[:6000] for d in side if len(d.text) > 1000]
        for side in (split.train, split.held_out)
    ]
    train, held_out = texts
    console = Console()
    models = {"as it was trained": model}
    for name, reads in (("trained on, closed", False), ("trained on, reading", True)):
        models[name] = copy.deepcopy(model)
        train_on(models[name], tokenizer, train, args, reads=reads)
        console.print(f"{name}: done", highlight=False)
    table = Table("model", *CONDITIONS, "open - closed", "open - control")
    for name, each in models.items():
        losses = measure(each.eval(), tokenizer, held_out[: args.held_out + 1])
        means = losses.mean(0)
        opened = losses[:, 1:2] - losses[:, [0, 2]]
        error = opened.std(0) / len(opened) ** 0.5
        differences = zip(opened.mean(0).tolist(), error.tolist(), strict=True)
        table.add_row(
            name, *(f"{x:.4f}" for x in means), *(f"{d:+.4f} ± {e:.4f}" for d, e in differences)
        )
    console.print(table)
    console.print(f"nats per token; mean over {len(losses)} documents ± its standard error")


def train_on(
    model: Any, tokenizer: Any, texts: list[str], args: argparse.Namespace, *, reads: bool
) -> None:
    """Train on second halves, with chapters of the first halves open or without."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    draw, chapters = random.Random(args.seed), chapters_of(model)
    for _ in range(args.steps):
        model.train()
        for text in draw.sample(texts, args.documents):
            first, second = halves(tokenizer, text, args.length)
            if reads:
                name = chapter_from_text(model, first, name="first half").name
                chapters.open(name)
            ids = second[None].to(model.device)
            (model(ids, labels=ids).loss / args.documents).backward()
            if reads:
                chapters.delete(name)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def halves(tokenizer: Any, text: str, length: int) -> tuple[Tensor, Tensor]:
    """The end of the first half of a text, and the beginning of the second, as tokens."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    middle = len(ids) // 2
    return ids[max(middle - 4 * length, 0) : middle], ids[middle : middle + length]


def measure(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Loss of each document's second half in each condition, ``[documents, conditions]``."""
    rows = []
    for text, other in zip(texts, texts[1:], strict=False):
        effects: list[ChapterEffect] = document_effect(model, text, other, tokenizer)
        rows.append([effect.loss for effect in effects if effect.text == "document"])
    return torch.tensor(rows, dtype=torch.float64)


if __name__ == "__main__":
    sys.exit(main())
