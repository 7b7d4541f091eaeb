"""``memattn memorize``."""

from collections.abc import Iterator
from typing import IO

BLOCK = 1 << 16  # characters that are read at a time
LONGEST_LINE = 16 * BLOCK


def memorize(
    book: str,
    model: str,
    out: str,
    memory: str | None = None,
    piece: int = 512,
    device: str | None = None,
) -> int:
    """Read a text of any length into the memory of a model, and keep it as a file.

    memattn generate MODEL --memory FILE goes on behind the text without reading it again. The model
    has a neural memory (the preset titans). The text is tokenized in blocks that end with a line,
    and read in pieces: what this takes does not grow with the text. The file appears once the
    whole text is read.

    Args:
        book: A text file; - for the standard input.
        model: A folder with a saved model and its tokenizer, a run folder, or a name on the
            Hugging Face hub.
        out: File to write.
        memory: A file that this command wrote for the same model, to go on behind its text.
        piece: Tokens in one forward pass.
        device: Where to run, such as cpu or cuda; by default CUDA where there is one.
    """
    import sys
    from pathlib import Path

    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from memattn.cli._models import load_model, load_model_tokenizer
    from memattn.demo.rows import format_bytes
    from memattn.models import KeptMemory
    from memattn.models.kept_memory import piece_length

    if piece < 1:
        raise ValueError(f"piece must be at least 1, got {piece}")
    path, target = Path(book).expanduser(), Path(out).expanduser()
    if book != "-" and not path.is_file():
        raise FileNotFoundError(f"book must be a text file, or -, got {book}")
    if not target.parent.is_dir() or target.is_dir():
        raise ValueError(f"out must be a file in a folder that exists, got {out}")
    loaded, tokenizer = load_model(model, device), load_model_tokenizer(model)
    kept = KeptMemory.of(loaded) if memory is None else KeptMemory.load(memory, loaded)
    before = kept.num_tokens
    columns = (TextColumn("reading"), BarColumn(), TextColumn("{task.fields[tokens]:,} tokens"))
    progress = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
    with progress, sys.stdin if book == "-" else path.open(encoding="utf-8") as file:
        # of a pipe nobody knows how long it is
        total = None if book == "-" else path.stat().st_size
        task = progress.add_task("reading", total=total, tokens=0)
        first = [] if tokenizer.bos_token_id is None or before else [tokenizer.bos_token_id]
        try:
            for text in text_blocks(file):
                ids = first + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                tokens = torch.tensor([ids], device=loaded.device)
                kept.read(loaded, tokens, piece_len=piece_length(loaded, piece))
                first = []
                size = len(text.encode("utf-8"))
                progress.update(task, advance=size, tokens=kept.num_tokens - before)
        except UnicodeDecodeError as error:
            raise ValueError(f"book must be text in UTF-8, got {book} ({error})") from error
    if kept.num_tokens == before:
        raise ValueError(f"book must have at least one token, got none in {book}")
    kept.save(target)
    sys.stdout.write(
        f"read {kept.num_tokens - before:,} tokens into {out}, a state of "
        f"{format_bytes(kept.cache.nbytes)}\n"
    )
    return 0


def text_blocks(file: IO[str]) -> Iterator[str]:
    """A text in blocks that end with a line, unless a line is very long."""
    rest = ""
    while chunk := file.read(BLOCK):
        rest += chunk
        cut = rest.rfind("\n") + 1
        if not cut and len(rest) >= LONGEST_LINE:
            cut = rest.rfind(" ") + 1 or len(rest)
        if cut:
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest
