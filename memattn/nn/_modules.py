"""The modules of a kind in a model."""

from typing import TypeVar

from torch import nn

_Module = TypeVar("_Module", bound=nn.Module)


def modules_of(model: nn.Module, kind: type[_Module]) -> dict[str, _Module]:
    """The modules of a class in a model, itself included, by name and in order."""
    # torch does not type what the method yields
    named = model.named_modules()  # pyright: ignore[reportUnknownVariableType]
    return {name: m for name, m in named if isinstance(m, kind)}  # pyright: ignore[reportUnknownVariableType]
