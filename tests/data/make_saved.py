"""Makes tests/data/saved: models, caches and runs as the package wrote them on 2026-11-27.

Run at commit fc9724b, from the repository root, into an empty folder:
PYTHONPATH=.:tests:kernels python tests/data/make_saved.py
"""

import dataclasses
import shutil
import tempfile
from pathlib import Path

import torch
from model_factories import SYSTEMS, pad_left, perturb
from safetensors.torch import save_file
from train_factories import tiny_config, write_corpus

from memattn.models import MemAttnCache, MemAttnConfig, MemAttnForCausalLM
from memattn.train import train

OUT = Path(__file__).parent / "saved"
SIZES = dict(
    vocab_size=23,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=16,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
MODELS = {
    **SYSTEMS,
    "persistent": (
        lambda num_persistent_tokens, **sizes: MemAttnConfig(
            attention={"kind": "causal", "num_persistent_tokens": num_persistent_tokens}, **sizes
        ),
        dict(num_persistent_tokens=2),
    ),
    "relative": (
        MemAttnConfig.future,
        dict(future_dim=5, source="relative", loss_type="cosine", loss_coefficient=0.5),
    ),
}


def make_models() -> None:
    for name, (preset, options) in MODELS.items():
        torch.manual_seed(0)
        limit = {"max_position_embeddings": 40}
        model = MemAttnForCausalLM(preset(**options | SIZES | limit))
        perturb(model).eval().save_pretrained(OUT / "models" / name)
        model.double()
        generator = torch.Generator().manual_seed(3)
        tokens = torch.randint(3, 23, (2, 19), generator=generator)
        padded, mask = pad_left([tokens[0], tokens[1, :13]], 19)
        with torch.no_grad():
            output = model(padded, attention_mask=mask, use_cache=False)
            labels = padded.masked_fill(mask == 0, -100)
            losses = model.train()(padded, attention_mask=mask, labels=labels)
            cache = MemAttnCache(model.config)
            model.eval()(padded[:, :11], attention_mask=mask[:, :11], past_key_values=cache)
            rest = model(padded[:, 11:], past_key_values=cache.detach()).logits
        cache.save(OUT / "caches" / f"{name}.safetensors")
        tensors = {"tokens": padded, "mask": mask, "logits": output.logits, "rest": rest}
        tensors["loss"] = losses.loss
        if losses.future_loss is not None:
            tensors["future_loss"] = losses.future_loss
        save_file(tensors, OUT / "expected" / f"{name}.safetensors")


def make_runs() -> None:
    corpus = write_corpus(OUT / "corpus.jsonl", documents=12)
    for preset in ("segmented", "future"):
        folder = Path(tempfile.mkdtemp())
        options = dict(keep_checkpoints=1, eval_steps=4, save_steps=None)
        config = tiny_config(folder, preset=preset, data={"dataset_name": str(corpus)}, **options)
        train(config, stop_step=5, progress=False)
        shutil.rmtree(folder / "run" / "tensorboard", ignore_errors=True)
        shutil.copytree(folder / "run", OUT / "trained" / preset)
        whole = dataclasses.replace(
            config, training=dataclasses.replace(config.training, output_dir=str(folder / "whole"))
        )
        result = train(whole, progress=False)
        shutil.copy(result.output_dir / "metrics.csv", OUT / "trained" / f"{preset}-whole.csv")
        shutil.copy(
            result.model_dir / "model.safetensors", OUT / "trained" / f"{preset}-whole.safetensors"
        )


if __name__ == "__main__":
    for folder in ("models", "caches", "expected", "trained"):
        (OUT / folder).mkdir(parents=True)
    make_models()
    make_runs()
