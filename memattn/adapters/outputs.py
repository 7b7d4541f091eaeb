"""What an attached model returns: its own output, with the losses of parts beside it."""

import dataclasses
import functools
from typing import Any

from torch import Tensor
from transformers.utils.generic import ModelOutput

from memattn.checks import must
from memattn.parts.losses import NamedLosses


@functools.cache
def output_with_losses(base: type) -> type:
    """The type of output with ``lm_loss``, ``losses`` and ``loss_counts`` beside its own fields."""
    if not issubclass(base, ModelOutput) or not dataclasses.is_dataclass(base):
        must("model", "return a ModelOutput", base.__name__, TypeError)
    extra: list[Any] = [
        ("lm_loss", Tensor | None, None),
        ("losses", dict[str, Tensor] | None, None),
        ("loss_counts", dict[str, Tensor] | None, None),
    ]
    own = {field.name for field in dataclasses.fields(base)}
    return dataclasses.make_dataclass(
        base.__name__,
        [field for field in extra if field[0] not in own],
        bases=(NamedLosses, base),
        namespace={"__module__": base.__module__},
    )
