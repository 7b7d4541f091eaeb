"""``memattn evaluate TASK``: questions about a long text. The fields of a task are options."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, get_type_hints

from docstring_parser import parse as parse_docstring

from memattn.data.tasks import TASKS as KINDS

if TYPE_CHECKING:
    from memattn.data.tasks import Task

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_MODEL = "A folder with a saved model and its tokenizer, a run folder, or a name on the hub."


def _options(
    *,
    lengths: list[int] = (),  # pyright: ignore[reportArgumentType]
    depths: list[float] = (),  # pyright: ignore[reportArgumentType]
    haystack: str | None = None,
    samples: int = 10,
    batch_size: int = 8,
    seed: int = 0,
    cache_dir: str = "~/.cache/memattn",
    device: str | None = None,
    out: str | None = None,
    json: str | None = None,
) -> None:
    """Options of every task.

    Args:
        lengths: Tokens of a text including the answers; by default a quarter, a half and all of the
            model's maximum, at most 1024.
        depths: Position of the fact, from 0 (start) to 1 (end); by default 0 0.25 0.5 0.75 1.
        haystack: The text around: a corpus (memattn data --list), a text file, a folder or a
            Hugging Face dataset; by default short filler sentences.
        samples: Number of texts for each length and depth.
        batch_size: Texts in one forward pass.
        seed: Seed of the texts, the same for every model with the same tokenizer.
        cache_dir: Folder with fetched corpora.
        device: Device, such as cpu or cuda; by default CUDA if there is one.
        out: Picture of the accuracy: .png, .svg, .pdf or .html.
        json: File to write the numbers to.
    """


def _command_of(kind: type["Task"]) -> Callable[..., int]:
    """The command of a task: its own fields, and the common options that it supports."""
    hints, own = get_type_hints(kind), fields(kind)  # pyright: ignore[reportArgumentType]
    about = parse_docstring(inspect.getdoc(kind) or "")
    helps = {argument.arg_name: argument.description or "" for argument in about.params}
    common = inspect.signature(_options).parameters
    unused: set[str] = set() if kind.has_depth else {"depths"}
    takes_text = "haystack" in hints
    if not takes_text:
        unused |= {"haystack", "cache_dir"}
    parameters: list[tuple[str, Any, Any, str]]
    parameters = [("model", str, inspect.Parameter.empty, _MODEL)]
    for part in own:
        if part.name != "haystack":
            # options without a default depend on the model
            hint, default = hints[part.name], part.default
            if default is MISSING:
                hint, default = hint | None, None
            parameters.append((part.name, hint, default, helps[part.name]))
    described = parse_docstring(inspect.getdoc(_options) or "").params
    notes = {argument.arg_name: argument.description or "" for argument in described}
    parameters += [
        (name, get_type_hints(_options)[name], parameter.default, notes[name])
        for name, parameter in common.items()
        if name not in unused
    ]

    def command(model: str, **options: Any) -> int:
        shared = {name: options.pop(name) for name in common if name in options}
        return _run(kind, model, options, **shared)

    vars(command)["__signature__"] = inspect.Signature(
        [
            inspect.Parameter(
                name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=hint
            )
            for name, hint, default, _ in parameters
        ],
        return_annotation=int,
    )
    command.__annotations__ = {name: hint for name, hint, *_ in parameters} | {"return": int}
    lines = [f"    {name}: {' '.join(text.split())}" for name, *_, text in parameters]
    head = "\n\n".join(filter(None, [about.short_description, about.long_description]))
    command.__doc__ = "\n".join([head, "", "Args:", *lines])
    return command


def _run(
    kind: type["Task"],
    model: str,
    options: dict[str, Any],
    *,
    lengths: list[int],
    samples: int,
    batch_size: int,
    seed: int,
    device: str | None,
    out: str | None,
    json: str | None,
    depths: list[float] | None = None,
    haystack: str | None = None,
    cache_dir: str = "",
) -> int:
    """Run a task with a model; print and write the results."""
    from rich.console import Console

    from memattn.cli._models import load_model, load_model_tokenizer
    from memattn.data import load_documents
    from memattn.data.tasks import Haystack
    from memattn.evaluate import recall
    from memattn.evaluate.perplexity import check_window
    from memattn.files import write_json
    from memattn.viz.recall import plot_recall

    loaded = load_model(model, device)
    if "haystack" in get_type_hints(kind):
        documents = [] if haystack is None else load_documents(haystack, cache_dir=cache_dir)
        texts = [document.text for document in documents]
        options = {**options, "haystack": Haystack(load_model_tokenizer(model), texts)}
    elif options.get("vocab_size") is None:
        options = {**options, "vocab_size": loaded.config.vocab_size - options["first_token"]}
    longest, _ = check_window(loaded, None, None)
    report = recall(
        loaded,
        kind(**options),
        lengths=list(lengths) or [longest // 4, longest // 2, longest],
        depths=None if depths is None else list(depths) or DEPTHS,
        samples=samples,
        batch_size=batch_size,
        seed=seed,
        progress=True,
    )
    if json is not None:
        write_json(json, {"model": model, "haystack": haystack, **report.to_dict()})
    console = Console()
    console.print(report.table().to_rich())
    if report.reach is None:
        console.print("Attention of this model has no window: no text is beyond its reach.")
    else:
        console.print(
            f"Windows of attention reach {report.reach:,} tokens back, through all layers."
        )
    if out is not None:
        plot_recall(report, out, title=f"{model}: {report.task}")
        console.print(f"wrote {out}", highlight=False, soft_wrap=True)
    return 0


TASKS = {name: _command_of(kind) for name, kind in KINDS.items()}
