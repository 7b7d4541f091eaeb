"""A part that only these tests define is as good as one of the package: nothing knows its name."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from model_factories import (
    SIZES,
    enable_checkpointing,
    logits_of,
    make_tokens,
    pad_left,
    perturb,
)
from safetensors.torch import load_file
from toy_part import ToyConfig
from train_factories import columns, tiny_config
from transformers import AutoModelForCausalLM

import memattn
from memattn.cli import main
from memattn.data import load_tokenizer
from memattn.evaluate import audit, perplexity
from memattn.models import PRESETS, MemAttnCache, MemAttnConfig, MemAttnForCausalLM
from memattn.parts import PARTS, AddedPart, PartState, register_part
from memattn.train import ModelConfig, TrainingConfig, load_config, train
from memattn.train.metrics import columns_of, read_metrics
from memattn.train.optim import parameter_groups

EXACT = dict(rtol=0, atol=1e-12)
# beside each kind of attention, in all layers and in one
SYSTEMS = {
    "vanilla": dict(parts=[ToyConfig()]),
    "segmented": dict(segment_len=5, window_size=4, parts=[{"kind": "toy", "layers": [1]}]),
    "future": dict(
        future_dim=5,
        max_position_embeddings=160,
        parts=[ToyConfig(num_rows=7, where="beside_attention")],
    ),
}


def make_model(preset="vanilla", dtype=torch.float64, **options):
    torch.manual_seed(0)
    config = PRESETS[preset](**SYSTEMS[preset] | SIZES | options)
    return perturb(MemAttnForCausalLM(config).to(dtype).eval())


@pytest.fixture(params=SYSTEMS)
def model(request):
    return make_model(request.param)


def test_the_package_does_not_know_it():
    for file in Path(memattn.__file__).parent.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "toy" not in text.lower() and "RunningMean" not in text, file


def test_a_model_with_it_is_exact(model):
    report = audit(model, seq_len=24)
    assert report.verdict == "all 0", [row for row in report.rows if row.value]
    assert all(row.value is not None for row in report.rows)  # every check applies
    assert audit(make_model(parts=[ToyConfig(num_rows=20)]), seq_len=18).notes  # by its own reach


def test_what_it_does_counts(model):
    tokens = make_tokens()
    logits = logits_of(model, tokens)
    for block in model.model.layers:
        for part in block.parts.values():
            part.gate_proj.bias.data -= 1.0
    assert not torch.allclose(logits_of(model, tokens), logits)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generates_with_and_without_a_cache(model, num_beams):
    tokens, mask = pad_left([make_tokens()[0, :9], make_tokens()[1, :4]], 9)
    options = dict(do_sample=False, max_new_tokens=12, eos_token_id=None, num_beams=num_beams)
    cached = model.generate(tokens, attention_mask=mask, **options)
    assert torch.equal(
        cached, model.generate(tokens, attention_mask=mask, use_cache=False, **options)
    )
    alone = model.generate(tokens[1:, 5:], **options)
    assert torch.equal(cached[1:, 5:], alone)


def test_guesses_are_taken_back(model):
    tokens = make_tokens(B=1, T=6).repeat(1, 4)
    options = dict(do_sample=False, max_new_tokens=12, eos_token_id=None, suppress_tokens=[0])
    expected = model.generate(tokens, **options)
    assert torch.equal(model.generate(tokens, prompt_lookup_num_tokens=4, **options), expected)


@torch.no_grad()
def feed(model, tokens, cache, mask=None):
    return model(tokens, attention_mask=mask, past_key_values=cache).logits


def test_its_state_is_cut_saved_reset_and_split_by_row(model, tmp_path):
    tokens = make_tokens(T=30)
    whole = logits_of(model, tokens)
    cache = MemAttnCache(model.config)
    feed(model, tokens[:, :11], cache)
    cache.save(tmp_path / "state.safetensors")
    cache = MemAttnCache.load(tmp_path / "state.safetensors")
    torch.testing.assert_close(feed(model, tokens[:, 11:20], cache), whole[:, 11:20], **EXACT)
    state = cache.layers[1].parts["toy"]
    assert state.kept == 1 and state.rows.keys() == {"sum", "count"}
    assert state.rows["count"].tolist() == [[20.0], [20.0]]

    cache.reset(torch.tensor([False, True]))
    cache.save(tmp_path / "state.safetensors")  # also what is still to restart
    cache = MemAttnCache.load(tmp_path / "state.safetensors")
    expected = torch.cat([whole[:1, 20:], logits_of(model, tokens[1:, 20:])])
    first, second = cache.split(1)
    torch.testing.assert_close(feed(model, tokens[1:, 20:23], second), expected[1:, :3], **EXACT)
    feed(model, tokens[:1, 20:23], first)
    merged = MemAttnCache.merge([second, first])
    actual = feed(model, tokens[[1, 0], 23:], merged)
    torch.testing.assert_close(actual, expected[[1, 0], 3:], **EXACT)


def test_a_crop_restores_its_state_or_is_refused(model):
    tokens = make_tokens(T=20)
    mask = torch.ones(2, 20)
    mask[0, :6] = 0
    whole = logits_of(model, tokens, attention_mask=mask)
    cache = MemAttnCache(model.config)
    feed(model, tokens[:, :9], cache, mask[:, :9])
    message = "tokens_to_remove must be at least 0, what toy has recorded"
    with pytest.raises(ValueError, match=f"{message}|leave what later tokens see"):
        cache.crop(-1)
    cache.crop(0)
    cache.activate_past_recording()
    for begin, right, wrong in ((9, 3, 4), (12, 0, 2), (12, 2, 0)):
        for piece in (tokens[:, begin : begin + right], make_tokens(T=wrong, seed=7)):
            if piece.shape[1]:
                feed(model, piece, cache)
        cache.crop(-wrong)
    actual = feed(model, tokens[:, 14:], cache)
    torch.testing.assert_close(actual, whole[:, 14:], **EXACT)


def test_saves_and_loads(model, tmp_path):
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert [part["kind"] for part in written["parts"]] == ["toy"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.parts == model.config.parts
    torch.testing.assert_close(
        logits_of(loaded, make_tokens()), logits_of(model, make_tokens()), **EXACT
    )


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_equal_gradients_and_counts_the_loss_once(use_reentrant):
    tokens, mask = pad_left([make_tokens()[0], make_tokens()[1, :9]], 23)
    grads, losses = [], []
    for checkpointing in (False, True):
        model = make_model("future", num_hidden_layers=3).train()
        if checkpointing:
            enable_checkpointing(model, use_reentrant=use_reentrant)
        output = model(tokens, attention_mask=mask, labels=tokens)
        output.loss.backward()
        losses.append([output.loss, output.toy_loss, output.future_loss])
        grads.append([parameter.grad for parameter in model.parameters()])
    for a, b in (*zip(*grads, strict=True), *zip(*losses, strict=True)):
        assert torch.equal(a, b)


def test_losses_of_all_parts_are_in_the_loss():
    model, tokens = make_model("future").train(), make_tokens()
    output = model(tokens, labels=tokens)
    expected = output.lm_loss + output.losses["future_loss"] + 0.1 * output.losses["toy_loss"]
    torch.testing.assert_close(output.loss, expected)
    assert output.loss_counts["toy_loss"] == 2 * tokens.numel()  # in two layers
    assert model.eval()(tokens).toy_loss is None
    with pytest.raises(AttributeError, match="no attribute 'toys_loss'"):
        output.toys_loss  # noqa: B018


@pytest.mark.usefixtures("new_programs")
def test_compiles_as_one_graph():
    model = make_model(dtype=torch.float32).train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    tokens, mask = pad_left([make_tokens()[0], make_tokens()[1, :9]], 23)
    actual = compiled(tokens, attention_mask=mask, labels=tokens)
    expected = model(tokens, attention_mask=mask, labels=tokens)
    torch.testing.assert_close(actual.loss, expected.loss)


def test_its_table_learns_at_a_rate_of_its_own():
    model = make_model(parts=[ToyConfig(table_lr=0.5)])
    groups = parameter_groups(model, TrainingConfig(base_model_lr=1e-3))
    names = {parameter: name for name, parameter in model.named_parameters()}
    placed = {names[p]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert placed["model.layers.0.parts.toy.table"] == (0.5, 0.0)
    assert placed["model.layers.0.parts.toy.value_proj.weight"] == (1e-3, 0.1)
    assert groups[0]["lr"] == 1e-3


def toy_run(folder, **training):
    config = tiny_config(folder, preset="vanilla", eval_steps=4, **training)
    parts = [{"kind": "toy", "table_lr": 0.02}]
    model = ModelConfig(preset="vanilla", options={**config.model.options, "parts": parts})
    return dataclasses.replace(config, model=model)


def test_trains_resumes_bit_for_bit_reports_and_is_drawn(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    whole = train(toy_run(tmp_path / "a"), progress=False)
    config = toy_run(tmp_path / "b")
    (tmp_path / "b" / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "b" / "config.yaml") == config
    train(config, stop_step=5, progress=False)
    resumed = train(config, resume=True, progress=False)
    rows = [read_metrics(run.output_dir / "metrics.csv") for run in (whole, resumed)]
    assert list(rows[0][0]) == columns_of(["toy_loss"])
    names = ("step", "loss", "lm_loss", "toy_loss", "eval_loss", "eval_toy_loss", "grad_norm")
    assert columns(rows[0], *names) == columns(rows[1], *names)
    for row in rows[0]:
        if row["loss"] is not None:
            assert row["loss"] == pytest.approx(row["lm_loss"] + 0.1 * row["toy_loss"], abs=1e-6)
        else:
            assert row["eval_toy_loss"] > 0.0
    for file in ("model/model.safetensors", "checkpoints/step-8/optimizer.safetensors"):
        a, b = (load_file(run.output_dir / file) for run in (whole, resumed))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    picture = tmp_path / "gates.png"
    model = str(whole.output_dir)
    assert main(["plot", "running_mean", model, "--text", "the sea", "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["plot", "doors", model, "--text", "the sea"]) == 2
    shown = capsys.readouterr().err
    assert "but for page, attention, state, influence, chapters, " in shown
    assert ", running_mean, got" in shown
    report = tmp_path / "report.json"
    assert main(["evaluate", model, "--json", str(report)]) == 0
    assert "toy_loss" in capsys.readouterr().out
    assert json.loads(report.read_text())["losses"]["toy_loss"] > 0.0
    loaded = AutoModelForCausalLM.from_pretrained(whole.model_dir)
    assert perplexity(loaded, ["the sea"], load_tokenizer(whole.model_dir)).losses["toy_loss"] > 0


def test_its_cost_is_that_of_its_module():
    cost = ToyConfig().cost(make_model().config.sizes, length=10)
    assert cost.parameters == 32 * 32 + 32 + 1 + 4 * 32
    assert cost.flops == 2 * 10 * (32 * 32 + 32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Silent(ToyConfig):
    """Says that it returns a loss, and returns another."""

    kind = "silent"
    losses = {"other": 1.0}


def another(**attributes):
    return dataclasses.dataclass(frozen=True, kw_only=True)(
        type("Another", (AddedPart,), attributes)
    )


@pytest.mark.parametrize(
    "make, error, message",
    [
        (
            lambda: make_model(parts=[{"kind": "toi"}]),
            ValueError,
            r"parts\[0\].kind must be one of .*toy.*, got 'toi'",
        ),
        (
            lambda: make_model(parts=[{"kind": "causal"}]),
            ValueError,
            r"parts\[0\].kind must be one of .*toy.*, got 'causal'",
        ),
        (
            lambda: MemAttnConfig(attention={"kind": "toy"}),
            ValueError,
            "attention.kind must be one of causal, future, segmented, titans, got 'toy'",
        ),
        (
            lambda: make_model(parts=[ToyConfig(), ToyConfig(num_rows=2)]),
            ValueError,
            "parts must have toy at most once, got it 2 times",
        ),
        (
            lambda: make_model(parts=[ToyConfig(layers=(1, 2))]),
            ValueError,
            r"parts.toy.layers must name layers from 0 to 1, got \[1, 2\]",
        ),
        (
            lambda: make_model(parts=[ToyConfig(layers=())]),
            ValueError,
            r"parts.toy.layers must name layers from 0 to 1, got \[\]",
        ),
        (
            lambda: ToyConfig(layers=(-1,)),
            ValueError,
            "parts.toy.layers must be at least 0, got -1",
        ),
        (
            lambda: make_model(parts=[{"kind": "toy", "rows": 2}]),
            ValueError,
            r"parts\[0\].rows must be a field of toy \(layers, where, num_rows, .*\), got 2",
        ),
        (lambda: make_model(parts=["toy"]), TypeError, r"parts\[0\] must be a PartConfig or a"),
        (lambda: make_model(parts=ToyConfig()), TypeError, "parts must be a list, got ToyConfig"),
        (
            lambda: make_model(num_rows=2),
            TypeError,
            "num_rows must be a field of MemAttnConfig, got 2",
        ),
        (lambda: register_part(another(kind="toy", place="attention")), ValueError, "not be one"),
        (lambda: register_part(another(kind="a b", place="attention")), ValueError, "identifier"),
        (lambda: register_part(another(kind="ab", place="above")), ValueError, "place must be one"),
    ],
)
def test_what_is_wrong_with_a_configuration_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_state_of_another_part_or_model_is_refused(tmp_path):
    tokens, model = make_tokens(), make_model()
    plain = make_model(parts=[])
    cache = plain(tokens, use_cache=True).past_key_values
    wanted = r"past_key_values must be of causal, toy\(window_size=2\) in layer 0, got causal"
    with pytest.raises(ValueError, match=wanted):
        model(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match=r"be of segmented\(segment_len=5, window_size=4\) in lay"):
        make_model("segmented")(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values must have 3 layers, got 2"):
        make_model(parts=[], num_hidden_layers=3)(tokens, past_key_values=cache)
    wider = make_model(parts=[], head_dim=16)
    with pytest.raises(ValueError, match="must have key of causal of shape .* as in this model"):
        wider(tokens, past_key_values=cache)
    cache = model(tokens, use_cache=True).past_key_values
    cache.save(tmp_path / "state.safetensors")
    part = PARTS.pop("toy")
    try:
        with pytest.raises(ValueError, match="path must be one of .*causal.*, got 'toy'"):
            MemAttnCache.load(tmp_path / "state.safetensors")
    finally:
        PARTS["toy"] = part


def test_a_part_that_does_not_keep_its_word_is_named():
    register_part(Silent)
    try:
        model = make_model(parts=[Silent()]).train()
        with pytest.raises(ValueError, match=r"parts.silent must return losses \['other'\]"):
            model(make_tokens())
    finally:
        del PARTS["silent"]


def test_token_tensors_of_any_rank_are_cut():
    state = PartState("toy", window_size=3)
    state.keep = 2
    for T in (4, 1):
        for shape in ((2, T, 5), (2, 1, T, 5), (2, 3, 2, T, 5)):
            state.append(str(len(shape)), torch.randn(shape))
    assert [t.shape[-2] for t in state.tokens.values()] == [2, 2, 2] and state.kept == 2
