"""The study of Titans: variants and ablations, against attention in the same window."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from memattn.checks import check_int, must
from memattn.parts.titans import VARIANTS
from memattn.study.base import Study, check_list, check_seeds, short_training
from memattn.study.cells import Cell, Measure
from memattn.train.config import DataConfig, ModelConfig, TaskConfig, TrainConfig, TrainingConfig

VANILLA = "vanilla"
# what the paper takes away, in its order; fields of the part
WITHOUT: dict[str, dict[str, Any]] = {
    "no-decay": {"decay": None},
    "no-momentum": {"momentum": None},
    "no-convolution": {"conv_size": 1},
    "linear": {"memory_depth": 1},
    "no-persistent": {"num_persistent_tokens": 0},
}
MODELS = (VANILLA, *VARIANTS, *WITHOUT)
USUAL = ("lmm", "mac", "mag", "mal")  # the paper's variants
HEADINGS = {
    "recall": "Multi-query associative recall",
    "needle": "One needle",
    "text": "Text",
}


@dataclass(frozen=True, kw_only=True)
class TitansCompare:
    """The models that are compared, and the tasks.

    Attributes:
        parts: What the models are trained on, each on its own: ``recall``, ``needle``, ``text``.
        variant: The variant that has exactly the sizes; the ablations are made of this one. Each of
            the others gets the ``intermediate_size`` that brings its number of parameters nearest.
        longer: Models are measured at the training length and at this multiple of it.
        samples: Samples of a task that are asked at each length.
        seeds: Seeds of weights and order of the samples; each model is trained with each.
    """

    parts: list[str] = field(default_factory=lambda: list(HEADINGS))
    variant: str = "lmm"
    longer: int = 4
    samples: int = 128
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])

    def __post_init__(self) -> None:
        check_list("compare.parts", self.parts, tuple(HEADINGS))
        if self.variant not in VARIANTS:
            must("compare.variant", f"be one of {', '.join(VARIANTS)}", repr(self.variant))
        check_int("compare.longer", self.longer, 2)
        check_int("compare.samples", self.samples, 1)
        check_seeds(self.seeds)


@dataclass(frozen=True, kw_only=True)
class TitansPart:
    """One thing that models are trained on, and which ones.

    Attributes:
        models: Variants; ``vanilla``, attention within the window alone; and ``no-decay``,
            ``no-momentum``, ``no-convolution``, ``linear`` (one layer), ``no-persistent``.
        window_size: Keys in the window of the attention, of all models; tokens of a segment of
            ``mac``.
        sizes: Sizes of every model, keywords of the presets.
        memory: Further fields of the Titans part, such as ``chunk_size``.
        data: The text or task, of which a part must be held out.
        training: Optimisation; output_dir and seed are left to the study.
    """

    models: list[str] = field(default_factory=lambda: [VANILLA, *USUAL, *WITHOUT])
    window_size: int = 16
    sizes: dict[str, Any] = field(
        default_factory=lambda: dict(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=96,
            initializer_range=0.1,
        )
    )
    memory: dict[str, Any] = field(
        default_factory=lambda: dict(chunk_size=16, lr=0.1, max_norm=1.0)
    )
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=short_training)

    def __post_init__(self) -> None:
        check_list("models", self.models, MODELS)
        check_int("window_size", self.window_size, 1)
        for name in ("variant", "window_size", "segment_len"):
            if name in self.memory:
                must(f"memory.{name}", "be left to the study", self.memory[name])


def _training(**options: Any) -> TrainingConfig:
    return short_training(base_model_lr=6e-3, weight_decay=0.0, **options)


def _task(name: str, options: dict[str, Any], **data: Any) -> DataConfig:
    task = TaskConfig(name=name, options=options, samples=8000)
    return DataConfig(**{**data, "task": task, "held_out": 0.02, "packed": False})


@dataclass(frozen=True, kw_only=True)
class TitansStudy(Study):
    """Compare the variants of Titans and their ablations with a plain decoder, over several seeds.

    All models of a part have the same number of parameters, and attention of all sees the same
    window. The tasks ask for facts farther back than windows reach through all layers.

    Attributes:
        out: Folder of the runs and results.
        compare: The models that are compared, and the tasks.
        recall: Models trained on multi-query associative recall.
        needle: Models trained to find a needle in a haystack.
        text: Models trained on a text.
    """

    system: ClassVar[str] = "titans"
    heading: ClassVar[str] = "Titans against a plain decoder with the same window"

    out: str = "runs/titans_study_small"
    compare: TitansCompare = field(default_factory=TitansCompare)
    recall: TitansPart = field(
        default_factory=lambda: TitansPart(
            data=_task("recall", {"vocab_size": 24, "num_pairs": 4}, seq_len=64),
            training=_training(max_steps=400, warmup_steps=20),
        )
    )
    needle: TitansPart = field(
        default_factory=lambda: TitansPart(
            models=[VANILLA, *USUAL],
            data=_task("needle", {"needle": "word"}, vocab_size=700, seq_len=96),
            training=_training(max_steps=300, warmup_steps=20),
        )
    )
    text: TitansPart = field(
        default_factory=lambda: TitansPart(
            models=[VANILLA, *USUAL],
            data=DataConfig(vocab_size=1024, seq_len=128),
            training=_training(max_steps=400, batch_size=8, warmup_steps=40),
        )
    )

    def __post_init__(self) -> None:
        if not self.out:
            must("out", "not be empty", repr(self.out))
        for name in ("recall", "needle"):
            part: TitansPart = getattr(self, name)
            if part.data.task is None:
                must(f"{name}.data.task", "be given", "null")
        if self.text.data.task is not None:
            must("text.data.task", "be null", self.text.data.task.name)
        self.parts()  # what is wrong in one is said before anything runs

    @property
    def seeds(self) -> list[int]:
        return self.compare.seeds

    def parts(self) -> Mapping[str, Study]:
        made = {}
        for name in self.compare.parts:
            part: TitansPart = getattr(self, name)
            for needed in (VANILLA, self.compare.variant):
                if needed not in part.models:
                    must(f"{name}.models", f"have {needed}", part.models)
            kind = _TextStudy if part.data.task is None else _TaskStudy
            made[name] = kind(out=str(Path(self.out) / name), name=name, part=part, all=self)
        return made


@dataclass(frozen=True, kw_only=True)
class _PartStudy(Study):
    """The models of one part."""

    system: ClassVar[str] = "titans"
    title: ClassVar[str] = "All models at equal parameters"
    baselines: ClassVar[tuple[str, ...]] = (VANILLA,)

    out: str
    name: str
    part: TitansPart
    all: TitansStudy

    @property
    def heading(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return HEADINGS[self.name]

    @property
    def data(self) -> DataConfig:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.part.data

    @property
    def training(self) -> TrainingConfig:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.part.training

    @property
    def seeds(self) -> list[int]:
        return self.all.seeds

    @property
    def lengths(self) -> tuple[int, int]:
        """The training length, and the longer one."""
        return self.data.seq_len, self.all.compare.longer * self.data.seq_len

    def to_dict(self) -> dict[str, Any]:
        """The fields of the configuration for this part."""
        whole = self.all.to_dict()
        return {"out": self.out, "compare": whole["compare"], **whole[self.name]}

    def plan(self, vocab_size: int) -> list[Cell]:
        """The models, vanilla first, at equal parameters."""
        from memattn.study.widths import count_parameters, equal_width

        target = count_parameters(*self._preset(self.all.compare.variant), vocab_size)
        cells = []
        for name in self.part.models:
            preset, options = self._preset(name)

            def count(width: int, preset: str = preset, options: dict[str, Any] = options) -> int:
                return count_parameters(preset, {**options, "intermediate_size": width}, vocab_size)

            width = equal_width(name, count, target, "parameters")
            model = ModelConfig(preset=preset, options={**options, "intermediate_size": width})
            cells.append(Cell(name=name, model=model, counts={"parameters": count(width)}))
        return cells

    def _preset(self, name: str) -> tuple[str, dict[str, Any]]:
        """Preset and keywords of a model."""
        options = {**self.part.sizes, "window_size": self.part.window_size}
        if name == VANILLA:
            return "segmented", {**options, "segment_len": None, "num_persistent_tokens": 0}
        variant = name if name in VARIANTS else self.all.compare.variant
        options |= {"segment_len": self.part.window_size, **self.part.memory, "variant": variant}
        return "titans", options | WITHOUT.get(name, {})

    @property
    def reach(self) -> int:
        """Tokens that the window reaches back through all layers."""
        return self.part.window_size * self.part.sizes["num_hidden_layers"]

    def _model(self, config: TrainConfig) -> Any:
        """The model of a finished run, on its device."""
        import torch

        from memattn.models import MemAttnForCausalLM

        model = MemAttnForCausalLM.from_pretrained(Path(config.training.output_dir) / "model")
        if torch.accelerator.is_available() and not self.training.cpu:
            model = model.to(torch.accelerator.current_accelerator())
        return model


@dataclass(frozen=True, kw_only=True)
class _TaskStudy(_PartStudy):
    """Models trained on a task: the share of right answers at both lengths."""

    @property
    def measures(self) -> tuple[Measure, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        short, long = self.lengths
        return (
            Measure("accuracy", f"accuracy at {short}"),
            Measure("accuracy_longer", f"accuracy at {long}"),
        )

    @cached_property
    def _source(self) -> Any:
        from memattn.train.setup import run_tokenizer
        from memattn.train.task_corpus import make_task

        assert self.data.task is not None
        return make_task(self.data.task, run_tokenizer(self.text_config()))

    def measure(self, config: TrainConfig) -> dict[str, float]:
        from memattn.evaluate import recall

        report = recall(
            self._model(config),
            self._source,
            lengths=self.lengths,
            samples=self.all.compare.samples,
            batch_size=self.training.batch_size,
        )
        short, long = report.cells
        return {"accuracy": short.accuracy, "accuracy_longer": long.accuracy}

    def losses_note(self) -> str:
        from memattn.data.tasks import draw_sample

        n = self.all.compare.samples
        about = []
        for length in self.lengths:
            samples = [draw_sample(self._source, length, None, 0, i) for i in range(n)]
            beyond = sum(sample.distance > self.reach for sample in samples) / n
            about.append((length, beyond, sum(sample.chance for sample in samples) / n))
        (short, near, chance), (long, far, _) = about
        return (
            "Validation loss: answers of samples that are held out, at the end. Accuracy: share of "
            f"right answers in {n} samples of {short} tokens, as in training, and in {n} of "
            f"{long}; one who guesses has {chance:.2g}. The window of {self.part.window_size} keys "
            f"reaches {self.reach} tokens back through all layers; in {near:.0%} of the samples of "
            f"{short} tokens, and in {far:.0%} of those of {long}, the earliest fact that is asked "
            "for is farther back."
        )


@dataclass(frozen=True, kw_only=True)
class _TextStudy(_PartStudy):
    """Models trained on a text: the loss by the number of tokens before."""

    @property
    def measures(self) -> tuple[Measure, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return tuple(
            Measure(f"loss_from_{first}", f"loss of tokens {first} to {last}")
            for first, last in self._buckets
        )

    @property
    def _buckets(self) -> list[tuple[int, int]]:
        """First and last position of each: window, training length, and doubled from there."""
        short, long = self.lengths
        bounds = [0, self.part.window_size, short]
        while bounds[-1] < long:
            bounds.append(min(2 * bounds[-1], long))
        return [(a, b - 1) for a, b in zip(bounds, bounds[1:], strict=False)]

    def measure(self, config: TrainConfig) -> dict[str, float]:
        from memattn.evaluate import loss_by_position
        from memattn.train.setup import held_out_texts, run_tokenizer

        found = loss_by_position(
            self._model(config),
            held_out_texts(self.data),
            run_tokenizer(config),
            context_len=self.lengths[1],
            batch_size=self.training.batch_size,
        )
        losses = {}
        for first, last in self._buckets:
            own = [bucket for bucket in found if first <= bucket.first <= last]
            tokens = sum(bucket.num_tokens for bucket in own)
            if tokens:
                total = sum(bucket.loss * bucket.num_tokens for bucket in own)
                losses[f"loss_from_{first}"] = total / tokens
        return losses

    def losses_note(self) -> str:
        short, long = self.lengths
        return (
            f"Validation loss: held-out documents in rows of {short} tokens, at the end. Losses "
            f"by position are those of windows of {long} tokens of the same documents, "
            f"{self.all.compare.longer} times as long as in training; the bucket of a token counts "
            f"those before it. The window of {self.part.window_size} keys reaches {self.reach} "
            "tokens back through all layers."
        )
