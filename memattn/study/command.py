"""``memattn study``: each study has a command whose options are its fields."""

import inspect
from collections.abc import Callable
from typing import Any, Literal, get_type_hints

from memattn.study import STUDIES
from memattn.study.base import Study

_ABOUT = """
Trains each model with each seed, prints tables with mean and standard deviation and with the
paired differences, and writes results.json, results.csv, results.md and curves.png. Ctrl-C leaves
a checkpoint: the same command goes on from there, and finished runs are kept.
"""
_OWN = """    max_minutes: Stop with a checkpoint after so many minutes; the same command goes on.
    page: Markdown file that is written as well, with the curves beside it; what it has from a
        heading Reading on is kept.
"""


def study(system: Literal["future", "chapters", "adapters", "titans", "shiftable"]) -> int:
    """Compare a system with baselines of equal size or cost over several seeds.

    Differences are paired by seed.

    Each system has options of its own: memattn study SYSTEM --help.

    Args:
        system: What is studied: future, attention with learned keys for the positions ahead;
            chapters, a memory of routed chapters; adapters, LoRA and memory in a pretrained model;
            titans, a memory that learns while it reads; shiftable, gated specialists beside a
            frozen generalist.
    """
    return KINDS[system]()


def command_of(kind: type[Study]) -> Callable[..., int]:
    """The function of a study's command: its arguments are the fields of the study."""

    def command(
        *, max_minutes: float | None = None, page: str | None = None, **options: Any
    ) -> int:
        from memattn.study.run import run_study

        run_study(kind(**options), max_minutes=max_minutes, page=page)
        return 0

    defaults, hints = kind(), get_type_hints(kind)
    names = list(inspect.signature(kind).parameters)
    hints = {name: hints[name] for name in names}
    hints |= {"max_minutes": float | None, "page": str | None}
    command.__name__ = command.__qualname__ = kind.system
    command.__annotations__ = {**hints, "return": int}
    vars(command)["__signature__"] = inspect.Signature(
        [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=getattr(defaults, name, None),
                annotation=hint,
            )
            for name, hint in hints.items()
        ],
        return_annotation=int,
    )
    summary, attributes = (inspect.getdoc(kind) or "").split("\n\nAttributes:\n", 1)
    command.__doc__ = f"{summary}\n{_ABOUT}\nArgs:\n{attributes.rstrip()}\n{_OWN}"
    return command


KINDS = {system: command_of(kind) for system, kind in STUDIES.items()}
