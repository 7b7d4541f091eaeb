"""The configuration of a training run: frozen dataclasses, also read from YAML."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from memattn.checks import check_bool, check_int, must
from memattn.yaml_text import dump_yaml, plain_text, text_mode

SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("no", "fp16", "bf16")
STRATEGIES = ("ddp", "fsdp")
OPTIMIZERS = ("adamw", "muon")
MODES = ("pretraining", "instruction_finetuning")
DEFAULT_STEPS = 1000
Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA in a pretrained model, by PEFT.

    Attributes:
        rank: Rank of the update of a matrix.
        alpha: The update is multiplied by ``alpha / rank``.
        targets: Names of the modules with an update, such as ``q_proj``.
    """

    rank: int = 16
    alpha: int = 32
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])

    def __post_init__(self) -> None:
        check_int("model.lora.rank", self.rank, 1)
        check_int("model.lora.alpha", self.alpha, 1)
        if not self.targets:
            must("model.lora.targets", "not be empty", self.targets)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model to train: a preset with new weights, or a pretrained model.

    Attributes:
        preset: Name of a preset of ``memattn.models.PRESETS``, such as ``vanilla``.
        options: Arguments of the preset: sizes and its own options.
        model_path: A pretrained Hugging Face causal language model to train: a folder, a hub name
            or ``smollm2``, from a package. Exactly one of ``preset`` and ``model_path`` is given.
        memory_adapter: Kind and fields of a part, such as a memory, to attach to a pretrained
            model; None attaches none.
        lora: LoRA inside a pretrained model; None means none.
        specialists: Fields of ``memattn.parts.SpecialistsConfig``: specialists to add to a trained
            decoder of this package, which is frozen; None means none.
        freeze_base_model: Whether to freeze the weights of a pretrained model.
    """

    preset: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    model_path: str | None = None
    memory_adapter: dict[str, Any] | None = None
    lora: LoraConfig | None = None
    specialists: dict[str, Any] | None = None
    freeze_base_model: bool = False

    def __post_init__(self) -> None:
        if (self.preset is None) == (self.model_path is None):
            got = "neither" if self.preset is None else "both"
            must("model", "have exactly one of preset and model_path", got)
        check_bool("model.freeze_base_model", self.freeze_base_model)
        if self.model_path is not None and self.options:
            must("model.options", "be empty with model_path", self.options)
        attached = ("memory_adapter", "lora", "specialists")
        for name in attached:
            if self.model_path is None and getattr(self, name) is not None:
                must(f"model.{name}", "be null without model_path", getattr(self, name))
        if self.specialists is not None:
            if not self.freeze_base_model:
                must("model.freeze_base_model", "be true with specialists", "false")
            if self.lora is not None or self.memory_adapter is not None:
                must("model.specialists", "be null with lora and memory_adapter", self.specialists)
        if self.freeze_base_model:
            if self.model_path is None:
                must("model.freeze_base_model", "be false without model_path", "true")
            if all(getattr(self, name) is None for name in attached):
                got = "true, and nothing would be trained"
                must("model.freeze_base_model", f"be false without {' or '.join(attached)}", got)


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Samples of a synthetic task; only the answers are in the loss.

    Attributes:
        name: ``needle``, ``tracking``, ``words``, ``facts`` or ``recall``.
        options: Fields of the task of ``memattn.data.tasks``.
        samples: Number of samples, including held-out ones.
    """

    name: str = "recall"
    options: dict[str, Any] = field(default_factory=dict)
    samples: int = 10_000

    def __post_init__(self) -> None:
        from memattn.data.tasks import TASKS

        if self.name not in TASKS:
            must("data.task.name", f"be one of {', '.join(TASKS)}", repr(self.name))
        if "haystack" in self.options:
            must("data.task.options", "leave out haystack", self.options["haystack"])
        check_int("data.task.samples", self.samples, 2)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text, and how it is split into rows.

    Attributes:
        dataset_name: A corpus (``memattn data --list``), a file, a folder or a Hugging Face
            dataset ``owner/name``; or a list of them.
        dataset_subset: Configuration of a Hugging Face dataset.
        dataset_split: Split of a Hugging Face dataset; None means ``train``.
        text_field: Field with the text, in a Hugging Face dataset and in ``.jsonl`` files.
        messages_field: Field with the messages of a conversation, for instruction_finetuning.
        chat_template: File with a chat template in Jinja; None means that of the tokenizer.
        document_separator: Text that separates the documents of one text file.
        mix_in: Another text, or a list of them, from which training documents are added, so that
            the model does not forget it.
        mix_share: Share of the training tokens that come from ``mix_in``.
        mix_weight: Total weight of the ``mix_in`` text relative to the other in the domain loss of
            specialists' gates; 1 means equal weights.
        task: A synthetic task instead of a text, with samples of ``seq_len`` tokens.
        held_out: Share of the documents that only evaluation sees; 0 for none.
        split_seed: Seed of the choice of held-out documents.
        tokenizer: ``bpe`` (trained on the training documents), ``bytes``, or a folder or hub
            name. None means ``bpe`` for a preset, and that of the model for ``model_path``.
        vocab_size: Entries of a trained tokenizer, None means 4096. Only for ``bpe``.
        seq_len: Tokens in a row.
        packed: Whether documents are packed without padding (conversations are not split); else a
            row is one padded piece of a document. Models without ``cu_seqlens`` need padding.
        cache_dir: Folder for downloaded corpora, tokenizers and tokens.
    """

    dataset_name: str | list[str] = "wiki"
    dataset_subset: str | None = None
    dataset_split: str | None = None
    text_field: str = "text"
    messages_field: str = "messages"
    chat_template: str | None = None
    document_separator: str | None = None
    mix_in: str | list[str] | None = None
    mix_share: float = 0.1
    mix_weight: float = 1.0
    task: TaskConfig | None = None
    held_out: float = 0.05
    split_seed: int = 0
    tokenizer: str | None = None
    vocab_size: int | None = None
    seq_len: int = 512
    packed: bool = True
    cache_dir: str = "~/.cache/memattn"

    def __post_init__(self) -> None:
        if not self.dataset_name:
            must("data.dataset_name", "not be empty", repr(self.dataset_name))
        if not 0.0 <= self.held_out < 1.0:
            must("data.held_out", "be in [0, 1)", self.held_out)
        if self.mix_in is not None and not self.mix_in:
            must("data.mix_in", "not be empty", repr(self.mix_in))
        if not 0.0 < self.mix_share < 1.0:
            must("data.mix_share", "be in (0, 1)", self.mix_share)
        if not 0.0 < self.mix_weight < float("inf"):
            must("data.mix_weight", "be positive and finite", self.mix_weight)
        if self.task is not None:
            self._check_no_text()
        check_int("data.split_seed", self.split_seed, 0)
        check_int("data.seq_len", self.seq_len, 2)
        check_bool("data.packed", self.packed)
        if self.vocab_size is not None:
            check_int("data.vocab_size", self.vocab_size, 259)
            if self.tokenizer not in (None, "bpe"):
                must("data.vocab_size", f"be None with tokenizer {self.tokenizer}", self.vocab_size)

    def _check_no_text(self) -> None:
        """Raise ValueError if both a text and a task are given."""
        texts = ("dataset_name", "dataset_subset", "dataset_split", "text_field")
        others = ("messages_field", "chat_template", "document_separator", "mix_in")
        for name in (*texts, *others):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                must(f"data.{name}", "be left out with data.task", repr(getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Optimisation, and output during training.

    Attributes:
        output_dir: Folder of the run.
        training_mode: ``pretraining``, on documents, or ``instruction_finetuning``, on
            conversations, with only the answers in the loss.
        max_steps: Optimizer steps; None means 1000, or as many as ``max_epochs`` gives.
        max_epochs: Passes over the text; with ``max_steps``, the run ends at whichever comes first.
        batch_size: Rows of one process in one forward pass.
        eval_batch_size: Rows in held-out evaluations; None means ``batch_size``.
        gradient_accumulation_steps: Forward passes per optimizer step.
        base_model_lr: Peak learning rate.
        embedding_lr: Peak learning rate of the embedding and the output layer; None means
            ``base_model_lr``.
        memory_lr: Peak learning rate of memory parameters, such as persistent tokens; None means
            ``base_model_lr``.
        lora_lr: Peak learning rate of LoRA's parameters; None means ``base_model_lr``.
        gate_rows: Rows of the text, and as many of ``data.mix_in``, on which specialists' gates are
            trained to classify the domain before the first step; 0 means no such training.
        optimizer: ``adamw``, or ``muon``: Muon for the matrices inside the model and AdamW for the
            rest, with the same rates. Muon learns more from few tokens; its steps take longer.
        lr_scheduler: ``cosine`` or ``linear`` decay to 0, or ``constant``, each after the warm-up.
        warmup_steps: Steps in which the learning rate rises from 0.
        weight_decay: Decay of weight matrices; norms, biases, embeddings and tables have none.
        adam_beta1: Decay of AdamW's first moment.
        adam_beta2: Decay of AdamW's second moment.
        max_grad_norm: Largest norm of the gradient, which is scaled down to it; None means no
            limit.
        label_smoothing: Share of each target that is spread over the vocabulary, in training.
        mixed_precision: ``no``, ``bf16``, or ``fp16`` (CUDA only).
        compile: Whether to compile the model with ``torch.compile`` as one program. It needs a
            compiler and a minute or more to start, and supports one process only. Rounding differs
            from the uncompiled model.
        gradient_checkpointing: Whether activations are recomputed in the backward pass.
        distributed_strategy: ``ddp`` (full model in each process) or ``fsdp`` (FSDP2, sharded);
            used if started by ``accelerate launch`` with several processes.
        num_gpus: Required number of processes; None means any number.
        cpu: Whether to train on the CPU even if there is a GPU.
        seed: Seed of new weights, dropout and the order of the documents.
        log_steps: Steps between rows of metrics.
        eval_steps: Steps between held-out evaluations; None means only at the end.
        eval_batches: Number of first batches in a held-out evaluation; None means all.
        save_steps: Steps between checkpoints; None means only at the end.
        keep_checkpoints: Number of newest checkpoints to keep.
    """

    output_dir: str = "runs/train"
    training_mode: str = "pretraining"
    max_steps: int | None = None
    max_epochs: int | None = None
    batch_size: int = 8
    eval_batch_size: int | None = None
    gradient_accumulation_steps: int = 1
    base_model_lr: float = 1e-3
    embedding_lr: float | None = None
    memory_lr: float | None = None
    lora_lr: float | None = None
    gate_rows: int = 0
    optimizer: str = "adamw"
    lr_scheduler: str = "cosine"
    warmup_steps: int = 50
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    max_grad_norm: float | None = 1.0
    label_smoothing: float = 0.0
    mixed_precision: str = "no"
    compile: bool = False
    gradient_checkpointing: bool = False
    distributed_strategy: str = "ddp"
    num_gpus: int | None = None
    cpu: bool = False
    seed: int = 0
    log_steps: int = 1
    eval_steps: int | None = None
    eval_batches: int | None = None
    save_steps: int | None = 500
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        if not self.output_dir:
            must("training.output_dir", "not be empty", repr(self.output_dir))
        counts = ("batch_size", "gradient_accumulation_steps", "log_steps", "keep_checkpoints")
        for name in counts:
            check_int(f"training.{name}", getattr(self, name), 1)
        lengths = ("max_steps", "max_epochs", "eval_steps", "save_steps")
        for name in (*lengths, "eval_batch_size", "eval_batches", "num_gpus"):
            if getattr(self, name) is not None:
                check_int(f"training.{name}", getattr(self, name), 1)
        for name in ("warmup_steps", "gate_rows", "seed"):
            check_int(f"training.{name}", getattr(self, name), 0)
        for name in ("base_model_lr", "embedding_lr", "memory_lr", "lora_lr", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < float("inf"):
                must(f"training.{name}", "be positive and finite", value)
        if not 0.0 <= self.weight_decay < float("inf"):
            must("training.weight_decay", "be at least 0 and finite", self.weight_decay)
        for name in ("label_smoothing", "adam_beta1", "adam_beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                must(f"training.{name}", "be in [0, 1)", getattr(self, name))
        for name in ("compile", "gradient_checkpointing", "cpu"):
            check_bool(f"training.{name}", getattr(self, name))
        for name, known in (
            ("training_mode", MODES),
            ("optimizer", OPTIMIZERS),
            ("lr_scheduler", SCHEDULES),
            ("mixed_precision", PRECISIONS),
            ("distributed_strategy", STRATEGIES),
        ):
            if getattr(self, name) not in known:
                must(f"training.{name}", f"be one of {', '.join(known)}", getattr(self, name))

    def num_steps(self, steps_per_epoch: float | None = None) -> int:
        """Optimizer steps of the run.

        Args:
            steps_per_epoch: Steps in one pass over the text; needed if ``max_epochs`` is given.
        """
        if self.max_epochs is None:
            return self.max_steps or DEFAULT_STEPS
        if steps_per_epoch is None:
            must("training.max_epochs", "be null here, give max_steps instead", self.max_epochs)
        steps = math.ceil(self.max_epochs * steps_per_epoch)
        return min(steps, self.max_steps or steps)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        model: The model.
        data: The text.
        training: Optimisation and output.
    """

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values."""
        return asdict(self)

    def to_yaml(self) -> str:
        """The configuration as YAML, which ``load_config`` reads."""
        return dump_yaml(self.to_dict())


def read_config(
    kind: type[Config],
    path: str | Path,
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Config:
    """Read a YAML file with the fields of a dataclass; see ``load_config``.

    ``upgrade`` converts the values of the file to those fields.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    if not Path(path).is_file():
        raise FileNotFoundError(f"config must be a file that exists, got {path}")
    parser = ArgumentParser(exit_on_error=False, parser_mode=text_mode(kind, upgrade))
    parser.add_class_arguments(kind)
    try:
        return plain_text(kind(**vars(parser.instantiate(parser.parse_path(path)))))
    except ArgumentError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"config must have valid fields, got {path}: {reason}") from error
