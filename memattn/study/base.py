"""What every study says about itself, so that running and reporting know none by name.

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
        system: Its name on the command line.
        heading: Heading of its page.
        title: Title of its table of all cells.
        baselines: Names of the cells that the others are compared with.
        measures: What is measured beside train and validation loss.
        packages: Packages that its numbers depend on beside torch.
        folder_option: What messages call the option ``out``.

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
        """The studies that it is made of, by name, each on a text or task of its own.

        One with parts trains nothing itself; its report is theirs, in this order.
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
        """A training run that those of the cells begin with, or None."""
        return None

    def text_config(self) -> TrainConfig:
        """A run with the text and the tokenizer of all cells; it is not trained."""
        return TrainConfig(model=ModelConfig(preset="vanilla"), data=self.data)

    def trains_itself(self, config: TrainConfig) -> bool:
        """Train the run of a cell that ``memattn.train`` cannot, and return whether it was one.

        Such a run leaves the folder that ``memattn.train`` would.
        """
        return False

    def measure(self, config: TrainConfig) -> dict[str, float]:
        """What ``measures`` has no column for, of the finished run of a cell."""
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
        """What the numbers of the tables mean."""
        names = self.baselines
        n = max(spread.n for row in rows for spread in row.losses.values())
        return NOTE.format(
            seeds="one seed" if n == 1 else f"{n} seeds",
            losses=self.losses_note(),
            baselines=f"the {names[0]}" if len(names) == 1 else " or ".join(names),
        )

    def losses_note(self) -> str:
        """What the losses beside the train loss are, for ``note``."""
        return "Validation loss: held-out documents, at the end."

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values."""
        return asdict(self)  # pyright: ignore[reportArgumentType]

    def to_yaml(self) -> str:
        """The configuration as YAML, which ``load_study`` reads."""
        return dump_yaml(self.to_dict())


def short_training(**options: Any) -> TrainingConfig:
    """The training of a small study: held-out losses on the way, and one checkpoint at the end."""
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
