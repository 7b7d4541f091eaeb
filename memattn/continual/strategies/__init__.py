"""Ways to learn a stream of tasks, all under one budget."""

from typing import Any

from memattn.continual.strategies.base import Budget, Strategy
from memattn.continual.strategies.distillation import LwF
from memattn.continual.strategies.dtgma import DTGMA
from memattn.continual.strategies.hat import HAT
from memattn.continual.strategies.lowrank import Adapter, LoRA
from memattn.continual.strategies.packnet import PackNet
from memattn.continual.strategies.penalty import EWC, SI
from memattn.continual.strategies.plain import FineTuning, Joint, Separate
from memattn.continual.strategies.replay import DERPlusPlus, Replay
from memattn.continual.streams import Stream
from memattn.ops._checks import must

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
        DTGMA,
    )
}


def make_strategy(
    name: str, stream: Stream, budget: Budget, seed: int, options: dict[str, Any] | None = None
) -> Strategy:
    """A strategy by its name.

    Args:
        name: A key of ``STRATEGIES``.
        stream: The tasks to come.
        budget: What may be spent.
        seed: Seed of the weights and of every choice.
        options: Further arguments of the strategy, such as ``{"ewc_lambda": 100.0}``.

    Returns:
        The strategy, which has learned nothing yet.

    Raises:
        ValueError: If there is no such strategy, or it has no meaning for the stream.
        TypeError: If the strategy has no such option.
    """
    if name not in STRATEGIES:
        must("strategy", f"be one of {', '.join(STRATEGIES)}", repr(name))
    return STRATEGIES[name](stream, budget, seed, **options or {})


__all__ = ["STRATEGIES", "Budget", "Strategy", "make_strategy"]
