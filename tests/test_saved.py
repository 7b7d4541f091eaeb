"""What the package wrote before attention became parts still loads, and computes the same."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from memattn.models import MemAttnCache
from memattn.train import load_config, train
from memattn.train.metrics import read_metrics

SAVED = Path(__file__).parent / "data" / "saved"
MODELS = sorted(folder.name for folder in (SAVED / "models").iterdir())
EXACT = dict(rtol=1e-12, atol=1e-12)
LOSS = dict(rtol=1e-6, atol=0.0)  # a mean over layers, of float32 cross-entropy


def load(name):
    model = AutoModelForCausalLM.from_pretrained(SAVED / "models" / name, dtype=torch.float64)
    return model.eval(), load_file(SAVED / "expected" / f"{name}.safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_what_they_computed(name):
    model, expected = load(name)
    tokens, mask = expected["tokens"], expected["mask"]
    real = mask == 1
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(logits[real], expected["logits"][real], **EXACT)
        labels = tokens.masked_fill(~real, -100)
        output = model.train()(tokens, attention_mask=mask, labels=labels)
    torch.testing.assert_close(output.loss, expected["loss"], **LOSS)
    assert (output.future_loss is not None) == ("future_loss" in expected)
    if "future_loss" in expected:
        torch.testing.assert_close(output.future_loss, expected["future_loss"], **LOSS)


@pytest.mark.parametrize("name", MODELS)
def test_caches_go_on_where_they_were(name, tmp_path):
    model, expected = load(name)
    cache = MemAttnCache.load(SAVED / "caches" / f"{name}.safetensors")
    cache.save(tmp_path / "again.safetensors")  # in the format of today
    rest, mask = expected["tokens"][:, 11:], expected["mask"][:, 11:]
    for state in (cache, MemAttnCache.load(tmp_path / "again.safetensors")):
        with torch.no_grad():
            logits = model(rest, attention_mask=mask, past_key_values=state).logits
        torch.testing.assert_close(logits[mask == 1], expected["rest"][mask == 1], **EXACT)


@pytest.mark.parametrize("preset", ["segmented", "future"])
def test_runs_go_on_as_they_would_have(preset, tmp_path):
    folder = SAVED / "trained" / preset
    shutil.copytree(folder, tmp_path / "run")
    config = load_config(folder / "config.yaml")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data,
            dataset_name=str(SAVED / "corpus.jsonl"),
            cache_dir=str(tmp_path / "cache"),
        ),
        training=dataclasses.replace(config.training, output_dir=str(tmp_path / "run")),
    )
    result = train(config, resume=True, progress=False)
    rows = read_metrics(result.output_dir / "metrics.csv")
    whole = read_metrics(SAVED / "trained" / f"{preset}-whole.csv")
    clocks = ("seconds", "tokens_per_second")
    for row, expected in zip(rows, whole, strict=True):
        for name in expected.keys() - set(clocks):
            # kernels differ by rounding from one processor to another
            wanted = expected[name]
            wanted = wanted if wanted is None else pytest.approx(wanted, rel=1e-4)
            assert row.get(name) == wanted, (row["step"], name)
    actual = load_file(result.model_dir / "model.safetensors")
    expected = load_file(SAVED / "trained" / f"{preset}-whole.safetensors")
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4, msg=name)
