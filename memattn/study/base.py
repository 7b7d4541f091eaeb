"""The base class of studies, through which they are run and reported.

A study is one file beside this one: a frozen dataclass that plans its cells. Its fields are the
options of ``memattn study <system>``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

from memattn._tables import Table
from memattn.checks import check_int, must
from memattn.study.cells import Cell, Measure
from memattn.study.results import CellSummary
from memattn.study.tables import difference_table, make_table
from memattn.train.config import DataConfig, ModelConfig, TrainConfig, TrainingConfig
from memattn.yaml_text import dump_yaml

NOTE = (
    "Mean ± standard deviation over {seeds}, nats per token. Train loss: cross-entropy over "
    "the last tenth of the steps. {losses} Differences: validation loss minus that of {baselines} "
    "with the same seed, which has the same text in the same order; in brackets the 95 % t "
    "interval of their mean."
)


class Study:
    """Base of all studies.

    Class attributes:
        system: Name on the command line.
        heading: Heading of its page.
        title: Title of its table of all cells.
        baselines: Names of the cells that the others are compared with.
        measures: Measures other than train and validation loss.
        packages: Packages that its numbers depend on beside torch.
        folder_option: Name of the option ``out`` in messages.

    Attributes:
        out: Folder of the runs and results.
        data: The text, of which a part must be held out.
        training: Optimisation. The study sets ``output_dir`` and ``seed`` of each run.
    """

    system: ClassVar[str]
    heading: ClassVar[str]
    title: ClassVar[str]
    baselines: ClassVar[tuple[str, ...]]
    measures: ClassVar[tuple[Measure, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ()
    folder_option: ClassVar[str] = "out"

    out: str
    data: DataConfig
    training: TrainingConfig

    def __post_init__(self) -> None:
        if not self.out:
            must("out", "not be empty", repr(self.out))
        if self.data.held_out == 0.0:
            must("data.held_out", "be above 0 for a study", self.data.held_out)
        for name in ("output_dir", "seed"):
            value = getattr(self.training, name)
            if value != getattr(TrainingConfig(), name):
                must(f"training.{name}", "be left to the study", value)
        self.training.num_steps()  # refuses epochs: the runs are compared at equal steps

    def parts(self) -> Mapping[str, "Study"]:
        """The studies that make up this one, by name, each on its own text or task. A study with
        parts trains nothing itself; its report joins theirs in this order.
        """
        return {}

    @property
    def seeds(self) -> list[int]:
        """Seeds of weights and order of the text; each cell is trained with each."""
        raise NotImplementedError(f"{type(self).__name__} must define seeds")

    def plan(self, vocab_size: int) -> list[Cell]:
        """The cells, the baselines among them.

        Args:
            vocab_size: Entries of the tokenizer.

        Raises:
            ValueError: If an option is wrong, or cells cannot be made equal.
        """
        raise NotImplementedError(f"{type(self).__name__} must define plan")

    def first_run(self) -> TrainConfig | None:
        """The training run of the weights that the cells start from, or None."""
        return None

    def text_config(self) -> TrainConfig:
        """A run with the text and the tokenizer of all cells; it is not trained."""
        return TrainConfig(model=ModelConfig(preset="vanilla"), data=self.data)

    def trains_itself(self, config: TrainConfig) -> bool:
        """Train the run of a cell if ``memattn.train`` cannot, and return whether it did. The run
        folder is as one of ``memattn.train``.
        """
        return False

    def measure(self, config: TrainConfig) -> dict[str, float]:
        """The measures without a column in ``metrics.csv``, for the finished run of a cell."""
        return {}

    def run_config(self, cell: Cell, seed: int) -> TrainConfig:
        """The training run of a cell with a seed."""
        folder = Path(self.out) / cell.name / f"seed-{seed}"
        training = replace(self.training, output_dir=str(folder), seed=seed)
        return TrainConfig(model=cell.model, data=self.data, training=training)

    def tables(self, rows: Sequence[CellSummary]) -> list[Table]:
        """The tables of the report, for the cells over their seeds."""
        if len(self.baselines) == 1:
            return [make_table(self.title, rows, self.baselines, self.measures)]
        return [
            make_table(self.title, rows, (), self.measures),
            *(difference_table(rows, name, self.measures) for name in self.baselines),
        ]

    def note(self, rows: Sequence[CellSummary]) -> str:
        """Text that explains the numbers of the tables."""
        names = self.baselines
        n = max(spread.n for row in rows for spread in row.losses.values())
        return NOTE.format(
            seeds="one seed" if n == 1 else f"{n} seeds",
            losses=self.losses_note(),
            baselines=f"the {names[0]}" if len(names) == 1 else " or ".join(names),
        )

    def losses_note(self) -> str:
        """Text that explains the losses other than the train loss, for ``note``."""
        return "Validation loss: held-out documents, at the end."

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values."""
        return asdict(self)  # pyright: ignore[reportArgumentType]

    def to_yaml(self) -> str:
        """The configuration as YAML, which ``load_study`` reads."""
        return dump_yaml(self.to_dict())


def short_training(**options: Any) -> TrainingConfig:
    """The training of a small study: with held-out losses, and one checkpoint at the end."""
    usual: dict[str, Any] = dict(batch_size=16, eval_steps=100, save_steps=None, keep_checkpoints=1)
    return TrainingConfig(**usual | options)


def check_seeds(seeds: Sequence[Any], name: str = "compare.seeds") -> None:
    """Raise ValueError unless these are different seeds, one at least."""
    check_list(name, seeds)
    for seed in seeds:
        check_int(name, seed, 0)


def check_list(name: str, values: Sequence[Any], known: Sequence[Any] | None = None) -> None:
    """Raise ValueError unless a list has different, known entries, one at least."""
    if not values or len(set(values)) < len(values):
        must(name, "have at least one entry and none twice", list(values))
    for value in values:
        if known is not None and value not in known:
            must(name, f"have entries of {', '.join(known)}", repr(value))
