"""The models of a study, each with a number of parameters as near as can be to the first one's."""

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from memattn.checks import must
from memattn.models import PRESETS, MemAttnForCausalLM
from memattn.study.config import NO_LOSS, CompareConfig, StudyConfig

BASELINE = "baseline"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One model of a study.

    Attributes:
        name: ``baseline``, or loss, future_dim and source joined, such as ``cosine-127-table``.
        loss_type: Loss that it is trained with, ``none`` where that is only measured; None for
            the baseline.
        future_dim: Positions that a token sees ahead; None for the baseline.
        source: Where future keys come from; None for the baseline.
        preset: Name of its preset.
        options: Keywords of the preset, with the ``intermediate_size`` that was chosen.
        parameters: How many it has.
    """

    name: str
    loss_type: str | None
    future_dim: int | None
    source: str | None
    preset: str
    options: dict[str, Any]
    parameters: int


def plan_variants(config: StudyConfig, vocab_size: int) -> list[Variant]:
    """The models of a study, the baseline first.

    Args:
        config: The study.
        vocab_size: Entries of the tokenizer, which ``config.sizes`` may override.

    Returns:
        The models, at equal parameters.

    Raises:
        ValueError: If a size or an option is wrong, or parameters cannot be made equal.
    """
    plans: list[tuple[str, tuple[Any, ...], str, dict[str, Any]]] = [
        (BASELINE, (None, None, None), "vanilla", dict(config.sizes))
    ]
    for cell in _cells(config.compare):
        options = {**config.sizes, **config.future_options, **_options(config.compare, *cell)}
        plans.append(("-".join(map(str, cell)), cell, "future", options))
    _, _, preset, options = plans[0 if config.compare.equal_to == "baseline" else 1]
    target = _count(preset, options, vocab_size)
    variants = []
    for name, (loss_type, future_dim, source), preset, options in plans:
        width, parameters = _equalise(name, preset, options, vocab_size, target)
        variants.append(
            Variant(
                name=name,
                loss_type=loss_type,
                future_dim=future_dim,
                source=source,
                preset=preset,
                options={**options, "intermediate_size": width},
                parameters=parameters,
            )
        )
    return variants


def _cells(compare: CompareConfig) -> list[tuple[Any, ...]]:
    """Loss, future_dim and source of each future model, the first entries of all lists first."""
    lists = (compare.loss_types, compare.future_dims, compare.sources)
    if compare.full:
        return list(product(*lists))
    centre = tuple(values[0] for values in lists)
    cells = [
        (*centre[:axis], value, *centre[axis + 1 :])
        for axis, values in enumerate(lists)
        for value in values
    ]
    return list(dict.fromkeys(cells))


def _options(compare: CompareConfig, loss_type: str, future_dim: int, source: str) -> dict:
    """Keywords of the preset ``future``."""
    options: dict[str, Any] = {"future_dim": future_dim, "source": source}
    if loss_type != NO_LOSS:
        return {**options, "loss_type": loss_type}
    measured = next((name for name in compare.loss_types if name != NO_LOSS), None)
    return {**options, "loss_type": measured, "loss_coefficient": 0.0}


def _equalise(
    name: str, preset: str, options: dict[str, Any], vocab_size: int, target: int
) -> tuple[int, int]:
    """The ``intermediate_size`` whose number of parameters is nearest to a target, and that."""

    def count(width: int) -> int:
        return _count(preset, {**options, "intermediate_size": width}, vocab_size)

    first = count(1)
    step = count(2) - first  # parameters are linear in the width
    width = 1 + round((target - first) / step)
    if width < 1:
        raise ValueError(
            f"sizes must leave {name} room for an MLP at {target:,} parameters, got {first:,} "
            "with intermediate_size 1"
        )
    return width, first + (width - 1) * step


def _count(preset: str, options: dict[str, Any], vocab_size: int) -> int:
    """Parameters of a model, which is not allocated."""
    try:
        config = PRESETS[preset](**{"vocab_size": vocab_size, **options})
    except TypeError as error:
        raise ValueError(f"sizes: {error}") from error
    if config.vocab_size < vocab_size:
        must("sizes.vocab_size", f"be at least the tokenizer's {vocab_size}", config.vocab_size)
    with torch.device("meta"):
        model = MemAttnForCausalLM(config)
    return sum(parameter.numel() for parameter in model.parameters())
