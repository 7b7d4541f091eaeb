"""A plain decoder to compare a model with: the same sizes, equal parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from memattn.checks import must
from memattn.models.config import MemAttnConfig
from memattn.models.decoder import MemAttnForCausalLM
from memattn.parts.causal import CausalConfig
from memattn.parts.segmented import SegmentedConfig


def vanilla_of_equal_parameters(
    config: MemAttnConfig, *, window_size: int | None = None
) -> MemAttnConfig:
    """The configuration of a plain causal decoder with as many parameters as another model.

    Attention is plain causal and there are no further parts; the width of the MLP is chosen to make
    the numbers of parameters as equal as possible. No weights are allocated.

    Args:
        config: Configuration of the other model.
        window_size: Keys in the window of the plain decoder, for a comparison at equal windows;
            None means that it sees all earlier tokens.

    Raises:
        ValueError: If even an MLP of width 1 has more parameters.
    """
    sizes = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(MemAttnConfig)
        if field.name in MemAttnConfig.__annotations__
    }
    backend = getattr(config.attention, "backend", "auto")
    attention = (
        CausalConfig(backend=backend)
        if window_size is None
        else SegmentedConfig(window_size=window_size, backend=backend)
    )
    sizes |= dict(attention=attention, parts=[])

    def count(width: int) -> int:
        return count_parameters(MemAttnConfig(**{**sizes, "intermediate_size": width}))

    target = count_parameters(config)
    width = nearest_width(count, target)
    if width < 1:
        least = f"{count(1):,} parameters or more, those of a plain decoder with an MLP of width 1"
        must("config", f"have {least}", f"{target:,}")
    return MemAttnConfig(**{**sizes, "intermediate_size": width})


def count_parameters(config: Any) -> int:
    """Number of parameters of a configuration's model; no weights are allocated."""
    with torch.device("meta"):
        model = MemAttnForCausalLM(config)
    return sum(parameter.numel() for parameter in model.parameters())


def nearest_width(count: Callable[[int], int], target: int) -> int:
    """The width whose ``count`` (linear in it) is nearest to a target; may be below 1."""
    first = count(1)
    return 1 + round((target - first) / (count(2) - first))
