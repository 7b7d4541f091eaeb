"""Makes models equal in parameters or operations by the width of their MLPs."""

from collections.abc import Callable
from typing import Any

from memattn.checks import must


def count_parameters(preset: str, options: dict[str, Any], vocab_size: int) -> int:
    """Parameters of a model, which is not allocated.

    Args:
        preset: Name of its preset.
        options: Keywords of the preset.
        vocab_size: Entries of the tokenizer, which the options may override.

    Raises:
        ValueError: If an option is wrong.
    """
    from memattn.models import factory

    return factory.count_parameters(make_config(preset, options, vocab_size))


def make_config(preset: str, options: dict[str, Any], vocab_size: int) -> Any:
    """The configuration of a model; errors name the option ``sizes`` of a study."""
    from memattn.models import PRESETS

    try:
        config = PRESETS[preset](**{"vocab_size": vocab_size, **options})
    except TypeError as error:
        raise ValueError(f"sizes: {error}") from error
    if config.vocab_size < vocab_size:
        must("sizes.vocab_size", f"be at least the tokenizer's {vocab_size}", config.vocab_size)
    return config


def equal_width(name: str, count: Callable[[int], int], target: int, what: str) -> int:
    """The MLP width that brings a count nearest to a target.

    Args:
        name: The model's name, for errors.
        count: The count of the model with a width; linear in the width.
        target: What it shall be.
        what: What is counted, for errors.

    Raises:
        ValueError: If even width 1 is nearer to more than the target.
    """
    from memattn.models.factory import nearest_width

    width = nearest_width(count, target)
    if width < 1:
        raise ValueError(
            f"sizes must leave {name} room for an MLP at {target:,} {what}, got {count(1):,} "
            "with intermediate_size 1"
        )
    return width
