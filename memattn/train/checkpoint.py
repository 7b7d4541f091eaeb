"""Checkpoints: folders written atomically, from which training resumes bit for bit.

``step-<N>/`` holds ``model.safetensors`` with the model's configuration and tokenizer (so that
``from_pretrained`` loads it), ``optimizer.safetensors``, ``rng.safetensors`` and ``state.json``,
which has everything else and the checksum of every other file.
"""

import json
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from memattn.files import replacing, sha256_of
from memattn.parts.chapters import FILE as CHAPTERS
from memattn.parts.chapters import Chapters
from memattn.train.attached import is_attached, saved_tensors, write_description
from memattn.train.config import ModelConfig
from memattn.train.distributed import full_tensor, on_main_process, shard_like


@dataclass(kw_only=True)
class TrainState:
    """Progress of a run.

    Attributes:
        step: Optimizer steps done.
        tokens: Tokens seen by all processes, without padding.
        seconds: Time spent.
        position: Rows of the training stream that were read.
        rows_drawn: Whether packed rows are drawn one by one; before 0.2 they were not.
        loss: Loss of the last step.
        eval_loss: Held-out loss when last measured.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    position: int = 0
    rows_drawn: bool = True
    loss: float | None = None
    eval_loss: float | None = None


@dataclass(frozen=True)
class Checkpointer:
    """Saves and restores the complete state of training.

    Attributes:
        accelerator: The process group, and the scaler of fp16.
        model: The unwrapped model; its parameters may be sharded.
        optimizer: The optimizer, unwrapped.
        scheduler: Its schedule.
        tokenizer: Saved with the model.
        config: The run's configuration as plain values.
        model_config: Configuration of the model.
        folder: ``checkpoints/`` of the run.
        keep: Number of checkpoints to keep.
    """

    accelerator: Accelerator
    model: Any
    optimizer: Optimizer
    scheduler: LRScheduler
    tokenizer: Any
    config: dict[str, Any]
    model_config: ModelConfig
    folder: Path
    keep: int

    def save(self, state: TrainState) -> Path:
        """Write ``step-<N>`` atomically, then remove all but the newest ``keep`` checkpoints.

        Raises:
            OSError: If it cannot be written; earlier checkpoints are intact.
        """
        # collective: all processes gather, the first one writes
        model = gather_model(self.model)
        optimizer = _gather_optimizer(self.model, self.optimizer)
        rng = _gather_rng(self.accelerator)
        path = self.folder / f"step-{state.step}"
        on_main_process(self.accelerator, lambda: self._write(path, state, model, optimizer, rng))
        return path

    def _write(
        self,
        path: Path,
        state: TrainState,
        model: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        rng: dict[str, Tensor],
    ) -> None:
        try:
            with replacing(path) as folder:
                save_model(self.model, self.tokenizer, model, folder, self.model_config)
                save_file(optimizer, folder / "optimizer.safetensors")
                save_file(rng, folder / "rng.safetensors")
                scaler = self.accelerator.scaler
                facts = {
                    "state": asdict(state),
                    "config": self.config,
                    "num_processes": self.accelerator.num_processes,
                    "scheduler": self.scheduler.state_dict(),
                    "scaler": None if scaler is None else scaler.state_dict(),
                    "sha256": {file.name: sha256_of(file) for file in sorted(folder.iterdir())},
                }
                (folder / "state.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        except (OSError, SafetensorError) as error:
            # safetensors raises its own error for a full disk
            last = latest_checkpoint(self.folder)
            raise OSError(
                f"checkpoint must be writable, got {error} for {path}; "
                f"the last good checkpoint is {last or 'none'}"
            ) from error
        for old in list_checkpoints(self.folder)[: -self.keep]:
            shutil.rmtree(old)

    def load(self, path: Path) -> TrainState:
        """Restore everything from a checkpoint.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If it is damaged, or of another model.
        """
        facts = read_checkpoint(path)
        with _naming_damage(path):
            tensors = load_file(path / "model.safetensors")
            moments = load_file(path / "optimizer.safetensors")
            rng = load_file(path / "rng.safetensors")
        own = dict(saved_tensors(self.model))
        if {name: t.shape for name, t in tensors.items()} != {n: t.shape for n, t in own.items()}:
            raise ValueError(f"checkpoint must be of the model that is trained, got {path}")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(shard_like(tensors[name], tensor))
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                prefix = f"{names[parameter]}:"
                self.optimizer.state[parameter] = {
                    key.removeprefix(prefix): _moment(tensor, parameter)
                    for key, tensor in moments.items()
                    if key.startswith(prefix)
                }
        self.scheduler.load_state_dict(facts["scheduler"])
        for group, rate in zip(
            self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True
        ):
            group["lr"] = rate
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        _restore_rng(self.accelerator, rng)
        return TrainState(**{"rows_drawn": False} | facts["state"])


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a folder, oldest first."""
    steps = {
        path: int(match[1])
        for path in folder.glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)", path.name))
    }
    return sorted(steps, key=lambda path: steps[path])


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a folder, None if there is none."""
    return (list_checkpoints(folder) or [None])[-1]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of ``state.json``, after checking every file of the checkpoint against it.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If a file is missing or damaged; the message names the previous checkpoint.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"resume must name a checkpoint folder, got {path}")
    with _naming_damage(path):
        facts = json.loads((path / "state.json").read_text(encoding="utf-8"))
        for name, checksum in facts["sha256"].items():
            if sha256_of(path / name) != checksum:
                raise ValueError(f"{name} has changed")
        TrainState(**facts["state"])
    return facts


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """Convert errors of a damaged checkpoint to one ValueError."""
    try:
        yield
    except (ValueError, TypeError, KeyError, FileNotFoundError, SafetensorError) as error:
        older = [other for other in list_checkpoints(path.parent) if other != path]
        hint = f"; resume from {older[-1]} instead" if older else ""
        raise ValueError(f"checkpoint must be complete, got {path} ({error}){hint}") from error


def save_model(
    model: Any, tokenizer: Any, tensors: dict[str, Tensor], folder: Path, config: ModelConfig
) -> None:
    """Write a model from its gathered tensors, so that ``from_pretrained`` loads it.

    A pretrained model with attachments is written as described in ``memattn.train.attached``.
    """
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if is_attached(config):
        write_description(config, folder)
        tokenizer.save_pretrained(folder)
        return
    model.config.save_pretrained(folder)
    if isinstance(chapters := getattr(model, "chapters", None), Chapters):
        chapters.write(folder / CHAPTERS)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def gather_model(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of the model to save, gathered; all processes must call it."""
    return {name: full_tensor(tensor) for name, tensor in saved_tensors(model)}


def _gather_optimizer(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """All tensors of the optimizer's state, gathered, as ``<parameter>:<key>``."""
    return {
        f"{name}:{key}": full_tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _moment(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor of the optimizer's state, placed as the optimizer keeps it."""
    return shard_like(tensor, parameter) if tensor.shape == parameter.shape else tensor


def _gather_rng(accelerator: Accelerator) -> dict[str, Tensor]:
    """States of the random generators of all processes, as ``<rank>.<generator>``."""
    own = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(random.getstate()[1]),
    }
    if accelerator.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    return {
        f"{rank}.{name}": state
        for rank, states in enumerate(gather_object([own]))
        for name, state in states.items()
    }


def _restore_rng(accelerator: Accelerator, states: dict[str, Tensor]) -> None:
    """Restore this process's generators; one missing in the checkpoint keeps its seed."""
    rank = accelerator.process_index
    if f"{rank}.torch" in states:
        torch.set_rng_state(states[f"{rank}.torch"])
        random.setstate((3, tuple(states[f"{rank}.python"].tolist()), None))
    if f"{rank}.cuda" in states and accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(states[f"{rank}.cuda"], accelerator.device)
