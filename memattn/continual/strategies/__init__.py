"""Ways to learn a stream of tasks, all under one budget.

``docs/results/continual_options.md`` says how the defaults of their options were chosen.
"""

import inspect
import json
from numbers import Real
from typing import Any

from memattn.checks import check_bool, must
from memattn.continual.strategies.base import Budget, Strategy
from memattn.continual.strategies.distillation import LwF
from memattn.continual.strategies.dtgma import DTGMA
from memattn.continual.strategies.fcd import FCD
from memattn.continual.strategies.hat import HAT
from memattn.continual.strategies.lowrank import Adapter, LoRA
from memattn.continual.strategies.packnet import PackNet
from memattn.continual.strategies.penalty import EWC, SI
from memattn.continual.strategies.plain import FineTuning, Joint, Separate
from memattn.continual.strategies.replay import DERPlusPlus, Replay
from memattn.data.streams import Stream

STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy
    for strategy in (
        Joint,
        Separate,
        FineTuning,
        EWC,
        SI,
        LwF,
        Replay,
        DERPlusPlus,
        HAT,
        PackNet,
        LoRA,
        Adapter,
        FCD,
        DTGMA,
    )
}


def default_options(strategy: type[Strategy]) -> dict[str, Any]:
    """Options of a strategy with their defaults, which may change between versions."""
    options = inspect.signature(strategy).parameters.values()
    return {o.name: o.default for o in options if o.kind is o.KEYWORD_ONLY}


def split_variant(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of a variant such as ``"dtgma,reads=all"``.

    Args:
        text: The name of a strategy, and any number of ``,option=value``. Values are read as JSON,
            and as text where they are not JSON.

    Raises:
        ValueError: If an option has no value, or is there twice.
    """
    name, *parts = text.split(",")
    options: dict[str, Any] = {}
    for part in parts:
        option, equals, value = part.partition("=")
        if not (option and equals and value) or option in options:
            wanted = "read NAME or NAME,option=value,..., each option once"
            must("strategy", wanted, repr(text))
        try:
            options[option] = json.loads(value)
        except json.JSONDecodeError:
            options[option] = value
    return name, options


def make_strategy(
    name: str, stream: Stream, budget: Budget, seed: int, options: dict[str, Any] | None = None
) -> Strategy:
    """A strategy by its name.

    Args:
        name: A key of ``STRATEGIES``.
        stream: The tasks.
        budget: The training budget.
        seed: Seed of the weights and of all random choices.
        options: Further arguments of the strategy, such as ``{"ewc_lambda": 100.0}``.

    Returns:
        The strategy, which has learned nothing yet.

    Raises:
        TypeError: If an option is not of the kind of its default, a number or a truth value.
        ValueError: If there is no such strategy, it does not support the stream, it has no such
            option, or the option is out of range.
    """
    if name not in STRATEGIES:
        must("strategy", f"be one of {', '.join(STRATEGIES)}", repr(name))
    options = options or {}
    known = default_options(STRATEGIES[name])
    unknown = [option for option in options if option not in known]
    if unknown:
        wanted = f"be of {', '.join(known)}" if known else "be left out"
        must(f"options of strategy {name!r}", wanted, ", ".join(map(repr, unknown)))
    for option, value in options.items():
        _check_kind(option, value, known[option])
    return STRATEGIES[name](stream, budget, seed, **options)


def _check_kind(option: str, value: Any, default: Any) -> None:
    """Raise TypeError unless an option is of the kind of its default; None stands for a number."""
    if isinstance(default, bool):
        check_bool(option, value)
    elif isinstance(default, str) or (default is None and value is None):
        return  # a strategy names the texts that it knows
    elif isinstance(value, bool) or not isinstance(value, Real):
        must(option, "be a number", repr(value), TypeError)


__all__ = [
    "STRATEGIES",
    "Budget",
    "Strategy",
    "default_options",
    "make_strategy",
    "split_variant",
]
