"""Training what is attached to a pretrained model: a memory, specialists, LoRA, or several."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from adapter_factories import SIZES
from safetensors.torch import load_file
from train_factories import columns, tiny_config

from memattn.adapters import MemoryAdapter
from memattn.cli import main
from memattn.cli._models import load_model
from memattn.data import load_tokenizer
from memattn.train import LoraConfig, ModelConfig, TrainConfig, train
from memattn.train.attached import load_base
from memattn.train.metrics import read_metrics
from memattn.train.optim import parameter_groups

MEMORY = {"kind": "scaled"}
LORA = LoraConfig(rank=2, alpha=4)
KINDS = {
    "memory": {"memory_adapter": MEMORY},
    "lora": {"lora": LORA},
    "both": {"memory_adapter": MEMORY, "lora": LORA},
    # open ones: their prior is 1 unless told
    "specialists": {"memory_adapter": {"kind": "specialists", "gate_size": 4}, "lora": LORA},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny pretrained model."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = load_tokenizer("bytes")
    torch.manual_seed(0)
    sizes = SIZES | dict(vocab_size=len(tokenizer), num_hidden_layers=1)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config(folder, base, kind, *, freeze=True, **training):
    own = tiny_config(folder, data={"packed": False, "tokenizer": None}, **training)
    model = ModelConfig(model_path=str(base), freeze_base_model=freeze, **KINDS[kind])
    return TrainConfig(model=model, data=own.data, training=own.training)


def logits(model):
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_attached_learns_and_the_base_does_not(tmp_path, base, kind, capsys):
    run = config(tmp_path, base, kind, max_steps=12, base_model_lr=3e-2)
    result = train(run, progress=False)
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.csv")]
    assert result.loss < losses[0] - 0.02
    saved = load_file(result.model_dir / "model.safetensors")
    fresh = load_base(run.model)
    attached = {name for name, p in fresh.named_parameters() if p.requires_grad}
    assert attached == {name for name in saved if not name.endswith(".prior")}
    assert all("memory_adapters" in name or ".lora_" in name for name in attached)
    # every command finds it again, in the run, in its checkpoints, and by its formats
    trained = logits(load_model(str(tmp_path / "run"), "cpu"))
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert not torch.equal(trained, logits(plain))
    assert torch.equal(trained, logits(load_model(str(result.checkpoint), "cpu")))
    if kind != "memory":
        from peft import PeftModel

        plain = PeftModel.from_pretrained(plain, result.model_dir / "lora")
    if kind != "lora":
        MemoryAdapter.from_pretrained(plain, result.model_dir / "memory")
    assert torch.equal(trained, logits(plain))
    arguments = ["--prompt", "the sea", "--max_new_tokens", "3", "--device", "cpu"]
    assert main(["generate", str(tmp_path / "run"), *arguments]) == 0
    assert capsys.readouterr().out.startswith("the sea")
    if kind == "specialists":
        out = ["--text", "the sea", "--out", str(tmp_path / "gates.svg")]
        assert main(["gates", str(tmp_path / "run"), *out]) == 0
        assert " specialist_0]\nwrote " in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["both", "specialists"])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, base, kind):
    whole = train(config(tmp_path, base, kind, max_steps=6), progress=False)
    # activations that are computed again change no bit
    again = {"output_dir": str(tmp_path / "again"), "gradient_checkpointing": True}
    again = config(tmp_path, base, kind, max_steps=6, **again)
    resumed = train(again, resume=whole.output_dir / "checkpoints" / "step-3", progress=False)
    a, b = (load_file(r.model_dir / "model.safetensors") for r in (whole, resumed))
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)
    rows = [read_metrics(r.output_dir / "metrics.csv") for r in (whole, resumed)]
    exact = ("step", "loss", "toy_loss", "eval_loss", "grad_norm")
    assert columns(rows[1], *exact) == columns(rows[0][3:], *exact)


def test_a_base_that_learns_is_saved_with_it(tmp_path, base):
    result = train(config(tmp_path, base, "memory", freeze=False, max_steps=2), progress=False)
    saved = load_file(result.model_dir / "model.safetensors")
    before = load_file(base / "model.safetensors")
    assert before.keys() < saved.keys()
    assert any(not torch.equal(before[name], saved[name]) for name in before)
    loaded = dict(load_model(str(tmp_path / "run"), "cpu").named_parameters())
    assert all(torch.equal(loaded[name], saved[name]) for name in before)


def test_rates_are_those_of_the_roles(tmp_path, base):
    run = config(tmp_path, base, "both", freeze=False, memory_lr=2e-3, lora_lr=3e-3)
    model = load_base(run.model)
    names = {p: name for name, p in model.named_parameters()}
    rates = {}
    for group in parameter_groups(model, run.training):
        for parameter in group["params"]:
            name = names[parameter]
            kind = "lora" if "lora_" in name else "memory" if "memory_" in name else "base"
            if "table" not in name:  # the toy has a rate of its own for that
                rates.setdefault(kind, set()).add(group["lr"])
    assert rates == {"base": {1e-2}, "memory": {2e-3}, "lora": {3e-3}}


def test_names_what_does_not_fit(tmp_path, base):
    run = config(tmp_path, base, "lora", max_steps=1)
    wrong = ModelConfig(model_path=str(base), lora=LoraConfig(targets=["query"]))
    with pytest.raises(ValueError, match=r"model.lora.targets must name matrices .*q_proj.*query"):
        load_base(wrong)
    with pytest.raises(ValueError, match="config.kind must be one of .*, got 'no'"):
        load_base(ModelConfig(model_path=str(base), memory_adapter={"kind": "no"}))
    specialists = {"kind": "specialists", "prior": 0.0}
    closed = ModelConfig(model_path=str(base), memory_adapter=specialists, freeze_base_model=True)
    own = replace(run, model=closed, training=replace(run.training, output_dir=f"{tmp_path}/own"))
    with pytest.raises(ValueError, match="model must have weights that learn .*a prior above 0"):
        train(own, progress=False)
    result = train(run, progress=False)
    description = result.model_dir / "attached.json"
    values = json.loads(description.read_text())
    description.write_text(json.dumps({**values, "lora": {**values["lora"], "rank": 3}}))
    with pytest.raises(ValueError, match="model must be of the base model that it names, got"):
        load_model(str(tmp_path / "run"), "cpu")
    description.write_text("{")
    with pytest.raises(ValueError, match="attached.json must be what training wrote, got"):
        load_model(str(tmp_path / "run"), "cpu")
