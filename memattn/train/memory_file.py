"""Configuration files with the sections ``model``, ``memory`` and ``training``.

Such a file describes a memory transformer, or a memory in a pretrained model, with its own fields
and defaults, which this module converts to those of ``TrainConfig``. In addition, ``model.options``
takes more arguments of the model, ``training`` every field of ``TrainingConfig``, and a section
``data`` every field of ``DataConfig``.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from memattn.checks import check_bool, check_int, must
from memattn.train.config import DataConfig, LoraConfig, ModelConfig, TrainingConfig

_KIND = "chapter_memory"
# fields of the section memory that are not fields of the part
_LORA = {"lora_rank": "rank", "lora_alpha": "alpha", "lora_targets": "targets"}
_SWITCHES = {
    "use_lora": False,
    "use_memory_adapter": True,
    "use_both_memory_and_lora": False,
    "vanilla_mode": False,
}
_DATASET = ("dataset_name", "dataset_subset", "dataset_split", "text_field")


@dataclass(frozen=True, kw_only=True)
class FileModel:
    """Section ``model``.

    Attributes:
        hidden_dim: Features of the hidden states.
        num_heads: Query heads.
        num_layers: Blocks.
        intermediate_dim: Features inside the MLP.
        vocab_size: Tokens of the vocabulary, and of a trained tokenizer.
        max_seq_len: Longest sequence, and tokens in a row.
        use_rope: Whether positions are rotary; else learned.
        base_model_name: A pretrained model to attach the memory to, a folder or a name on the hub;
            it determines the fields above except ``max_seq_len``. None means new weights.
        freeze_base_model: Whether to freeze the weights of a pretrained model.
        options: More arguments of the model, such as ``num_key_value_heads``.
    """

    hidden_dim: int = 768
    num_heads: int = 12
    num_layers: int = 12
    intermediate_dim: int = 3072
    vocab_size: int = 32000
    max_seq_len: int = 2048
    use_rope: bool = True
    base_model_name: str | None = None
    freeze_base_model: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = ("hidden_dim", "num_heads", "num_layers", "intermediate_dim", "vocab_size")
        for name in (*sizes, "max_seq_len"):
            check_int(f"model.{name}", getattr(self, name), 1)
        for name in ("use_rope", "freeze_base_model"):
            check_bool(f"model.{name}", getattr(self, name))
        if not isinstance(self.options, dict):
            must("model.options", "be a mapping", type(self.options).__name__, TypeError)


@dataclass(frozen=True, kw_only=True)
class FileTraining:
    """Fields of the section ``training`` whose defaults are not those of ``TrainingConfig``."""

    memory_lr: float = 1e-4
    lora_lr: float = 1e-4
    base_model_lr: float = 1e-5
    training_mode: str = "instruction_finetuning"
    dataset_name: str = "HuggingFaceH4/ultrachat_200k"
    dataset_subset: str | None = None
    dataset_split: str | None = "train"
    text_field: str = "text"
    distributed_strategy: str = "ddp"
    num_gpus: int | None = 1
    batch_size: int = 4
    gradient_accumulation_steps: int = 4
    max_steps: int = 10000
    warmup_steps: int = 100
    weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0
    gradient_checkpointing: bool = True
    save_steps: int | None = 500
    eval_steps: int | None = 500


def is_memory_file(values: Any) -> bool:
    """Whether the values belong to a memory file, recognised by a field that only it has."""
    if not isinstance(values, dict) or not values.keys() <= {"model", "memory", "data", "training"}:
        return False
    if "memory" in values:
        return True
    own = {part.name for part in fields(FileModel)} - {part.name for part in fields(ModelConfig)}
    sections = (("model", own), ("training", set(_DATASET)))
    return any(
        isinstance(values.get(name), dict) and not names.isdisjoint(values[name])
        for name, names in sections
    )


def from_memory_file(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Convert the sections of a memory file to those of ``TrainConfig``.

    Args:
        values: The sections ``model``, ``memory``, ``training`` and ``data``, each of which may be
            absent.

    Returns:
        Fields of ``ModelConfig``, ``DataConfig`` and ``TrainingConfig``.

    Raises:
        TypeError, ValueError: If a field is unknown or wrong; the message names it, its value and
            the allowed values.
    """
    sections = {name: _section(values, name) for name in ("model", "memory", "data", "training")}
    model = FileModel(**_known("model", sections["model"], _names(FileModel)))
    given = _known("training", sections["training"], _names(TrainingConfig) + list(_DATASET))
    training = {**asdict(FileTraining()), **given}
    if given.get("max_epochs") is not None:
        training["max_steps"] = given.get(
            "max_steps"
        )  # the default of max_steps must not end the run earlier
    data = _known("data", sections["data"], _names(DataConfig))
    for name in _DATASET:
        value = training.pop(name)
        if name in data and name in given:
            must(f"data.{name}", "be given in one of training and data", repr(data[name]))
        data.setdefault(name, value)
    if data["dataset_split"] == "train":
        data["dataset_split"] = None  # None means the same, and local files have no splits
    data.setdefault("seq_len", model.max_seq_len)
    own_model = _model(model, sections["memory"])
    if model.base_model_name is not None:
        data.setdefault("packed", False)
    elif data.get("tokenizer") in (None, "bpe"):
        data.setdefault("vocab_size", model.vocab_size)
    return {"model": own_model, "data": data, "training": training}


def _model(model: FileModel, memory: dict[str, Any]) -> dict[str, Any]:
    """Fields of ``ModelConfig``."""
    part, switches, lora = _split_memory(memory)
    has_lora = switches["use_lora"] or switches["use_both_memory_and_lora"]
    has_memory = switches["use_memory_adapter"] or switches["use_both_memory_and_lora"]
    has_memory = has_memory and not switches["vanilla_mode"]
    if model.base_model_name is not None:
        if model.options:
            must("model.options", "be empty with base_model_name", model.options)
        return {
            "model_path": model.base_model_name,
            "memory_adapter": {"kind": _KIND, **part} if has_memory else None,
            "lora": lora if has_lora else None,
            "freeze_base_model": model.freeze_base_model,
        }
    for name in ("use_lora", "use_both_memory_and_lora"):
        if switches[name]:
            must(f"memory.{name}", "be false without model.base_model_name", "true")
    if not switches["use_memory_adapter"]:
        wanted = "be true without model.base_model_name (vanilla_mode leaves the memory out)"
        must("memory.use_memory_adapter", wanted, "false")
    sizes = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.intermediate_dim,
        "max_position_embeddings": model.max_seq_len,
        "position_embedding": "rope" if model.use_rope else "learned",
    }
    for name in model.options.keys() & (sizes.keys() | part.keys()):
        must(f"model.options.{name}", "not stand beside its own field", model.options[name])
    options = {**sizes, **model.options, **part}
    return {"preset": "memory_transformer", "options": options}


def _split_memory(
    memory: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, bool], dict[str, Any]]:
    """Fields of the part, the switches, and fields of LoRA."""
    from memattn.parts.chapter_memory import ChapterMemoryConfig

    own = _names(ChapterMemoryConfig)
    known = dict.fromkeys([*own, *_SWITCHES, *_LORA])
    _known("memory", memory, list(known))
    switches = {name: memory.get(name, value) for name, value in _SWITCHES.items()}
    for name, value in switches.items():
        check_bool(f"memory.{name}", value)
    defaults = asdict(LoraConfig())
    lora = {name: memory.get(key) for key, name in _LORA.items()}
    lora = {name: defaults[name] if value is None else value for name, value in lora.items()}
    part = {name: value for name, value in memory.items() if name in own}
    try:
        ChapterMemoryConfig(**part)
        LoraConfig(**lora)
    except (TypeError, ValueError) as error:
        text = str(error).replace("parts.chapter_memory.", "memory.")
        for key, name in _LORA.items():
            text = text.replace(f"model.lora.{name}", f"memory.{key}")
        raise type(error)(text) from error
    return part, switches, lora


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One section; empty if absent."""
    section = values.get(name)
    if section is None:
        return {}
    if not isinstance(section, dict):
        must(name, "be a section with fields", repr(section), TypeError)
    return dict(section)


def _known(section: str, given: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The given fields, all of which are known."""
    for name, value in given.items():
        if name not in names:
            must(f"{section}.{name}", f"be one of the fields {', '.join(names)}", repr(value))
    return dict(given)


def _names(kind: type[Any]) -> list[str]:
    return [part.name for part in fields(kind)]
