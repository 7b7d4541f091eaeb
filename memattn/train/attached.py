"""Pretrained models with a memory or LoRA: attach, save, load.

The folder of such a model has ``attached.json``, which describes the attachments and the base
model, and ``model.safetensors`` with the attached weights and the trained weights of the base. The
folder of a finished run also has the memory and LoRA in their own formats.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from memattn.adapters import adapters_of, attach_memory
from memattn.checks import must
from memattn.parts.chapters import FILE as CHAPTERS
from memattn.parts.specialists import SpecialistsConfig
from memattn.train.config import LoraConfig, ModelConfig
from memattn.train.distributed import named_tensors
from memattn.train.pretrained import find_pretrained

FILE, MEMORY = "attached.json", "memory"


def load_base(config: ModelConfig) -> Any:
    """Load a pretrained model in float32, with its specialists, memory and LoRA.

    Raises:
        OSError: If there is no such model and no local copy.
        ImportError, ValueError: As ``attach`` does.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import memattn.models  # registers its models

    assert memattn.models and config.model_path is not None
    folder = find_pretrained(config.model_path)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # our own progress bar is shown
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    finally:
        if shown:
            logging.enable_progress_bar()
    if config.specialists is not None:
        model = add_specialists(model, config.specialists)
    if is_attached(config):
        attach(model, config)
    return model


def add_specialists(model: Any, fields: dict[str, Any]) -> Any:
    """Freeze a decoder and add specialists to its attention.

    Raises:
        ValueError: If it is no decoder of this package, or the specialists do not fit it.
    """
    from memattn.models import MemAttnForCausalLM, ShiftableLanguageModel

    if not isinstance(model, MemAttnForCausalLM):
        allowed = "be null, and memory_adapter of kind specialists, beside a model of another kind"
        must("model.specialists", allowed, type(model).__name__)
    return ShiftableLanguageModel(model, **_opened(fields))


def _opened(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of specialists with a default prior of 1: closed ones would not be trained."""
    return {"prior": 1.0, **fields}


def load_model_folder(folder: Path) -> Any:
    """Load a model that training has written: a full model, or a base model with attachments.

    Raises:
        OSError: If there is no model, or its base model is not found.
        ValueError: As ``load_attached``.
    """
    if (folder / FILE).is_file():
        return load_attached(folder)
    return load_base(ModelConfig(model_path=str(folder)))


def attach(model: Any, config: ModelConfig) -> None:
    """Attach the LoRA and the memory of a configuration to a pretrained model; freeze the rest.

    Raises:
        ImportError: If LoRA is configured and PEFT is not installed.
        ValueError: If the model has none of LoRA's targets, or the memory does not fit it.
    """
    base = list(model.parameters())
    if config.lora is not None:
        _add_lora(model, config.lora)
    if config.memory_adapter is not None:
        part = config.memory_adapter
        part = _opened(part) if part.get("kind") == SpecialistsConfig.kind else part
        attach_memory(model, part, freeze_base=config.freeze_base_model)
    for parameter in base:
        parameter.requires_grad_(not config.freeze_base_model)


def _add_lora(model: Any, config: LoraConfig) -> None:
    """Add LoRA to the matrices of a model, by PEFT."""
    try:
        import peft
    except ImportError:
        raise ImportError(
            "model.lora must be done by PEFT, which is not installed: pip install 'memattn[lora]'"
        ) from None
    options = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(config.targets),
        task_type="CAUSAL_LM",
    )
    try:
        peft.inject_adapter_in_model(options, model)
    except ValueError as error:
        known = {
            name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)
        }
        if known & set(config.targets):
            raise
        allowed = f"name matrices of the model, such as {', '.join(sorted(known))}"
        raise ValueError(
            f"model.lora.targets must {allowed}, got {', '.join(config.targets)}"
        ) from error


def is_attached(config: ModelConfig) -> bool:
    """Whether something is attached to a pretrained model."""
    return config.memory_adapter is not None or config.lora is not None


def saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors to save: all, or the attached ones and the trained ones of the base."""
    tensors = list(named_tensors(model))
    if not any(_is_own(name) for name, _ in tensors):
        yield from tensors
        return
    yield from ((name, t) for name, t in tensors if t.requires_grad or _is_own(name))


def _is_own(name: str) -> bool:
    """Whether a tensor belongs to a memory or to LoRA."""
    words = name.split(".")
    return "memory_adapters" in words or any(word.startswith("lora_") for word in words)


def write_description(config: ModelConfig, folder: Path) -> None:
    """Write ``attached.json``."""
    (folder / FILE).write_text(json.dumps(asdict(config), indent=1), encoding="utf-8")


def export(model: Any, tensors: dict[str, Tensor], config: ModelConfig, folder: Path) -> None:
    """Write memory and LoRA in their own formats, for use outside of training.

    ``memory/`` is for ``MemoryAdapter.from_pretrained``, ``lora/`` for PEFT's ``PeftModel``.
    """
    if config.memory_adapter is not None:
        (adapter,) = adapters_of(model).values()
        adapter.save_pretrained(folder / MEMORY, state_dict=tensors)
    if config.lora is not None:
        from peft import get_peft_model_state_dict

        weights = get_peft_model_state_dict(model, state_dict=tensors)
        options = model.peft_config["default"]
        options.base_model_name_or_path = config.model_path
        options.save_pretrained(folder / "lora")
        names = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
        save_file(names, folder / "lora" / "adapter_model.safetensors", {"format": "pt"})


def read_description(folder: Path, base_model: str | None = None) -> ModelConfig:
    """The content of ``attached.json``; ``base_model`` is the present location of the base model.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
        lora = values.pop("lora")
        config = ModelConfig(**values, lora=None if lora is None else LoraConfig(**lora))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / FILE} must be what training wrote, got {error}") from error
    return config if base_model is None else replace(config, model_path=base_model)


def load_attached(folder: Path, base_model: str | None = None) -> Any:
    """Load the pretrained model with the attachments of a folder.

    Raises:
        ValueError: If the files are damaged, or of another base model.
        OSError: If the base model is not found.
    """
    model = load_base(read_description(folder, base_model))
    try:
        tensors = load_file(folder / "model.safetensors")
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"model must be a whole checkpoint, got {folder}: {error}") from error
    own = dict(saved_tensors(model))
    if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in own.items()}:
        must("model", "be of the base model that it names", folder)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    if (folder / MEMORY / CHAPTERS).is_file():
        (adapter,) = adapters_of(model).values()
        adapter.chapters.load(folder / MEMORY / CHAPTERS)
    return model
