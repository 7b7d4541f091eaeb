"""The cells that a study compares, and their measures."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from memattn.train.config import ModelConfig


class Measure(NamedTuple):
    """A measure of a cell other than the train and validation loss.

    Attributes:
        name: Its name in results.
        head: Its head in tables.
        column: Column of ``metrics.csv`` that has it in the rows of held-out evaluations; None
            where the study measures it itself once a run is finished.
        compared: Whether differences to the baselines are reported.
    """

    name: str
    head: str
    column: str | None = None
    compared: bool = True


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model of a study, which is trained with each seed.

    Attributes:
        name: Its name, and that of its folder.
        model: How it is built.
        labels: Properties that distinguish it from the other cells, by name; columns of the
            results.
        counts: Its sizes and costs by name, such as ``parameters``.
        fixed: Measures by name, the same for every seed, of a model that the study does not train;
            None for one that it trains.
    """

    name: str
    model: ModelConfig
    labels: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    fixed: Mapping[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The cell as plain values; options that its model does not use are left out."""
        model = {k: v for k, v in asdict(self.model).items() if v not in (None, False, {})}
        return {"name": self.name, **self.labels, **model, **self.counts}

    def __str__(self) -> str:
        counts = [f"{count:,} {name.replace('_', ' ')}" for name, count in self.counts.items()]
        if "intermediate_size" in self.model.options:
            counts.append(f"MLP width {self.model.options['intermediate_size']}")
        return f"{self.name}: {', '.join(counts)}"
