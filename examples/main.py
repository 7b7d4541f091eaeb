"""Train Titans, or a plain decoder, on WikiText, and measure it on the standard test text.

    python examples/main.py --mode train --dataset wikitext --wikitext_version 103 \
        --data_path ./data --model_dim 128 --depth 6 --heads 3 --seq_length 1024 --batch_size 1 \
        --val_batch_size 1 --output_dir ./outputs/wikitext_model --learning_rate 3e-4 --use_memory \
        --max_epochs 50

The output folder is a run folder of ``memattn train``. The same command goes on where it was
stopped; ``--mode evaluate`` measures what is there. Heads have 64 features, whatever the width is.
"""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from memattn.data import load_documents, load_tokenizer
from memattn.evaluate import perplexity
from memattn.study.compare import ModelSizes
from memattn.study.compare_text import ComparedText, find_text
from memattn.train import DataConfig, TrainConfig, TrainingConfig, train
from memattn.train.setup import held_out_texts

DIM_HEAD = 64
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, NotImplementedError)


def main(argv: list[str] | None = None) -> int:
    """Train or measure; returns the exit code, 2 after an error that the user can put right."""
    args = parse(argv)
    console = Console()
    try:
        run(args, console)
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"{stop or 'interrupted'}\n")
        return 130
    except USER_ERRORS as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    return 0


def run(args: argparse.Namespace, console: Console) -> None:
    """Train, unless only asked to measure, and measure."""
    if args.fp16 and not torch.cuda.is_available():
        raise ValueError("fp16 must be false without CUDA, got true: give --fp16 false")
    text = find_text(
        args.dataset,
        data_dir=args.data_path,
        version=args.wikitext_version,
        cache_dir=args.cache_dir,
    )
    config = make_config(args, text.train)
    if args.mode == "train":
        result = train(config, resume=True)
        console.print(
            f"{result.model_dir}: {result.step:,} steps, {result.tokens:,} tokens, "
            f"loss {result.loss:.4f}",
            highlight=False,
        )
    evaluate(args, config, text, console)


def make_config(args: argparse.Namespace, source: str) -> TrainConfig:
    """The training run."""
    sizes = ModelSizes(
        dim=args.model_dim,
        depth=args.depth,
        heads=args.heads,
        dim_head=DIM_HEAD,
        segment_len=min(512, args.seq_length),
    )
    return TrainConfig(
        model=sizes.model("titans" if args.use_memory else "vanilla", args.seq_length),
        data=DataConfig(
            dataset_name=source,
            tokenizer="bpe",
            vocab_size=args.vocab_size,
            seq_len=args.seq_length,
            cache_dir=args.cache_dir,
        ),
        training=TrainingConfig(
            output_dir=args.output_dir,
            max_epochs=args.max_epochs,
            batch_size=args.batch_size,
            eval_batch_size=args.val_batch_size,
            base_model_lr=args.learning_rate,
            mixed_precision="fp16" if args.fp16 else "no",
            log_steps=10,
            eval_steps=500,
            eval_batches=50,
        ),
    )


def evaluate(
    args: argparse.Namespace, config: TrainConfig, text: ComparedText, console: Console
) -> None:
    """Print the perplexity of the trained model on the test text, or on what was held out."""
    from memattn import MemAttnForCausalLM

    folder = Path(args.output_dir) / "model"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"output_dir must have a trained model, got {args.output_dir}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = MemAttnForCausalLM.from_pretrained(folder).to(device)
    data = config.data
    if text.test is None:
        texts = held_out_texts(data)
    else:
        texts = [document.text for document in load_documents(text.test)]
    found = perplexity(
        model,
        texts,
        load_tokenizer(folder),
        context_len=data.seq_len,
        batch_size=args.val_batch_size,
        progress=True,
    )
    console.print(
        f"{text.test_name}: perplexity of a word {found.word_perplexity:,.2f}, of a token "
        f"{found.perplexity:,.2f} ({found.num_words:,} words, {found.num_tokens:,} tokens)",
        highlight=False,
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    switch = dict(type=as_bool, nargs="?", const=True, default=False, metavar="true|false")
    add = parser.add_argument
    add("--mode", choices=["train", "evaluate"], default="train", help="evaluate only measures")
    add("--dataset", default="wikitext", help="wikitext, a corpus such as wiki, a file or a folder")
    add("--wikitext_version", type=int, choices=[2, 103], default=103, help="of wikitext")
    add("--data_path", default="./data", help="folder with files of wikitext, such as train.txt")
    add("--model_dim", type=int, default=512, help="model dimension")
    add("--depth", type=int, default=6, help="number of layers")
    add("--heads", type=int, default=8, help=f"heads, each of {DIM_HEAD} features")
    add("--seq_length", type=int, default=1024, help="tokens in a row")
    add("--batch_size", type=int, default=16, help="rows in a training step")
    add("--val_batch_size", type=int, default=16, help="rows in a forward pass of an evaluation")
    add("--output_dir", default="./outputs", help="run folder")
    add("--learning_rate", type=float, default=5e-5, help="highest learning rate")
    add("--use_memory", **switch, help="train Titans; else a plain decoder")
    add("--fp16", **switch, help="train in float16 (CUDA only)")
    add("--max_epochs", type=int, default=1, help="times that the text is read")
    add("--vocab_size", type=int, help="entries of the tokenizer, 4096 by default")
    add("--cache_dir", default="~/.cache/memattn", help="keeps texts, tokenizers and tokens")
    return parser.parse_args(argv)


def as_bool(text: str) -> bool:
    """true or false."""
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text}")
    return text == "true"


if __name__ == "__main__":
    sys.exit(main())
