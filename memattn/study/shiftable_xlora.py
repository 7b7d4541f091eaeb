"""X-LoRA of PEFT over a trained LoRA and one that adds nothing: only its classifier learns."""

import time
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from memattn.evaluate.batch_loss import mean_loss
from memattn.files import replacing, write_text
from memattn.study.shiftable_measures import Specialty, held_out_batches
from memattn.train.attached import load_base
from memattn.train.config import ModelConfig, TrainConfig
from memattn.train.metrics import MetricsLog
from memattn.train.optim import make_scheduler
from memattn.train.setup import make_batches, prepare_data

FILE = "xlora.safetensors"


def train_xlora(study: Specialty, config: TrainConfig) -> None:
    """Train the classifier of X-LoRA, and write a run folder with its metrics and weights.

    The first LoRA is that of the cell ``lora`` with the same seed, which is trained before. A run
    that is stopped restarts: it takes as long as any other cell.
    """
    options, folder = config.training, Path(config.training.output_dir)
    began = time.perf_counter()
    torch.manual_seed(options.seed)
    model = _new(study, options.seed)
    corpus = prepare_data(config)
    make = {"model": model, "tokenizer": corpus.tokenizer, "rank": 0, "world_size": 1}
    batches = make_batches(config, corpus.train, shuffle=True, **make)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=options.base_model_lr,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.weight_decay,
    )
    steps = options.num_steps()
    scheduler = make_scheduler(optimizer, options, steps)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", config.to_yaml())
    (folder / "metrics.csv").unlink(missing_ok=True)
    log = MetricsLog(folder, step=0, active=True)
    tokens = 0
    for step in range(1, steps + 1):
        model.train()
        batch = next(batches)
        loss = model(**batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, options.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        rate = scheduler.get_last_lr()[0]
        scheduler.step()
        tokens += int(batch["attention_mask"].sum())
        facts = dict(step=step, tokens=tokens, seconds=time.perf_counter() - began)
        log.write(**facts, loss=loss.item(), learning_rate=rate, grad_norm=norm.item())
        if step == steps:
            value = mean_loss(model, held_out_batches(study, study.data, model))
            log.write(**{**facts, "seconds": time.perf_counter() - began}, eval_loss=value)
    log.close()
    with replacing(folder / "model") as temporary:
        save_file(dict(_classifier(model)), temporary / FILE)


def load_xlora(study: Specialty, folder: Path) -> Any:
    """The model of a finished run."""
    model = _new(study, int(folder.name.removeprefix("seed-")))
    tensors = load_file(folder / "model" / FILE)
    with torch.no_grad():
        for name, tensor in _classifier(model):
            tensor.copy_(tensors[name])
    return model.eval()


def classifier_parameters(study: Specialty) -> int:
    """Parameters of the classifier: a matrix and biases for two scalings in each place."""
    model = load_base(ModelConfig(model_path=study.base_path))
    places = sum(name.rpartition(".")[2] in study.lora.targets for name, _ in model.named_modules())
    return (model.config.hidden_size + 1) * 2 * places


def _new(study: Specialty, seed: int) -> Any:
    """The generalist with the LoRA of a seed and a new classifier."""
    from peft import LoraConfig, XLoraConfig

    trained = Path(study.out) / "lora" / f"seed-{seed}" / "model" / "lora"
    nothing = Path(study.out) / "xlora" / "nothing"
    if not nothing.is_dir():
        options = LoraConfig(
            r=study.lora.rank,
            lora_alpha=study.lora.alpha,
            target_modules=list(study.lora.targets),
            task_type="CAUSAL_LM",
        )
        model = _with_peft(load_base(ModelConfig(model_path=study.base_path)), options)
        with replacing(nothing) as folder:
            model.save_pretrained(folder)  # one of its two matrices begins as 0
    model = load_base(ModelConfig(model_path=study.base_path))
    model.config.use_cache = False  # X-LoRA refuses a model with a cache
    options = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=model.config.hidden_size,
        xlora_depth=1,
        adapters={"0": str(trained), "1": str(nothing)},
    )
    return _with_peft(model, options)


def _with_peft(model: Any, options: Any) -> Any:
    """What PEFT makes of a model, without the warnings that it causes in transformers."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, options)


def _classifier(model: Any) -> list[tuple[str, torch.Tensor]]:
    """What is trained, by name."""
    return [(name, p.data) for name, p in model.named_parameters() if p.requires_grad]
