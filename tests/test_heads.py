"""Models that say classes instead of tokens, and that are their own assistants."""

import json

import pytest
import torch
from model_factories import make_config, make_model, make_tokens, pad_left, perturb
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto import modeling_auto

import memattn
from memattn.models import MemAttnForSequenceClassification, MemAttnForTokenClassification


def make(head, system="both"):
    torch.manual_seed(0)
    return perturb(head(make_config(system, num_labels=3)).double().eval())


@pytest.mark.parametrize("system", ["both", "titans-mac"])
def test_a_sequence_has_one_class_whatever_its_padding(system, tmp_path):
    model = make(MemAttnForSequenceClassification, system)
    rows = [make_tokens(1, T)[0] for T in (5, 12)]
    alone = torch.cat([model(row[None]).logits for row in rows])
    tokens, mask = pad_left(rows, 12)
    torch.testing.assert_close(model(tokens, attention_mask=mask).logits, alone)
    assert mask[0].tolist() == [0] * 7 + [1] * 5
    right, right_mask = tokens.clone(), mask.flip(1)
    right[0] = tokens[0].roll(5)
    right_mask[1] = 1
    torch.testing.assert_close(model(right, attention_mask=right_mask).logits, alone)
    labels = torch.tensor([2, 0])
    loss = model.train()(tokens, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(alone, labels))
    loss.backward()
    assert model.score.weight.grad.any() and model.model.embed_tokens.weight.grad.any()
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(again) is memattn.MemAttnForSequenceClassification
    torch.testing.assert_close(again.eval()(rows[0][None]).logits, alone[:1])
    named = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    code = (tmp_path / "modeling_memattn.py").read_text()
    assert all(name.rpartition(".")[2] in code for name in named.values())


def test_each_token_has_a_class(tmp_path):
    model, tokens = make(MemAttnForTokenClassification), make_tokens()
    logits = model(tokens).logits
    assert logits.shape == (*tokens.shape, 3)
    hidden = model.model(tokens).last_hidden_state
    torch.testing.assert_close(logits, model.score(hidden))
    labels = torch.randint(3, tokens.shape).masked_fill(tokens > 40, -100)
    loss = model(tokens, labels=labels).loss
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, expected.float())  # transformers computes it in float32
    model.save_pretrained(tmp_path)
    again = AutoModelForTokenClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(again) is memattn.MemAttnForTokenClassification
    torch.testing.assert_close(again.eval()(tokens).logits, logits)


def test_a_language_model_gives_its_decoder(tmp_path):
    model = make_model("both", torch.float32)
    model.save_pretrained(tmp_path)
    head = MemAttnForSequenceClassification.from_pretrained(tmp_path, num_labels=5).eval()
    tokens = make_tokens()
    ours = head.model(tokens).last_hidden_state
    assert torch.equal(ours, model.model(tokens).last_hidden_state)
    assert head(tokens).logits.shape == (2, 5)


def test_transformers_knows_what_they_are_for():
    for table, cls in (
        ("MODEL_MAPPING_NAMES", memattn.MemAttnModel),
        (
            "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
            memattn.MemAttnForSequenceClassification,
        ),
        ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", memattn.MemAttnForTokenClassification),
    ):
        assert cls.__name__ in getattr(modeling_auto, table).values()


@pytest.mark.parametrize("system", ["vanilla", "both", "titans-mac"])
def test_a_model_that_exits_early_assists_itself(system):
    model, tokens = make_model(system, torch.float32), make_tokens(1, 9)
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)
    expected = model.generate(tokens, **options)
    assert torch.equal(model.generate(tokens, assistant_early_exit=1, **options), expected)
    assert model.config.num_hidden_layers == 2
    whole = model(tokens, output_hidden_states=True).hidden_states
    model.config.num_hidden_layers = 1
    assert torch.equal(model.model(tokens).last_hidden_state, model.model.norm(whole[1]))
