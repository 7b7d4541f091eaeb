"""``memattn chapters``: chapters in a saved model, made from texts."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    from memattn.parts.chapters import Chapters


def chapters(
    action: Literal["add", "list", "open", "close", "delete", "refresh", "effect"],
) -> int:
    """Add texts as chapters to a saved model; list, open, close, delete and measure chapters.

    A chapter memory attends to open chapters as to its learned ones; closed chapters have no
    effect. Chapters are stored in chapters.safetensors next to the weights and loaded with the
    model. Each action has its own options: memattn chapters ACTION --help.

    Args:
        action: The action.
    """
    return KINDS[action]()


def add(
    model: str,
    file: str,
    name: str | None = None,
    base_model: str | None = None,
    context_len: int | None = None,
    device: str | None = None,
) -> int:
    """Make a closed chapter from a text file.

    Args:
        model: Folder of a saved model, or of a finished run.
        file: Text file, or - for the standard input.
        name: Name of the chapter; by default the file name without its ending.
        base_model: Folder of the pretrained model that a memory is attached to, if it has moved.
        context_len: Tokens that the model reads at once; by default its maximum, at most 1024.
        device: Device, such as cpu or cuda; by default CUDA if there is one.
    """
    from memattn.chapters import chapter_from_text, chapters_of
    from memattn.cli._models import load_model, load_model_tokenizer

    path = _file_to_write(model)
    text = _read_text(file)
    if name is None and file != "-":
        name = Path(file).stem
    loaded = load_model(model, device, base_model)
    chapter = chapter_from_text(
        loaded,
        text,
        name=name,
        tokenizer=load_model_tokenizer(model),
        source="standard input" if file == "-" else file,
        context_len=context_len,
    )
    chapters_of(loaded).write(path)
    _say(f"added {chapter.name}, {chapter.num_tokens:,} tokens, closed")
    return 0


def list_(model: str, check: bool = False, device: str | None = None) -> int:
    """List the chapters of a model and their sources.

    Args:
        model: Folder of a saved model, or of a run.
        check: Load the model, and report chapters that were made before its weights changed.
        device: Device for --check.
    """
    from rich.console import Console
    from rich.table import Table

    from memattn.parts.chapters import list_chapters

    path = _file(model)
    if not path.is_file():
        _say(f"no chapters in {model}")
        return 0
    stale = None
    if check:
        from memattn.chapters import stale_chapters
        from memattn.cli._models import load_model

        stale = stale_chapters(load_model(model, device))
    table = Table(title=f"chapters of {model}", title_justify="left")
    columns = ("name", "state", "tokens", "source", "made", "by", "sha256")
    for column in (*columns, *("weights",) * (stale is not None)):
        table.add_column(column, justify="right" if column == "tokens" else "left")
    for chapter in list_chapters(path):
        row = [
            chapter.name,
            f"open, weight {chapter.weight:g}" if chapter.is_open else "closed",
            f"{chapter.num_tokens:,}",
            chapter.source,
            chapter.made_at,
            chapter.model,
            chapter.sha256[:12],
        ]
        if stale is not None:
            row.append("others" if chapter.name in stale else "the same")
        table.add_row(*row)
    # lets a narrow terminal break lines instead of cutting cells
    Console(width=max(Console().width, 130)).print(table)
    return 0


def open_(model: str, name: str, weight: float | None = None) -> int:
    """Open a chapter: every token attends to it.

    Args:
        model: Folder of a saved model, or of a finished run.
        name: Which chapter.
        weight: Its weight; 1 is the weight of one learned chapter.
    """
    return _change(model, lambda chapters: chapters.open(name, weight=weight), "opened", name)


def close(model: str, name: str) -> int:
    """Close a chapter: it has no effect until it is opened.

    Args:
        model: Folder of a saved model, or of a finished run.
        name: Which chapter.
    """
    return _change(model, lambda chapters: chapters.close(name), "closed", name)


def delete(model: str, name: str) -> int:
    """Delete a chapter from the model.

    Args:
        model: Folder of a saved model, or of a finished run.
        name: Which chapter.
    """
    return _change(model, lambda chapters: chapters.delete(name), "deleted", name)


def refresh(model: str, base_model: str | None = None, device: str | None = None) -> int:
    """Make all chapters again with the model's current weights, for example after training.

    Args:
        model: Folder of a saved model, or of a finished run.
        base_model: Folder of the pretrained model that a memory is attached to, if it has moved.
        device: Device, such as cpu or cuda; by default CUDA if there is one.
    """
    from memattn.chapters import chapters_of, refresh_chapters
    from memattn.cli._models import load_model

    path = _file_to_write(model)
    loaded = load_model(model, device, base_model)
    refresh_chapters(loaded)
    chapters_of(loaded).write(path)
    _say(f"made {len(chapters_of(loaded))} chapters again")
    return 0


def effect(
    model: str,
    file: str,
    other: str | None = None,
    names: list[str] = (),  # pyright: ignore[reportArgumentType]
    weight: float | None = None,
    context_len: int | None = None,
    base_model: str | None = None,
    device: str | None = None,
    json: str | None = None,
) -> int:
    """Measure the loss on a text with chapters closed and open. Nothing is written to the model.

    With --other, chapters are made from the first halves of the file and of the other text, and
    both second halves are measured: without a chapter, with the chapter of the same text, with the
    chapter of the other text as a control, and with the end of the first half in the context
    instead. Without --other, the whole file is measured with the model's chapters.

    Args:
        model: Folder of a saved model, or of a run.
        file: Text file.
        other: Text file on another subject.
        names: Chapters to open, without --other; by default all.
        weight: Their weight; by default their stored weight, initially 1.
        context_len: Tokens in a separately measured piece; by default half of the model's maximum,
            at most 512.
        base_model: Folder of the pretrained model that a memory is attached to, if it has moved.
        device: Device, such as cpu or cuda; by default CUDA if there is one.
        json: File to write the numbers to.
    """
    from rich.console import Console
    from rich.table import Table

    from memattn.cli._models import load_model, load_model_tokenizer
    from memattn.evaluate.chapters import chapter_effect, document_effect
    from memattn.files import write_json

    if other is not None and names:
        raise ValueError(f"names must be left out with --other, got {' '.join(names)}")
    text = _read_text(file)
    loaded, tokenizer = load_model(model, device, base_model), load_model_tokenizer(model)
    options: dict[str, Any] = dict(weight=weight, context_len=context_len)
    if other is not None:
        found = document_effect(loaded, text, _read_text(other), tokenizer, **options)
    else:
        found = chapter_effect(loaded, text, tokenizer, names=names, **options)
    if json is not None:
        write_json(json, {"model": model, "effects": [each.to_dict() for each in found]})
    called = {"text": file, "document": f"2nd half of {file}", "other": f"2nd half of {other}"}
    table = Table(title=f"chapters in {model}", title_justify="left")
    for column in ("text", "condition", "tokens", "loss", "change", "its standard error"):
        table.add_column(column, justify="left" if column in ("text", "condition") else "right")
    for each in found:
        first = each.condition == "closed"
        table.add_row(
            called[each.text] if first else "",
            each.condition,
            f"{each.num_tokens:,}" if first else "",
            f"{each.loss:.4f}",
            "" if first else f"{each.change:+.4f}",
            "" if first else f"{each.error:.4f}",
        )
    Console().print(table)
    return 0


KINDS: "dict[str, Callable[..., int]]" = {
    "add": add,
    "list": list_,
    "open": open_,
    "close": close,
    "delete": delete,
    "refresh": refresh,
    "effect": effect,
}


def _change(model: str, change: "Callable[[Chapters], None]", done: str, name: str) -> int:
    """Change the chapters in a model's file without loading the model."""
    from memattn.parts.chapters import Chapters

    path = _file_to_write(model)
    chapters = Chapters.read(path)
    change(chapters)
    chapters.write(path)
    _say(f"{done} {name}")
    return 0


def _file(model: str) -> Path:
    """Path of the chapters of a saved model; it need not exist."""
    from memattn.cli._models import weights_folder
    from memattn.parts.chapters import FILE
    from memattn.train.attached import FILE as ATTACHED
    from memattn.train.attached import MEMORY

    folder = weights_folder(Path(model).expanduser())
    if folder is None:
        raise FileNotFoundError(f"model must be a folder with a saved model or a run, got {model}")
    return folder / (MEMORY if (folder / ATTACHED).is_file() else "") / FILE


def _file_to_write(model: str) -> Path:
    """The same path, for a model that is not a checkpoint."""
    path = _file(model)
    if not path.parent.is_dir() or (path.parent / "state.json").is_file():
        raise ValueError(f"model must be finished, not a checkpoint, got {path.parent}")
    return path


def _read_text(file: str) -> str:
    import sys

    return sys.stdin.read() if file == "-" else Path(file).expanduser().read_text(encoding="utf-8")


def _say(text: str) -> None:
    from rich.console import Console

    Console().print(text, highlight=False, markup=False)
