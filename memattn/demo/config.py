"""What the demo trains: sizes, presets, and runs of equal tokens and parameters."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from memattn.checks import check_int
from memattn.demo.plan import WARMUP_STEPS, Stage
from memattn.models import PRESETS
from memattn.models.factory import count_parameters, nearest_width
from memattn.train import DataConfig, ModelConfig, TrainConfig, TrainingConfig

# Small enough for two CPU cores, and large enough to learn more than counts of words
SIZES = dict(
    hidden_size=192,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=640,
    max_position_embeddings=2048,
)
# of a preset: variants that train fast and are small, with a window that the audit has to cross
OPTIONS: dict[str, dict[str, Any]] = {
    "titans": dict(variant="mag", window_size=64, chunk_size=32, memory_expansion=1),
    "future": dict(future_dim=64, source="relative"),
    "memory_transformer": dict(num_memory_tokens=256),
}
# presets that begin with the weights of another, which stay: they learn another text
STARTS = {"shiftable": "vanilla"}
ADDED_STEPS = 0.25  # of the steps of the others
HELD_OUT = 0.02  # of the documents, so that evaluation leaves time for many presets


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demo does.

    Attributes:
        out: Folder of the results.
        minutes: Time for training all presets together; the number of tokens is what fits, the
            same for each preset.
        corpus: A corpus, a text file, a folder or a Hugging Face dataset.
        specialty: The same, for presets that are added to a trained model.
        seed: The one seed of weights and order.
        seq_len: Tokens in a row.
        batch_size: Rows in a step.
        vocab_size: Entries of the tokenizer, which is trained on the corpus.
        sizes: Sizes of every model, keywords of the presets. Widths of MLPs are changed so that all
            have the parameters of the plain decoder.
        cache_dir: Folder for fetched corpora, tokenizers and tokens.
        processes: How many presets train and are measured at a time, each with its share of the
            threads; None means one for each CPU core, and one on a GPU.
    """

    out: str = "runs/demo"
    minutes: float = 7.0
    corpus: str = "wiki"
    specialty: str = "moby-dick"
    seed: int = 0
    seq_len: int = 256
    batch_size: int = 4
    vocab_size: int = 4096
    sizes: dict[str, Any] = field(default_factory=lambda: dict(SIZES))
    cache_dir: str = "~/.cache/memattn"
    processes: int | None = None

    def __post_init__(self) -> None:
        if self.processes is not None:
            check_int("processes", self.processes, 1)
        if not 0.0 < self.minutes < float("inf"):
            raise ValueError(f"minutes must be positive and finite, got {self.minutes}")

    @cached_property
    def _target(self) -> int:
        """Parameters of the plain decoder."""
        return self._count("vanilla", self.sizes)

    def _count(self, preset: str, options: dict[str, Any]) -> int:
        return count_parameters(PRESETS[preset](vocab_size=self.vocab_size, **options))

    def model_options(self, preset: str) -> dict[str, Any]:
        """Keywords of a preset, with an MLP as wide as equal parameters ask for, if any is."""
        options = OPTIONS.get(preset, {}) | self.sizes
        count = lambda width: self._count(preset, options | {"intermediate_size": width})
        width = nearest_width(count, self._target)
        return options | {"intermediate_size": width} if width >= 1 else options

    def data(self, corpus: str, vocab_size: int | None) -> DataConfig:
        """A text, with a tokenizer trained on it or, for None, that of the model."""
        return DataConfig(
            dataset_name=corpus,
            vocab_size=vocab_size,
            held_out=HELD_OUT,
            seq_len=self.seq_len,
            cache_dir=self.cache_dir,
        )

    def train_config(self, preset: str, stage: Stage) -> TrainConfig:
        """The training run of one preset, as planned in a stage."""
        return TrainConfig(
            model=ModelConfig(preset=preset, options=self.model_options(preset)),
            data=self.data(self.corpus, self.vocab_size),
            training=self.training(preset, stage),
        )

    def training(self, folder: str, stage: Stage) -> TrainingConfig:
        """How all of them are trained: what a small model learns most from in few steps."""
        return TrainingConfig(
            output_dir=str(Path(self.out) / folder),
            max_steps=stage.steps,
            batch_size=self.batch_size,
            optimizer="muon",
            base_model_lr=5e-3,
            embedding_lr=4e-2,
            memory_lr=2e-3,
            adam_beta2=0.99,
            weight_decay=0.01,
            lr_scheduler="linear",
            warmup_steps=WARMUP_STEPS,
            eval_steps=stage.stop if stage.evaluate else None,
            save_steps=None,
            keep_checkpoints=1,
            seed=self.seed,
        )

    def added_config(self, preset: str, steps: int) -> TrainConfig:
        """The run of a preset that begins with the finished weights of another."""
        training = self.training(preset, Stage(steps, steps, evaluate=True))
        start = Path(self.out) / STARTS[preset] / "model"
        return TrainConfig(
            model=ModelConfig(model_path=str(start), specialists={}, freeze_base_model=True),
            data=self.data(self.specialty, None),
            training=replace(training, warmup_steps=max(1, steps // 10), base_model_lr=3e-3),
        )
