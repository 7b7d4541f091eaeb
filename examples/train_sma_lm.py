"""Train a generalist language model, then specialists beside it, which leave it as it is.

    python examples/train_sma_lm.py --general_corpus data/general_corpus.txt
    python examples/train_sma_lm.py --special_corpus data/data_engineering_corpus.txt

The first writes ``base_lm``, the second ``shiftable_lm``, run folders of ``memattn train`` with the
weights as safetensors in ``model/``. With ``--format pt`` the files ``base_lm.pt`` and
``shiftable_lm.pt`` stand beside them, for ``torch.load(..., weights_only=True)``. A corpus is a
text file, whose documents blank lines separate, a folder, or a name of ``memattn data --list``:

    memattn data general data-engineering
    python examples/train_sma_lm.py --general_corpus general --special_corpus data-engineering

Both corpora may be given at once. The same command goes on where it was stopped.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from memattn.parts.gate_report import gate_lines, measure_gates
from memattn.train import DataConfig, ModelConfig, TrainConfig, TrainingConfig, load_config, train
from memattn.train.attached import load_model_folder
from memattn.train.evaluate_run import answer_losses
from memattn.train.setup import load_source, run_tokenizer

BASE, SHIFTABLE = "base_lm", "shiftable_lm"
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, NotImplementedError)


def main(argv: list[str] | None = None) -> int:
    """Train what is asked for; returns the exit code, 2 after an error of the user."""
    args = parse(argv)
    try:
        if args.general_corpus is None and args.special_corpus is None:
            raise ValueError("general_corpus must be given, or special_corpus, got neither")
        if args.general_corpus is not None:
            train_base(args)
        if args.special_corpus is not None:
            train_specialists(args)
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"{stop or 'interrupted'}\n")
        return 130
    except USER_ERRORS as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    return 0


def train_base(args: argparse.Namespace) -> None:
    """Train all weights of a decoder on the general corpus."""
    data = DataConfig(
        dataset_name=args.general_corpus,
        document_separator=separator(args.general_corpus, args),
        tokenizer="bpe",
        vocab_size=args.vocab_size,
        seq_len=args.max_len,
        held_out=args.held_out,
        cache_dir=args.cache_dir,
    )
    check_text("general_corpus", data)
    sizes = dict(
        hidden_size=args.d_model,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        intermediate_size=args.dim_feedforward,
    )
    config = TrainConfig(
        model=ModelConfig(preset="vanilla", options=sizes),
        data=data,
        training=optimisation(args, BASE, args.base_steps),
    )
    result = train(config, resume=True, progress=sys.stderr.isatty())
    say(f"{result.model_dir}: general loss {result.eval_loss:.4f}")
    write_pt(args, BASE)


def train_specialists(args: argparse.Namespace) -> None:
    """Train specialists and their gates on the special corpus, beside the frozen base."""
    folder = Path(args.output_dir) / BASE
    if not (folder / "model").is_dir():
        where = f"{folder / 'model'}: train it with --general_corpus"
        raise FileNotFoundError(f"output_dir must have a finished base, got no {where}")
    general = load_config(folder / "config.yaml").data
    mixed = args.mix_share > 0.0
    taught = mixed and args.gate_rows > 0
    data = replace(
        general,
        dataset_name=args.special_corpus,
        document_separator=separator(args.special_corpus, args) or general.document_separator,
        tokenizer=None,
        vocab_size=None,
        mix_in=general.dataset_name if mixed else None,
        **({"mix_share": args.mix_share} if mixed else {}),
        mix_weight=args.mix_weight,
    )
    check_text("special_corpus", data)
    options: dict[str, Any] = {
        "num_specialists": args.num_specialists,
        "scope": args.gate_scope,
        "rank": args.rank,
        "entropy_coefficient": args.gate_entropy,
        "sparsity_coefficient": args.gate_sparsity,
    }
    if taught:  # whose text is which, first alone and then beside the specialists
        options |= {"domain_coefficient": args.gate_domain, "gate_lr": args.gate_lr}
    config = TrainConfig(
        model=ModelConfig(
            model_path=str(folder / "model"), specialists=options, freeze_base_model=True
        ),
        data=data,
        training=replace(
            optimisation(args, SHIFTABLE, args.special_steps),
            gate_rows=args.gate_rows if taught else 0,
        ),
    )
    train(config, resume=True, progress=sys.stderr.isatty())
    write_pt(args, SHIFTABLE)
    report(args, config, general)


def report(args: argparse.Namespace, config: TrainConfig, general: DataConfig) -> None:
    """Print losses on both corpora before and after, and the gates on a text of each."""
    base, shiftable = (
        load_model_folder(Path(args.output_dir) / name / "model") for name in (BASE, SHIFTABLE)
    )
    tokenizer = run_tokenizer(config)
    general = replace(general, tokenizer=None, vocab_size=None)
    texts = {"special": replace(config.data, mix_in=None), "general": general}
    for name, data in texts.items():
        run = replace(config, data=data)
        before, after = (
            answer_losses(run, model, tokenizer, args.batch_size)["eval_loss"]
            for model in (base, shiftable)
        )
        say(f"{name} loss: {before:.4f} base, {after:.4f} gate open ({after - before:+.4f})")
    for name, data in texts.items():
        text = load_source(data, "pretraining")[0].text
        ids = torch.tensor([tokenizer(text)["input_ids"][: args.max_len]])
        say(f"gates on the {name} corpus:")
        for line in gate_lines(measure_gates(shiftable, ids)):
            say(line)
    same = base_is_unchanged(base, shiftable)
    say(f"with the base gate forced, logits are {'bit-equal to' if same else 'NOT those of'} base")


@torch.no_grad()
def base_is_unchanged(base: Any, shiftable: Any) -> bool:
    """Whether the base alone answers as before."""
    (part,) = (part for part in shiftable.config.parts if part.kind == "specialists")
    ids = torch.randint(base.config.vocab_size, (2, 16))
    alone = torch.zeros(2, 1 + part.num_specialists)
    alone[:, 0] = 1.0
    logits = shiftable.eval()(ids, domain_weights=alone).logits
    return torch.equal(logits, base.eval()(ids).logits)


def optimisation(args: argparse.Namespace, name: str, steps: int) -> TrainingConfig:
    """How either model is trained."""
    return TrainingConfig(
        output_dir=str(Path(args.output_dir) / name),
        max_steps=steps,
        batch_size=args.batch_size,
        base_model_lr=args.lr,
        warmup_steps=max(1, steps // 10),
        log_steps=10,
        seed=args.seed,
    )


def separator(corpus: str, args: argparse.Namespace) -> str | None:
    """What separates the documents of a text file."""
    return args.separator if Path(corpus).expanduser().is_file() else None


def check_text(name: str, data: DataConfig) -> None:
    """Raise ValueError, naming the option, where a corpus has no text."""
    try:
        documents = load_source(replace(data, mix_in=None), "pretraining")
    except ValueError as error:
        if "hold text" not in str(error):
            raise
        raise ValueError(
            f"{name} must hold text, got {data.dataset_name}, which is empty"
        ) from error
    if len(documents) < 2:
        raise ValueError(
            f"{name} must have two documents or more, of which one is held out, got one "
            f"(--separator {data.document_separator!r} separates them)"
        )


def write_pt(args: argparse.Namespace, name: str) -> None:
    """Write the weights as ``<name>.pt`` where that is asked for."""
    if args.format == "pt":
        model = load_model_folder(Path(args.output_dir) / name / "model")
        file = Path(args.output_dir) / f"{name}.pt"
        torch.save(model.state_dict(), file)
        say(f"wrote {file}")


def say(text: str) -> None:
    """Print a line."""
    sys.stdout.write(f"{text}\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--general_corpus", help="what the base learns: a file, a folder or a name")
    add("--special_corpus", help="what specialists learn, beside the base in output_dir")
    add("--output_dir", default="runs/sma", help="folder of both models (%(default)s)")
    add("--format", default="safetensors", choices=("safetensors", "pt"), help="pt adds .pt files")
    add("--num_specialists", type=int, default=1, help="how many (%(default)s)")
    add("--gate_scope", default="prefix", choices=("token", "prefix"), help="(%(default)s)")
    add("--rank", type=int, help="rank of the specialists; whole weights by default")
    add("--gate_entropy", type=float, default=0.01, help="coefficient (%(default)s)")
    add("--gate_sparsity", type=float, default=0.0, help="coefficient (%(default)s)")
    add("--gate_rows", type=int, default=256, help="of each text to teach gates, 0 for none (256)")
    add("--gate_domain", type=float, default=0.1, help="coefficient, of taught gates (%(default)s)")
    add("--gate_lr", type=float, default=5e-4, help="of taught gates (%(default)s)")
    add("--mix_weight", type=float, default=10.0, help="of general text in that (%(default)s)")
    add("--mix_share", type=float, default=0.1, help="general text among it, 0 for none (0.1)")
    add("--d_model", type=int, default=256, help="(%(default)s)")
    add("--num_heads", type=int, default=4, help="(%(default)s)")
    add("--num_layers", type=int, default=4, help="(%(default)s)")
    add("--dim_feedforward", type=int, default=1024, help="(%(default)s)")
    add("--max_len", type=int, default=256, help="tokens in a row (%(default)s)")
    add("--vocab_size", type=int, default=4096, help="(%(default)s)")
    add("--base_steps", type=int, default=2000, help="(%(default)s)")
    add("--special_steps", type=int, default=500, help="(%(default)s)")
    add("--batch_size", type=int, default=8, help="(%(default)s)")
    add("--lr", type=float, default=1e-3, help="(%(default)s)")
    add("--held_out", type=float, default=0.05, help="share of the documents (%(default)s)")
    add("--separator", default="\n\n", help="of documents in a text file; blank lines by default")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--cache_dir", default="~/.cache/memattn", help="of corpora and tokens (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
