"""The training loop."""

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, set_seed
from torch import Tensor

from memattn.checks import check_int, must
from memattn.files import replacing, write_text
from memattn.train.attached import export, is_attached
from memattn.train.checkpoint import (
    Checkpointer,
    TrainState,
    gather_model,
    latest_checkpoint,
    list_checkpoints,
    read_checkpoint,
    save_model,
)
from memattn.train.config import DataConfig, ModelConfig, TrainConfig, TrainingConfig
from memattn.train.distributed import on_main_process, prepare_model
from memattn.train.interrupt import StopRequest
from memattn.train.metrics import MetricsLog
from memattn.train.optim import make_optimizer, make_scheduler
from memattn.train.progress import TrainProgress
from memattn.train.setup import build_model, make_batches, prepare_data
from memattn.train.step import (
    accumulate_gradients,
    count_batches,
    held_out_losses,
    part_losses,
)
from memattn.train.teach import teach_gates

# fields that may differ when a run is resumed
_FREE = {
    *("output_dir", "max_steps", "max_epochs", "log_steps", "save_steps", "keep_checkpoints"),
    *("eval_steps", "eval_batches", "eval_batch_size"),
    *("gradient_checkpointing", "distributed_strategy", "num_gpus", "cpu", "cache_dir"),
    *("batch_size", "gradient_accumulation_steps"),  # their product is compared
    # their effect is in the tokens, which are compared
    *("dataset_name", "dataset_subset", "dataset_split", "text_field", "document_separator"),
    *("held_out", "split_seed", "tokenizer", "vocab_size", "messages_field", "chat_template"),
    *("mix_in", "mix_share"),
}


class NonFiniteError(ValueError):
    """The loss or the norm of the gradient is NaN or infinite."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Result of a run.

    Attributes:
        output_dir: Folder of the run.
        model_dir: Folder of the trained model, for ``from_pretrained``; a paused run has none yet.
        checkpoint: The last checkpoint.
        step: Optimizer steps.
        tokens: Tokens seen, padding not counted.
        loss: Training loss of the last step.
        eval_loss: Held-out loss at the end, in nats per token; None without held-out data.
        seconds: Time spent, evaluation included, over all resumptions.
        tokens_per_second: Training speed of this call without evaluation; 0.0 if no step was left.
    """

    output_dir: Path
    model_dir: Path
    checkpoint: Path
    step: int
    tokens: int
    loss: float
    eval_loss: float | None
    seconds: float
    tokens_per_second: float


def train(
    config: TrainConfig,
    *,
    resume: bool | str | Path = False,
    stop_step: int | None = None,
    max_seconds: float | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train a causal language model.

    The run folder gets ``config.yaml``, ``metrics.csv``, ``tensorboard/`` (where it is installed),
    ``checkpoints/step-<N>/`` and, at the end, ``model/``. Each optimizer step minimises the mean
    over all target tokens of all its batches and processes. With ``accelerate launch``, each
    process calls this.

    Args:
        config: The run.
        resume: True continues from the newest checkpoint in the run folder, or starts if there is
            none; a path continues from that checkpoint. A resumed run has exactly the losses and
            weights of an uninterrupted one if the device's operations are deterministic, as on the
            CPU.
        stop_step: Pause after this step, with a checkpoint and without ``model/``; the
            learning-rate schedule is that of the whole run, which ``resume`` continues. None runs
            to the end.
        max_seconds: Pause in the same way after this time, but not before the first step. The last
            checkpoint and a due evaluation take additional time.
        progress: Whether to show a progress bar.

    Returns:
        Paths of the results, and the last numbers.

    Raises:
        ValueError: If the configuration does not fit the data or the model, the run folder has a
            run already, a checkpoint is damaged, or belongs to another run.
        NonFiniteError: If the loss or the gradient is not finite; the message names the last good
            checkpoint.
        KeyboardInterrupt: After SIGINT or SIGTERM, once a checkpoint is written.
        FileNotFoundError, ImportError, OSError: If something is missing, or the disk is full.
    """
    options = config.training
    called = time.perf_counter()
    # accelerate keeps one state per process; a second run may need another
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    # several processes without a GPU must be configured, or each would train alone
    cpu = options.cpu or not torch.accelerator.is_available()
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        cpu=cpu,
        # the loop weights its batches itself, whatever the options of accelerate launch
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    if stop_step is not None:
        check_int("stop_step", stop_step, 1)
    if max_seconds is not None and not max_seconds >= 0.0:
        must("max_seconds", "be at least 0", max_seconds)
    if options.mixed_precision == "fp16" and accelerator.device.type != "cuda":
        must("training.mixed_precision", "be no or bf16 without CUDA", "fp16")
    if options.num_gpus not in (None, processes := accelerator.num_processes):
        wanted = f"be the number of processes, {processes} (accelerate launch --num_processes)"
        must("training.num_gpus", wanted, options.num_gpus)
    _check_domains(config)
    folder = Path(options.output_dir)
    start = _find_start(folder, resume)
    with accelerator.main_process_first():
        corpus = prepare_data(config)
    rows = options.batch_size * options.gradient_accumulation_steps * accelerator.num_processes
    identity = {**config.to_dict(), "rows": rows, "tokens": corpus.fingerprint}
    if start is not None:
        _check_same_run(start, identity)
    accelerator.wait_for_everyone()  # all processes have looked before the first one writes
    set_seed(options.seed)
    model: Any = build_model(config.model, corpus.tokenizer)
    if options.gate_rows and start is None:
        teach_gates(model.to(accelerator.device), config, corpus)
    if options.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)
        enable = enable or model.gradient_checkpointing_enable  # its name in older transformers
        enable({"use_reentrant": False})
    make = {"model": model, "tokenizer": corpus.tokenizer}
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    batches = make_batches(config, corpus.train, shuffle=True, **make, **ranks)
    held_out = None
    if corpus.held_out is not None:
        held_out = make_batches(config, corpus.held_out, shuffle=False, **make, **ranks)
    wrapped = prepare_model(accelerator, model, options)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    plain_optimizer = make_optimizer(model, options)
    max_steps = options.num_steps(batches.num_rows / rows)
    scheduler = make_scheduler(plain_optimizer, options, max_steps)
    optimizer: Any = accelerator.prepare_optimizer(plain_optimizer)
    checkpoints = Checkpointer(
        accelerator=accelerator,
        model=model,
        optimizer=plain_optimizer,
        scheduler=scheduler,
        tokenizer=corpus.tokenizer,
        config=identity,
        model_config=config.model,
        folder=folder / "checkpoints",
        keep=options.keep_checkpoints,
    )
    state = TrainState()
    if start is not None:
        state = checkpoints.load(start)
        batches.load_state_dict({"position": state.position, "rows_drawn": state.rows_drawn})
    saved = start if start is not None and start.parent == checkpoints.folder else None
    on_main_process(accelerator, lambda: _open_run(folder, config, saved, state.step))

    log = MetricsLog(
        folder,
        step=state.step,
        active=accelerator.is_main_process,
        losses=part_losses(model),
    )
    bar = TrainProgress(max_steps, active=progress and accelerator.is_main_process)
    began, trained, trained_seconds = time.perf_counter() - state.seconds, 0, 0.0
    last = max_steps if stop_step is None else min(stop_step, max_steps)
    try:
        with StopRequest() as stop, bar:
            while state.step < last:
                step_began = time.perf_counter()
                step = state.step + 1
                micro = [next(batches) for _ in range(options.gradient_accumulation_steps)]
                late = max_seconds is not None and step_began - called >= max_seconds
                counts = count_batches(
                    accelerator, micro, interrupted=stop.received, late=late and trained > 0
                )
                if counts.interrupted or counts.late:
                    if saved is None or saved.name != f"step-{state.step}":
                        saved = checkpoints.save(state)
                    if counts.late:
                        break
                    raise KeyboardInterrupt(
                        f"stopped after step {state.step}; resume from {saved} with --resume true"
                    )

                wrapped.train()
                losses = accumulate_gradients(
                    accelerator, wrapped, micro, counts.targets, options.label_smoothing
                )
                grad_norm = accelerator.clip_grad_norm_(
                    parameters, options.max_grad_norm or math.inf
                )
                row = {
                    **losses,
                    "grad_norm": _value(grad_norm),
                    "learning_rate": scheduler.get_last_lr()[0],
                }
                _check_finite(row, step, accelerator.scaler is not None, checkpoints.folder)
                optimizer.step()
                if not optimizer.step_was_skipped:
                    scheduler.step()
                optimizer.zero_grad()

                now = time.perf_counter()
                trained += counts.tokens
                trained_seconds += now - step_began
                row["tokens_per_second"] = counts.tokens / (now - step_began)
                state.step, state.loss = step, row["loss"]
                state.tokens += counts.tokens
                state.position = batches.position
                state.seconds = now - began
                bar.update(step, row["loss"], trained / trained_seconds)

                done = step == max_steps
                if done or step % options.log_steps == 0:
                    log.write(step=step, tokens=state.tokens, seconds=state.seconds, **row)
                if held_out is not None and (done or _due(step, options.eval_steps)):
                    measured = held_out_losses(accelerator, wrapped, held_out, options.eval_batches)
                    state.eval_loss = measured["eval_loss"]
                    state.seconds = time.perf_counter() - began
                    log.write(step=step, tokens=state.tokens, seconds=state.seconds, **measured)
                if step == last or _due(step, options.save_steps):
                    saved = checkpoints.save(state)
    finally:
        log.close()
    if saved is None:  # a finished run that continues in another folder
        saved = checkpoints.save(state)

    if state.step >= max_steps:
        tensors = gather_model(model)
        on_main_process(
            accelerator,
            lambda: _save_result(folder / "model", model, corpus.tokenizer, tensors, config.model),
        )
    assert saved is not None and state.loss is not None
    return TrainResult(
        output_dir=folder,
        model_dir=folder / "model",
        checkpoint=saved,
        step=state.step,
        tokens=state.tokens,
        loss=state.loss,
        eval_loss=state.eval_loss,
        seconds=state.seconds,
        tokens_per_second=trained / trained_seconds if trained else 0.0,
    )


def _value(grad_norm: Any) -> float:
    """The norm as a number; for sharded gradients it is a sharded tensor."""
    return (grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm).item()


def _check_finite(row: dict[str, float], step: int, scaled: bool, folder: Path) -> None:
    """Raise before a non-finite step; fp16's scaler skips overflowing gradients."""
    for name in ("loss",) if scaled else ("loss", "grad_norm"):
        if not math.isfinite(row[name]):
            raise NonFiniteError(
                f"{name} must be finite, got {row[name]} at step {step}; the last good checkpoint "
                f"is {latest_checkpoint(folder) or 'none'}"
            )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _check_domains(config: TrainConfig) -> None:
    """Raise ValueError if gates are to be trained on domains, but there is only one text."""
    given: dict[str, Any] = {"training.gate_rows": config.training.gate_rows}
    for name in ("options", "memory_adapter", "specialists"):
        fields = getattr(config.model, name) or {}
        given[f"model.{name}.domain_coefficient"] = fields.get("domain_coefficient")
    for part in config.model.options.get("parts") or ():
        if isinstance(part, Mapping):
            name = f"model.options.parts.{part.get('kind')}.domain_coefficient"
            given[name] = part.get("domain_coefficient")
    for name, value in given.items():
        if value and config.data.mix_in is None:
            must(name, "be 0 without data.mix_in", value)


def _find_start(folder: Path, resume: bool | str | Path) -> Path | None:
    """The checkpoint to continue from, if any; an existing run is never overwritten."""
    if not isinstance(resume, bool):
        return Path(resume)
    if resume:
        return latest_checkpoint(folder / "checkpoints")
    if (folder / "metrics.csv").exists() or list_checkpoints(folder / "checkpoints"):
        must("training.output_dir", "be a new folder, or resume be true", f"{folder} with a run")
    return None


def _check_same_run(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Raise unless the checkpoint's run has the same relevant settings."""
    before = read_checkpoint(checkpoint)["config"]
    if before["rows"] != identity["rows"]:
        name = "batch_size * gradient_accumulation_steps * processes"
        must(name, f"be {before['rows']} as in {checkpoint}", identity["rows"])
    for section, kind in (
        ("model", ModelConfig),
        ("data", DataConfig),
        ("training", TrainingConfig),
    ):
        defaults = {field.name: field.default for field in fields(kind)}
        for name, value in identity[section].items():
            # an older checkpoint without a field has its default
            was = before[section].get(name, defaults[name])
            if name not in _FREE and was != value:
                must(f"{section}.{name}", f"be {was} as in {checkpoint}", value)
    if before["tokens"] != identity["tokens"]:
        must("data", f"give the training tokens of {checkpoint}", "other ones")


def _open_run(folder: Path, config: TrainConfig, start: Path | None, step: int) -> None:
    """Make the run folder; move checkpoints after ``start`` aside."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", config.to_yaml())
    for checkpoint in list_checkpoints(folder / "checkpoints"):
        if start is not None and int(checkpoint.name.removeprefix("step-")) > step:
            checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.abandoned"))
    for leftover in (folder / "checkpoints").glob(
        ".step-*.tmp"
    ):  # left by a run that was killed while saving
        shutil.rmtree(leftover)


def _save_result(
    folder: Path, model: Any, tokenizer: Any, tensors: dict[str, Tensor], config: ModelConfig
) -> None:
    """Write the trained model, in one step."""
    with replacing(folder) as temporary:
        save_model(model, tokenizer, tensors, temporary, config)
        if is_attached(config):
            export(model, tensors, config, temporary)
