"""What a study of future attention compares, and how each model is trained."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from memattn.checks import check_bool, check_int, must
from memattn.train.config import DataConfig, TrainingConfig, read_config
from memattn.yaml_text import dump_yaml

NO_LOSS = "none"
EQUAL_TO = ("baseline", "future")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
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
        from memattn.nn.future_attention import SOURCES
        from memattn.ops.future_attention import LOSS_TYPES

        _check_list("loss_types", self.loss_types, (NO_LOSS, *LOSS_TYPES))
        _check_list("sources", self.sources, SOURCES)
        for name, least in (("future_dims", 1), ("seeds", 0)):
            _check_list(name, getattr(self, name))
            for value in getattr(self, name):
                check_int(f"compare.{name}", value, least)
        check_bool("compare.full", self.full)
        if self.equal_to not in EQUAL_TO:
            must("compare.equal_to", f"be one of {', '.join(EQUAL_TO)}", repr(self.equal_to))


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A study of future attention.

    Attributes:
        out: Folder of the runs and results.
        compare: The models that are compared.
        sizes: Sizes of every model, keywords of the presets.
        future_options: Further keywords of the future models, such as ``start_layer``.
        data: The text, of which a part must be held out.
        training: Optimisation. The study sets ``output_dir`` and ``seed`` of each run.
    """

    out: str = "runs/future_small"
    compare: CompareConfig = field(default_factory=CompareConfig)
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
        default_factory=lambda: TrainingConfig(
            max_steps=400,
            batch_size=16,
            base_model_lr=3e-3,
            warmup_steps=40,
            eval_steps=100,
            save_steps=None,
            keep_checkpoints=1,
        )
    )

    def __post_init__(self) -> None:
        if not self.out:
            must("out", "not be empty", repr(self.out))
        for name in ("future_dim", "source", "loss_type"):
            if name in self.future_options:
                where = f"compare.{name}s"
                must(f"future_options.{name}", f"be given as {where}", self.future_options[name])
        if self.data.held_out == 0.0:
            must("data.held_out", "be above 0 for a study", self.data.held_out)
        for name in ("output_dir", "seed"):
            value = getattr(self.training, name)
            if value != getattr(TrainingConfig(), name):
                must(f"training.{name}", "be left to the study", value)

    def to_yaml(self) -> str:
        """The configuration as YAML, which ``load_study`` reads."""
        return dump_yaml(asdict(self))


def load_study(path: str | Path) -> StudyConfig:
    """Read a YAML file with the fields of ``StudyConfig``.

    Args:
        path: The file. Fields that it leaves out have their default.

    Returns:
        The checked configuration.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no YAML, or a field is unknown or wrong.
    """
    return read_config(StudyConfig, path)


def _check_list(name: str, values: Sequence[Any], known: Sequence[Any] | None = None) -> None:
    """Raise ValueError unless a list has different, known entries, and one at least."""
    if not values or len(set(values)) < len(values):
        must(f"compare.{name}", "have at least one entry and none twice", list(values))
    for value in values:
        if known is not None and value not in known:
            must(f"compare.{name}", f"have entries of {', '.join(known)}", repr(value))
