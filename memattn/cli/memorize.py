"""``memattn memorize``."""

from collections.abc import Iterator
from typing import IO

READ_CHARACTERS = 1 << 16  # characters to read at a time
LONGEST_LINE = 16 * READ_CHARACTERS


def memorize(
    book: str,
    model: str | None = None,
    out: str = "book.memory",
    memory: str | None = None,
    piece: int = 512,
    measure: bool = True,
    device: str | None = None,
) -> int:
    """Read a text of any length into the memory of a model, and save the memory as a file.

    memattn generate MODEL --memory FILE continues the text without reading it again. The model
    needs a neural memory (the preset titans). The text is tokenized in blocks of whole lines and
    read in pieces, so the memory use does not grow with the text. The file is written when the
    whole text is read.

    Args:
        book: A text file; - for the standard input.
        model: A folder with a saved model and its tokenizer, a run folder, or a name on the
            Hugging Face hub.
        out: File to write.
        memory: A file that this command wrote for the same model, to continue after its text.
        piece: Tokens in one forward pass.
        measure: Record update, surprise and relevance for memattn plot state; each memory then
            writes every token twice.
        device: Device, such as cpu or cuda; by default CUDA if there is one.
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

    if model is None:
        raise ValueError("model must be given, got none")
    if piece < 1:
        raise ValueError(f"piece must be at least 1, got {piece}")
    path, target = Path(book).expanduser(), Path(out).expanduser()
    if book != "-" and not path.is_file():
        raise FileNotFoundError(f"book must be a text file, or -, got {book}")
    if not target.parent.is_dir() or target.is_dir():
        raise ValueError(f"out must be a file in a folder that exists, got {out}")
    if book != "-" and target.exists() and target.samefile(path):
        raise ValueError(f"out must be another file than book, got {out} for both")
    loaded, tokenizer = load_model(model, device), load_model_tokenizer(model)
    kept = KeptMemory.of(loaded) if memory is None else KeptMemory.load(memory, loaded)
    before = kept.num_tokens
    columns = (TextColumn("reading"), BarColumn(), TextColumn("{task.fields[tokens]:,} tokens"))
    progress = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
    with progress, sys.stdin if book == "-" else path.open(encoding="utf-8") as file:
        # the length of a pipe is unknown
        total = None if book == "-" else path.stat().st_size
        task = progress.add_task("reading", total=total, tokens=0)
        ids = [] if tokenizer.bos_token_id is None or before else [tokenizer.bos_token_id]
        length = piece_length(loaded, piece)
        num_text_tokens = 0

        def read(ids: list[int]) -> None:
            tokens = torch.tensor([ids], dtype=torch.long, device=loaded.device)
            kept.read(loaded, tokens, piece_len=length, measure=measure)

        try:
            for text in text_blocks(file):
                new = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                num_text_tokens += len(new)
                ids += new
                whole = len(ids) // length * length
                read(ids[:whole])
                ids = ids[whole:]
                progress.update(task, advance=len(text.encode("utf-8")), tokens=num_text_tokens)
            if num_text_tokens == 0:
                raise ValueError(f"book must have at least one token, got none in {book}")
            read(ids)
        except UnicodeDecodeError as error:
            raise ValueError(f"book must be text in UTF-8, got {book} ({error})") from error
    kept.save(target)
    sys.stdout.write(
        f"read {kept.num_tokens - before:,} tokens into {out}, a state of "
        f"{format_bytes(kept.cache.nbytes)}\n"
    )
    return 0


def text_blocks(file: IO[str]) -> Iterator[str]:
    """Read a text in blocks of whole lines, except for very long lines."""
    rest = ""
    while chunk := file.read(READ_CHARACTERS):
        rest += chunk
        cut = rest.rfind("\n") + 1
        if not cut and len(rest) >= LONGEST_LINE:
            cut = rest.rfind(" ") + 1 or len(rest)
        if cut:
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest
