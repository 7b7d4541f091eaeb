"""The study of future attention, against a plain decoder at equal parameters."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, ClassVar

from memattn._tables import Table
from memattn.checks import check_bool, check_int, must
from memattn.study.base import Study, check_list, check_seeds, short_training
from memattn.study.cells import Cell, Measure
from memattn.study.results import CellSummary
from memattn.study.tables import loss_cells, loss_heads
from memattn.train.config import DataConfig, ModelConfig, TrainingConfig

BASELINE = "baseline"
NO_LOSS = "none"
EQUAL_TO = ("baseline", "future")
AXES: tuple[str, ...] = ("loss_type", "future_dim", "source")


@dataclass(frozen=True, kw_only=True)
class FutureCompare:
    """The models that are compared with the baseline, a plain causal decoder.

    Attributes:
        loss_types: Losses of the future part: ``none``, ``mse``, ``cosine``. With ``none`` the loss
            is measured, by the first of the other types, but not trained on.
        future_dims: Positions that a token sees ahead.
        sources: Where future keys come from: ``table``, ``relative``, ``computed``.
        full: Whether every combination is trained. Otherwise one list is varied at a time, with
            the first entry of each of the others.
        equal_to: The model that has exactly ``sizes``: the ``baseline``, or ``future`` for the one
            with the first entry of each list. Each of the others gets the ``intermediate_size``
            that brings its number of parameters nearest to that model's.
        seeds: Seeds of weights and order of the text; each model is trained with each.
    """

    loss_types: list[str] = field(default_factory=lambda: ["cosine", "mse", NO_LOSS])
    future_dims: list[int] = field(default_factory=lambda: [127, 16, 64])
    sources: list[str] = field(default_factory=lambda: ["table", "relative", "computed"])
    full: bool = False
    equal_to: str = "baseline"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])

    def __post_init__(self) -> None:
        from memattn.nn.future_attention import KEY_SOURCES
        from memattn.ops.future_attention import LOSS_TYPES

        check_list("compare.loss_types", self.loss_types, (NO_LOSS, *LOSS_TYPES))
        check_list("compare.sources", self.sources, KEY_SOURCES)
        check_seeds(self.seeds)
        check_list("compare.future_dims", self.future_dims)
        for value in self.future_dims:
            check_int("compare.future_dims", value, 1)
        check_bool("compare.full", self.full)
        if self.equal_to not in EQUAL_TO:
            must("compare.equal_to", f"be one of {', '.join(EQUAL_TO)}", repr(self.equal_to))


@dataclass(frozen=True, kw_only=True)
class FutureStudy(Study):
    """Compare future attention with a plain decoder at equal parameters, over several seeds.

    Attributes:
        out: Folder of the runs and results.
        compare: The models that are compared.
        sizes: Sizes of every model, keywords of the presets.
        future_options: Further keywords of the future models, such as ``start_layer``.
        data: The text, of which a part must be held out.
        training: Optimisation. The study sets ``output_dir`` and ``seed`` of each run.
    """

    system: ClassVar[str] = "future"
    heading: ClassVar[str] = "Future attention against a plain decoder"
    title: ClassVar[str] = "All models at equal parameters"
    baselines: ClassVar[tuple[str, ...]] = (BASELINE,)
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("future_loss", "future loss", "eval_future_loss", compared=False),
    )

    out: str = "runs/future_small"
    compare: FutureCompare = field(default_factory=FutureCompare)
    sizes: dict[str, Any] = field(
        default_factory=lambda: dict(
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=128,
            position_embedding="learned",
            norm="layer",
            mlp="gelu",
        )
    )
    future_options: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=lambda: DataConfig(vocab_size=2048, seq_len=128))
    training: TrainingConfig = field(
        default_factory=lambda: short_training(max_steps=400, base_model_lr=3e-3, warmup_steps=40)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("future_dim", "source", "loss_type"):
            if name in self.future_options:
                where = f"compare.{name}s"
                must(f"future_options.{name}", f"be given as {where}", self.future_options[name])

    @property
    def seeds(self) -> list[int]:
        return self.compare.seeds

    def plan(self, vocab_size: int) -> list[Cell]:
        """The models, the baseline first, at equal parameters."""
        from memattn.study.widths import count_parameters, equal_width

        nothing: dict[str, Any] = dict.fromkeys(AXES)
        plans: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
            (BASELINE, nothing, "vanilla", dict(self.sizes))
        ]
        for labels in _cells(self.compare):
            options = {**self.sizes, **self.future_options, **_options(self.compare, **labels)}
            plans.append(("-".join(map(str, labels.values())), labels, "future", options))
        _, _, preset, options = plans[0 if self.compare.equal_to == "baseline" else 1]
        target = count_parameters(preset, options, vocab_size)
        cells = []
        for name, labels, preset, options in plans:

            def count(width: int, preset: str = preset, options: dict[str, Any] = options) -> int:
                return count_parameters(preset, {**options, "intermediate_size": width}, vocab_size)

            width = equal_width(name, count, target, "parameters")
            model = ModelConfig(preset=preset, options={**options, "intermediate_size": width})
            cells.append(
                Cell(name=name, model=model, labels=labels, counts={"parameters": count(width)})
            )
        return cells

    def tables(self, rows: Sequence[CellSummary]) -> list[Table]:
        """By loss type, by future_dim, by source, and all against the baseline.

        A list of ``compare`` with one entry has no table of its own.
        """
        lists = _lists(self.compare)
        centre = {name: values[0] for name, values in lists.items()}
        tables = []
        for name, values in lists.items():
            others = {other: value for other, value in centre.items() if other != name}
            ordered = sorted(values) if name == "future_dim" else values
            wanted = [{**others, name: value} for value in ordered]
            picked = [row for labels in wanted for row in rows if row.cell.labels == labels]
            if len(values) > 1:
                fixed = ", ".join(f"{other} {value}" for other, value in others.items())
                cells = [
                    (str(row.cell.labels[name]), *loss_cells(row, self.measures)) for row in picked
                ]
                heads = (name, *loss_heads(self.measures))
                tables.append(Table(f"By {name} ({fixed})", heads, cells))
        return [*tables, *super().tables(rows)]

    def losses_note(self) -> str:
        measured = next((name for name in self.compare.loss_types if name != NO_LOSS), NO_LOSS)
        return (
            "Validation and future loss: held-out documents, at the end; future losses of "
            f"different types do not compare, and `none` is measured as {measured} without being "
            "trained on."
        )


def _lists(compare: FutureCompare) -> dict[str, list[Any]]:
    """What is varied, by the names of ``AXES``."""
    return dict(zip(AXES, (compare.loss_types, compare.future_dims, compare.sources), strict=True))


def _cells(compare: FutureCompare) -> list[dict[str, Any]]:
    """Loss, future_dim and source of each future model, the first entries of all lists first."""
    lists = list(_lists(compare).values())
    if compare.full:
        found = list(product(*lists))
    else:
        centre = tuple(values[0] for values in lists)
        found = [
            (*centre[:axis], value, *centre[axis + 1 :])
            for axis, values in enumerate(lists)
            for value in values
        ]
    return [dict(zip(AXES, cell, strict=True)) for cell in dict.fromkeys(found)]


def _options(compare: FutureCompare, loss_type: str, future_dim: int, source: str) -> dict:
    """Keywords of the preset ``future``."""
    options: dict[str, Any] = {"future_dim": future_dim, "source": source}
    if loss_type != NO_LOSS:
        return {**options, "loss_type": loss_type}
    measured = next((name for name in compare.loss_types if name != NO_LOSS), None)
    return {**options, "loss_type": measured, "loss_coefficient": 0.0}
