"""Gates of specialists that are taught whose text is which before a run."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import transformers
from adapter_factories import SIZES
from safetensors.torch import load_file
from test_train_mixture import write_general
from train_factories import tiny_config

from memattn.data import load_tokenizer
from memattn.models import MemAttnConfig, MemAttnForCausalLM
from memattn.nn import DomainGate
from memattn.parts.gate_report import measure_gates
from memattn.train import ModelConfig, teach, train
from memattn.train.attached import load_base
from memattn.train.metrics import read_metrics
from memattn.train.optim import parameter_groups
from memattn.train.setup import prepare_data

FIELDS = dict(names=["sea", "law"], scope="prefix", gate_size=8, domain_coefficient=0.5, prior=1.0)


def make_run(folder, kind, packed=False, **training):
    """A run beside a tiny base that nobody trained, with another text mixed in."""
    data = dict(tokenizer=None, packed=packed, mix_in=write_general(folder), mix_share=0.3)
    run = tiny_config(folder, data={**data, "mix_weight": 2.0}, **{"gate_rows": 6, **training})
    tokenizer, base = load_tokenizer("bytes"), folder / "base"
    torch.manual_seed(0)
    if kind == "own":
        sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
        sizes |= dict(intermediate_size=32, vocab_size=len(tokenizer))
        model, given = MemAttnForCausalLM(MemAttnConfig.vanilla(**sizes)), {"specialists": FIELDS}
    else:
        sizes = SIZES | dict(vocab_size=len(tokenizer), num_hidden_layers=2)
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes))
        given = {"memory_adapter": {"kind": "specialists", **FIELDS}}
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    return replace(run, model=ModelConfig(model_path=str(base), freeze_base_model=True, **given))


def base_gates(model, corpus, domain):
    """What the base gets of the tokens of one text, on the average."""
    bounds = corpus.train.bounds.tolist()
    chosen = (corpus.train.domains == domain).nonzero()[:, 0].tolist()[-8:]
    rows = [corpus.train.ids[bounds[i] : bounds[i + 1]][None, :30].long() for i in chosen]
    found = [layer.gates[..., 0].mean() for row in rows for layer in measure_gates(model, row)]
    return torch.stack(found).mean()


@pytest.mark.parametrize("kind, packed", [("own", False), ("own", True), ("attached", False)])
def test_gates_tell_the_texts_apart_and_nothing_else_changes(tmp_path, monkeypatch, kind, packed):
    run = make_run(tmp_path, kind, packed)
    corpus, model = prepare_data(run), load_base(run.model)
    monkeypatch.setattr(teach, "STEPS", 60)
    for module in model.modules():
        if isinstance(module, DomainGate):
            module.set_prior("law", 0.0)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    again, few = copy.deepcopy(model), copy.deepcopy(model)
    for gate in (m for m in few.modules() if isinstance(m, DomainGate)):
        gate.requires_grad_(False)
    assert teach.teach_gates(few, run, corpus) == {}  # none of them learns
    few = copy.deepcopy(model)
    losses = teach.teach_gates(model.train(), run, corpus)
    assert model.training and len(losses) == 2 and max(losses.values()) < 0.3
    changed = {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    assert changed and all("gate.rows.sea." in name for name in changed)
    base, special = (base_gates(model, corpus, domain) for domain in (0, 1))
    assert base > 0.75 and special < 0.4
    assert teach.teach_gates(again, run, corpus) == losses
    monkeypatch.setattr(teach, "ROOM", 1)  # a token of each batch is kept
    other = teach.teach_gates(few, run, corpus)
    assert other.keys() == losses.keys() and other != losses


def trained(result):
    """The rows of metrics that steps of training left."""
    rows = read_metrics(result.output_dir / "metrics.csv")
    return [row for row in rows if row["loss"] is not None]


def test_a_run_begins_with_it_and_goes_on_as_it_would_have(tmp_path, monkeypatch):
    monkeypatch.setattr(teach, "STEPS", 60)
    run = make_run(tmp_path, "attached", max_steps=4, save_steps=2)
    whole = train(run, progress=False)
    rows = trained(whole)
    assert all(0.0 < row["gate_domain"] < 0.5 for row in rows)
    for row in rows:
        rest = row["lm_loss"] + 0.01 * row["gate_entropy"] + 0.5 * row["gate_domain"]
        assert row["loss"] == pytest.approx(rest, rel=1e-5)
    again = replace(run, training=replace(run.training, output_dir=str(tmp_path / "again")))
    train(again, progress=False, stop_step=2)
    resumed = train(again, resume=True, progress=False)
    a, b = (load_file(r.model_dir / "model.safetensors") for r in (whole, resumed))
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)
    untaught = replace(run.training, gate_rows=0, output_dir=str(tmp_path / "untaught"))
    other = train(replace(run, training=untaught), progress=False)
    assert trained(other)[0]["gate_domain"] > rows[0]["gate_domain"] + 0.1
    saved = json.loads((whole.model_dir / "attached.json").read_text())
    assert saved["memory_adapter"]["domain_coefficient"] == 0.5


def test_gates_have_a_rate_of_their_own(tmp_path):
    run = make_run(tmp_path, "own")
    fields = {**FIELDS, "gate_lr": 1e-4}
    model = load_base(replace(run.model, specialists=fields))
    names = {p: name for name, p in model.named_parameters()}
    rates = {True: set(), False: set()}
    for group in parameter_groups(model, run.training):
        for parameter in group["params"]:
            name, decays = names[parameter], group["weight_decay"] > 0
            assert decays == (parameter.dim() >= 2), name
            rates[".gate." in name].add(group["lr"])
    assert rates == {True: {1e-4}, False: {1e-2}}
    with pytest.raises(ValueError, match="specialists.gate_lr must be positive and finite, got 0"):
        load_base(replace(run.model, specialists={**FIELDS, "gate_lr": 0.0}))
