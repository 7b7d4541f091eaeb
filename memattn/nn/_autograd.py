"""A typed way to call functions with gradients of their own."""

from typing import Any

from torch.autograd import Function


def apply(function: type[Function], *inputs: Any) -> Any:
    """The outputs of a function, which autograd differentiates by its ``backward``."""
    return function.apply(*inputs)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
