"""The study of shiftable attention: specialists beside a frozen generalist, and other methods."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from memattn._tables import Table
from memattn.checks import check_int, must
from memattn.study.base import Study, check_list, check_seeds, short_training
from memattn.study.cells import Cell, Measure
from memattn.study.results import CellSummary
from memattn.study.tables import difference_table, make_table
from memattn.train.config import DataConfig, LoraConfig, ModelConfig, TrainConfig, TrainingConfig

BASE = "base"
SYSTEMS = ("full", "lora", "specialists", "prototype", "xlora")
UNMIXED, TAUGHT = "-unmixed", "-taught"
# so large a prior leaves the base nothing: the specialist learns alone, and no gate is trained
ALONE = 1e6


@dataclass(frozen=True, kw_only=True)
class ShiftableCompare:
    """What is compared.

    Attributes:
        systems: ``full``, all weights of the base are trained; ``lora``; ``specialists``, with each
            number and each scope; ``prototype``, a specialist whose gate is not trained but set for
            each sequence by the nearest prototype; ``xlora``, X-LoRA of PEFT over the LoRA and one
            that adds nothing.
        specialists: Numbers of specialists.
        scopes: What a token's gates depend on: ``token``, ``prefix``.
        taught: Scopes with which one specialist is also trained with a gate that learns the domain
            of each text (``Teaching``).
        unmixed: Systems that are trained without the mixed-in text as well: ``full``, ``lora``,
            ``specialists`` (the first number and scope).
        seeds: Seeds of new weights and order of the text; each is trained with each.
    """

    systems: list[str] = field(default_factory=lambda: list(SYSTEMS))
    specialists: list[int] = field(default_factory=lambda: [1, 2, 3, 4])
    scopes: list[str] = field(default_factory=lambda: ["token", "prefix"])
    taught: list[str] = field(default_factory=lambda: ["prefix"])
    unmixed: list[str] = field(default_factory=lambda: ["full", "specialists"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])

    def __post_init__(self) -> None:
        check_list("compare.systems", self.systems, SYSTEMS)
        for name in ("lora", "specialists"):
            if name not in self.systems:
                must("compare.systems", f"have {name}, which others rest on", self.systems)
        check_list("compare.specialists", self.specialists)
        for number in self.specialists:
            check_int("compare.specialists", number, 1)
        check_list("compare.scopes", self.scopes, ("token", "prefix"))
        if self.taught:
            check_list("compare.taught", self.taught, ("token", "prefix"))
        if self.unmixed:
            known = [name for name in ("full", "lora", "specialists") if name in self.systems]
            check_list("compare.unmixed", self.unmixed, known)
        check_seeds(self.seeds)


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """How gates learn the domain of each text, in the cells called taught.

    Attributes:
        gate_rows: Rows of each text on which they learn before the first step.
        mix_weight: Weight of the general text relative to the other.
        domain_coefficient: Coefficient of the loss ``gate_domain`` in training.
        gate_lr: Learning rate of the gates in training.
    """

    gate_rows: int = 1024
    mix_weight: float = 10.0
    domain_coefficient: float = 0.1
    gate_lr: float = 5e-4


@dataclass(frozen=True, kw_only=True)
class Generalist:
    """The base model, which is trained on the general text first.

    Attributes:
        sizes: Sizes, keywords of the preset ``vanilla``.
        vocab_size: Entries of the tokenizer that is trained on the general text.
        training: Optimisation; output_dir is left to the study.
    """

    sizes: dict[str, Any] = field(
        default_factory=lambda: dict(
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=128,
        )
    )
    vocab_size: int = 1024
    training: TrainingConfig = field(
        default_factory=lambda: short_training(
            max_steps=1000, batch_size=8, base_model_lr=3e-3, warmup_steps=40, eval_steps=None
        )
    )

    def __post_init__(self) -> None:
        check_int("base.vocab_size", self.vocab_size, 259)
        if self.training.output_dir != TrainingConfig().output_dir:
            must("base.training.output_dir", "be left to the study", self.training.output_dir)


@dataclass(frozen=True, kw_only=True)
class ShiftableStudy(Study):
    """Compare gated specialists beside a frozen generalist with other methods of specialisation.

    A decoder is trained on a general text; then each system learns a specialist text, with some of
    the general text mixed in. The loss on the general text is measured as well.

    Attributes:
        out: Folder of the runs and results.
        compare: What is compared.
        base: The generalist.
        lora: LoRA, and each of those that X-LoRA mixes.
        specialists: Fields of the specialists; num_specialists, scope, prior and those of
            ``teaching`` are left to the study.
        teaching: How gates of the cells called taught learn.
        general: The general text, of which a part must be held out.
        data: The specialist text, of which a part must be held out, and what is mixed in.
        training: Optimisation; output_dir and seed are left to the study.
    """

    system: ClassVar[str] = "shiftable"
    heading: ClassVar[str] = "Specialists beside a frozen generalist"
    title: ClassVar[str] = "All systems after equal steps on the specialist text"
    baselines: ClassVar[tuple[str, ...]] = (BASE, "lora")
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("general_loss", "general loss"),
        Measure("forced_gap", "general loss, base gate forced - base", compared=False),
        Measure("specialist_gate", "specialists' gate, specialist text", compared=False),
        Measure("general_gate", "specialists' gate, general text", compared=False),
        Measure("separation", "gate separation", compared=False),
    )
    packages: ClassVar[tuple[str, ...]] = ("transformers", "peft")

    out: str = "runs/shiftable_study_small"
    compare: ShiftableCompare = field(default_factory=ShiftableCompare)
    base: Generalist = field(default_factory=Generalist)
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=16, alpha=32))
    specialists: dict[str, Any] = field(default_factory=dict)
    teaching: Teaching = field(default_factory=Teaching)
    general: DataConfig = field(
        default_factory=lambda: DataConfig(
            dataset_name="general", held_out=0.004, seq_len=128, packed=False
        )
    )
    data: DataConfig = field(
        default_factory=lambda: DataConfig(
            dataset_name="data-engineering",
            mix_in="general",
            held_out=0.03,
            seq_len=128,
            packed=False,
        )
    )
    training: TrainingConfig = field(
        default_factory=lambda: short_training(
            max_steps=150, batch_size=4, base_model_lr=3e-3, warmup_steps=15, eval_steps=75
        )
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.mix_in is None:
            must("data.mix_in", "be the general text, which unmixed runs leave out", None)
        # of one order of documents: those that are mixed in were then not held out
        if not 0.0 < self.general.held_out <= self.data.held_out:
            allowed = f"be above 0 and at most data.held_out {self.data.held_out}"
            must("general.held_out", allowed, self.general.held_out)
        if self.general.split_seed != self.data.split_seed:
            allowed = f"be that of data, {self.data.split_seed}"
            must("general.split_seed", allowed, self.general.split_seed)
        for name in ("data", "general"):
            data = getattr(self, name)
            if data.packed:
                must(f"{name}.packed", "be false: gates of a row are those of one document", "true")
            for own in ("tokenizer", "vocab_size"):
                if getattr(data, own) is not None:
                    allowed = "be null: the tokenizer is that of the base model"
                    must(f"{name}.{own}", allowed, getattr(data, own))
        own = ("num_specialists", "names", "scope", "prior", "domain_coefficient", "gate_lr")
        for name in own:
            if name in self.specialists:
                must(f"specialists.{name}", "be left to the study", self.specialists[name])

    @property
    def seeds(self) -> list[int]:
        return self.compare.seeds

    @property
    def base_path(self) -> str:
        """Path of the generalist."""
        return str(Path(self.out) / BASE / "model")

    def first_run(self) -> TrainConfig | None:
        """The training of the generalist, on packed rows: most entries are short."""
        vocabulary = dict(tokenizer="bpe", vocab_size=self.base.vocab_size)
        training = replace(self.base.training, output_dir=str(Path(self.out) / BASE))
        return TrainConfig(
            model=ModelConfig(preset="vanilla", options=self.base.sizes),
            data=replace(self.general, packed=True, **vocabulary),
            training=training,
        )

    def text_config(self) -> TrainConfig:
        return TrainConfig(model=ModelConfig(model_path=self.base_path), data=self.data)

    def run_config(self, cell: Cell, seed: int) -> TrainConfig:
        config = super().run_config(cell, seed)
        if cell.labels["taught"]:
            training = replace(config.training, gate_rows=self.teaching.gate_rows)
            data = replace(config.data, mix_weight=self.teaching.mix_weight)
            return replace(config, data=data, training=training)
        if cell.labels["mixed"]:
            return config
        return replace(config, data=replace(config.data, mix_in=None))

    def plan(self, vocab_size: int) -> list[Cell]:
        """The unchanged base model, and every system."""
        from memattn.study.shiftable_measures import base_losses
        from memattn.study.shiftable_xlora import classifier_parameters

        parameters = _count(ModelConfig(model_path=self.base_path))
        cells = [
            Cell(
                name=BASE,
                model=ModelConfig(model_path=self.base_path),
                labels={"mixed": True, "taught": False},
                counts={"trainable_parameters": 0, "parameters": parameters},
                fixed=base_losses(self),
            )
        ]
        for name, model in self.models().items():
            base = name.removesuffix(UNMIXED)
            trainable = _count(model, trainable=True)
            added = 0 if base == "full" else trainable
            if name == "xlora":
                trainable = classifier_parameters(self)
                added = 2 * added + trainable
            counts = {"trainable_parameters": trainable, "parameters": parameters + added}
            labels = {"mixed": name == base, "taught": name.endswith(TAUGHT)}
            cells.append(Cell(name=name, model=model, labels=labels, counts=counts))
        return cells

    def models(self) -> dict[str, ModelConfig]:
        """The model of every cell but the base, by its name."""
        chosen = self.compare
        frozen = ModelConfig(model_path=self.base_path, freeze_base_model=True, lora=self.lora)
        special = {
            f"specialists-{n}-{scope}": self._with_specialists(n, scope)
            for scope in chosen.scopes
            for n in chosen.specialists
        }
        models = {"full": ModelConfig(model_path=self.base_path), "lora": frozen}
        one = {"specialists": next(iter(special)), "full": "full", "lora": "lora"}
        models |= special
        known = {
            "domain_coefficient": self.teaching.domain_coefficient,
            "gate_lr": self.teaching.gate_lr,
        }
        models |= {
            f"specialists-1-{scope}{TAUGHT}": self._with_specialists(1, scope, **known)
            for scope in chosen.taught
        }
        alone = self._with_specialists(1, "token", prior=ALONE)
        models |= {"prototype": alone, "xlora": frozen}
        kept = {
            name: model
            for name, model in models.items()
            if name.partition("-")[0] in chosen.systems
        }
        kept |= {one[name] + UNMIXED: models[one[name]] for name in chosen.unmixed}
        return kept

    def _with_specialists(self, number: int, scope: str, **fields: Any) -> ModelConfig:
        """The frozen generalist with so many specialists."""
        own = {"num_specialists": number, "scope": scope, "prior": 1.0, **fields}
        return ModelConfig(
            model_path=self.base_path,
            specialists={**self.specialists, **own},
            freeze_base_model=True,
        )

    def trains_itself(self, config: TrainConfig) -> bool:
        if Path(config.training.output_dir).parent.name != "xlora":
            return False
        from memattn.study.shiftable_xlora import train_xlora

        train_xlora(self, config)
        return True

    def measure(self, config: TrainConfig) -> dict[str, float]:
        """General loss, gates and the rest of a finished run."""
        from memattn.study.shiftable_measures import measure_run
        from memattn.study.shiftable_xlora import load_xlora
        from memattn.train.attached import load_model_folder

        folder = Path(config.training.output_dir)
        mixed = folder.parent.name == "xlora"
        model = load_xlora(self, folder) if mixed else load_model_folder(folder / "model")
        return measure_run(self, config, model)

    def tables(self, rows: Sequence[CellSummary]) -> list[Table]:
        losses, gates = self.measures[:1], self.measures[1:]
        gated = [row for row in rows if "separation" in row.losses]
        return [
            make_table(self.title, rows, (), losses),
            *(difference_table(rows, name, losses) for name in self.baselines),
            _gate_table(gated, gates),
        ]

    def losses_note(self) -> str:
        names = (self.data.dataset_name, self.general.dataset_name)
        special, general = (name if isinstance(name, str) else ", ".join(name) for name in names)
        share = f"{100 * self.data.mix_share:g} %"
        taught = (
            f"{TAUGHT[1:].capitalize()}: before the first step the gate learnt on "
            f"{self.teaching.gate_rows} rows of each text whose it is, and went on learning it. "
        )
        if not self.compare.taught:
            taught = ""
        return (
            f"Validation loss: held-out documents of the specialist text ({special}), at the end; "
            f"general loss: held-out documents of the general text ({general}), which {BASE} has "
            f"before. {share} of the training tokens are of the general text, but for cells "
            f"called {UNMIXED[1:]}. {taught}Gates: means over layers and tokens of held-out "
            "documents; separation: those on the specialist text minus those on the general one."
        )


def _gate_table(rows: Sequence[CellSummary], measures: Sequence[Measure]) -> Table:
    """Gates on each text, of the cells with gates."""
    from memattn.study.tables import loss_cells

    heads = ("model", *(measure.head for measure in measures))
    skip = len(loss_cells(rows[0])) if rows else 0
    cells = [(row.cell.name, *loss_cells(row, measures)[skip:]) for row in rows]
    return Table("Gates", heads, cells)


def _count(config: ModelConfig, *, trainable: bool = False) -> int:
    """Parameters of a model."""
    from memattn.train.attached import load_base

    parameters = load_base(config).parameters()
    return sum(p.numel() for p in parameters if p.requires_grad or not trainable)
