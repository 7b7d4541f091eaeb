"""What windows and first tokens cost a pretrained model: the loss of the second halves of texts.

    python examples/window_losses.py smollm2 --data_dir wikitext-2 --update docs/transformers.md

Texts are cut into pieces of ``--length`` tokens. The model reads each with full attention, then
with every window and number of sink tokens, and the mean loss of the tokens in its second half is
measured: all of these have more before them than a window of less than half a piece holds.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import memattn.models  # noqa: F401  registers the attention
from memattn.data.checkpoints import CHECKPOINTS, fetch_checkpoint
from memattn.data.wikitext import load_wikitext
from memattn.files import write_text

BEGIN, END = "<!-- losses: begin -->\n", "<!-- losses: end -->\n"


def main(argv: list[str] | None = None) -> int:
    """Measure and print or write the table; returns 2 after an error of the user's."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help=f"folder or hub name, or one of {', '.join(CHECKPOINTS)}")
    parser.add_argument("--data_dir", help="folder with WikiText-2; else from the hub")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a piece")
    parser.add_argument("--pieces", type=int, default=4, help="how many, from the test split")
    parser.add_argument("--windows", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--sinks", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--update", help="write the table between the markers of this page")
    args = parser.parse_args(argv)
    try:
        page = Path(args.update).read_text(encoding="utf-8") if args.update else BEGIN + END
        if BEGIN not in page or END not in page:
            raise ValueError(
                f"update must be a page with {BEGIN.strip()} and {END.strip()}, got {args.update}"
            )
        text = run(args)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    if args.update:
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        write_text(Path(args.update), f"{before}{BEGIN}{text}{END}{after}")
    else:
        sys.stdout.write(text)
    return 0


def run(args: argparse.Namespace) -> str:
    """Measure, and return the table as Markdown."""
    folder = fetch_checkpoint(args.model) if args.model in CHECKPOINTS else args.model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    articles = load_wikitext("test", data_dir=args.data_dir, version=2)
    ids = tokenizer("\n\n".join(article.text for article in articles))["input_ids"]
    if len(ids) < args.pieces * args.length:
        raise ValueError(
            f"pieces must be at most {len(ids) // args.length} of {args.length} tokens, "
            f"got {args.pieces}"
        )
    pieces = torch.tensor(ids[: args.pieces * args.length]).view(args.pieces, args.length)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_attn_implementation("memattn_segmented")
    full = second_half_loss(model, pieces)
    lines = [f"| window | {' | '.join(f'{n} sink tokens' for n in args.sinks)} |\n"]
    lines += ["|---|" + "---|" * len(args.sinks) + "\n"]
    for window in args.windows:
        losses = [second_half_loss(model, pieces, window, sinks) for sinks in args.sinks]
        lines += [f"| {window} | {' | '.join(f'{loss:.2f}' for loss in losses)} |\n"]
    name = CHECKPOINTS[args.model].description if args.model in CHECKPOINTS else args.model
    return (
        f"{name}: nats of the last {args.length - args.length // 2} tokens of {args.pieces} pieces "
        f"of {args.length} tokens from the test split of WikiText-2. Full attention: {full:.2f}.\n"
        f"\n{''.join(lines)}"
    )


@torch.no_grad()
def second_half_loss(
    model: nn.Module, pieces: Tensor, window: int | None = None, sinks: int | None = None
) -> float:
    """Mean loss of the tokens in the second half of each piece ``[n, length]``."""
    model.config.memattn_window_size = window  # pyright: ignore[reportAttributeAccessIssue]
    model.config.memattn_num_sink_tokens = sinks  # pyright: ignore[reportAttributeAccessIssue]
    half, sums = pieces.shape[1] // 2, 0.0
    for piece in pieces:
        logits = model(piece[None]).logits[0, half - 1 : -1]
        sums += F.cross_entropy(logits.float(), piece[half:], reduction="sum").item()
    return sums / (len(pieces) * (pieces.shape[1] - half))


if __name__ == "__main__":
    sys.exit(main())
