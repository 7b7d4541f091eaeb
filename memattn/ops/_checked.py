"""Remembers calls that passed their checks, so that equal calls skip them."""

from types import NoneType
from typing import Any

import torch
from torch import Tensor

# with more signatures than this, all are forgotten
MAX_SIGNATURES = 4096
_PLAIN = (int, bool, float, str, NoneType)

Signature = tuple[Any, ...]


class CheckedCalls:
    """The signatures of an operator's calls whose checks depend on nothing but the signature."""

    def __init__(self) -> None:
        self._passed: set[Signature] = set()

    def __contains__(self, signature: Signature) -> bool:
        return signature in self._passed

    def add(self, signature: Signature | None) -> None:
        """Remember that a call passed; None is the signature of no call."""
        if signature is None:
            return
        if len(self._passed) >= MAX_SIGNATURES:
            self._passed.clear()
        self._passed.add(signature)


def signature_of(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Signature | None:
    """Shapes, dtypes and devices of the tensors, types and values of the options.

    None while torch traces a graph, and if a tensor or an option is not a plain one.
    """
    if torch.compiler.is_compiling():
        return None
    parts: list[Any] = []
    for tensor in tensors:
        if tensor is None:
            parts.append(None)
        elif tensor.__class__ is Tensor or tensor.__class__ is torch.nn.Parameter:
            parts += (tensor.shape, tensor.dtype, tensor.device)
        else:
            return None
    for option in options:
        if option.__class__ not in _PLAIN:
            return None
        parts += (option.__class__, option)  # 1 == 1.0 == True
    return tuple(parts)
