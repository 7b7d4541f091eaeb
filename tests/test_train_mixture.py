"""Training documents of another text, added to those that are learnt."""

import json
from dataclasses import replace

import pytest
import torch
from train_factories import tiny_config

from memattn.train import train
from memattn.train.config import LoraConfig
from memattn.train.setup import held_out_texts, prepare_data


def write_general(folder, documents=60):
    rows = [{"title": f"g {i}", "text": f"general {i}: " + "x" * 40} for i in range(documents)]
    file = folder / "general.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def texts(tokens, tokenizer):
    bounds = tokens.bounds.tolist()
    rows = [tokens.ids[a:b].tolist() for a, b in zip(bounds, bounds[1:], strict=False)]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def test_a_share_of_the_tokens_is_of_the_other_text(tmp_path):
    alone = tiny_config(tmp_path, max_steps=2, batch_size=2)
    mixed = replace(alone, data=replace(alone.data, mix_in=write_general(tmp_path), mix_share=0.25))
    plain, both = prepare_data(alone), prepare_data(mixed)
    n, added = len(plain.train.ids), len(both.train.ids) - len(plain.train.ids)
    assert both.train.ids[:n].equal(plain.train.ids) and added == round(n / 3)
    assert both.held_out.ids.equal(plain.held_out.ids)
    own = texts(both.train, both.tokenizer)
    assert own[: plain.train.num_documents] == texts(plain.train, plain.tokenizer)
    *whole, cut = own[plain.train.num_documents :]
    general = replace(mixed.data, dataset_name=mixed.data.mix_in, mix_in=None)
    held_out = set(held_out_texts(general))
    assert len(whole) > 5 and all(text.startswith("general ") for text in whole)
    assert cut and "general ".startswith(cut[:8])
    assert not held_out & set(whole) and len(set(whole)) == len(whole)
    assert both.train.num_bytes == sum(len(text.encode()) for text in own)
    special = [text[0].isdigit() for text in own]  # as those of the corpus begin
    assert both.train.domains.tolist() == special and plain.train.domains is None
    # all tokens of either text count the same
    each = both.train.domain_weights * torch.tensor([added, n])
    torch.testing.assert_close(each, torch.full((2,), (added + n) / 2), rtol=1e-3, atol=0)
    heavy = prepare_data(replace(mixed, data=replace(mixed.data, mix_weight=3.0)))
    assert heavy.train.domain_weights.equal(both.train.domain_weights * torch.tensor([3.0, 1.0]))
    assert prepare_data(mixed).train.ids.equal(both.train.ids)
    assert train(mixed, progress=False).eval_loss is not None
    other = replace(mixed, data=replace(mixed.data, mix_share=0.3))
    longer = replace(other, training=replace(other.training, max_steps=3))
    with pytest.raises(ValueError, match="data must give the training tokens of .* got other ones"):
        train(longer, resume=True, progress=False)


def test_a_separator_cuts_the_files_of_either_text(tmp_path):
    file = tmp_path / "general.txt"
    file.write_text("\n\n".join(f"note {i}" for i in range(80)))
    config = tiny_config(tmp_path)
    data = replace(config.data, mix_in=[str(file)], document_separator="\n\n", mix_share=0.1)
    corpus = prepare_data(replace(config, data=replace(data, dataset_name=str(tmp_path))))
    assert {"note 3", "note 4"} & set(texts(corpus.train, corpus.tokenizer))


def test_says_what_is_wrong(tmp_path):
    config = tiny_config(tmp_path)
    short = replace(config.data, mix_in=write_general(tmp_path, 3), mix_share=0.5)
    with pytest.raises(ValueError, match=r"data.mix_share must be at most 0\.\d+ with so short"):
        prepare_data(replace(config, data=short))
    chat = replace(config.training, training_mode="instruction_finetuning")
    with pytest.raises(
        ValueError, match="training.training_mode must be pretraining with data.mix_in"
    ):
        prepare_data(replace(config, data=short, training=chat))
    with pytest.raises(ValueError, match=r"data.mix_share must be in \(0, 1\), got 1.0"):
        replace(config.data, mix_share=1.0)
    with pytest.raises(ValueError, match="data.mix_weight must be positive and finite, got 0"):
        replace(config.data, mix_weight=0.0)
    with pytest.raises(ValueError, match=r"data.mix_in must not be empty, got ''"):
        replace(config.data, mix_in="")
    with pytest.raises(ValueError, match=r"model.specialists must be null without model_path"):
        replace(config.model, specialists={})
    path = dict(preset=None, options={}, model_path=".", specialists={})
    with pytest.raises(ValueError, match="freeze_base_model must be true with specialists"):
        replace(config.model, **path)
    with pytest.raises(ValueError, match="model.specialists must be null with lora and memory_ada"):
        replace(config.model, **path, freeze_base_model=True, lora=LoraConfig())
    alone = replace(config.model, preset="shiftable", options={"domain_coefficient": 0.1})
    with pytest.raises(
        ValueError, match=r"options.domain_coefficient must be 0 without data.mix_in"
    ):
        train(replace(config, model=alone), progress=False)
    options = {"parts": [{"kind": "specialists", "domain_coefficient": 0.1}]}
    with pytest.raises(
        ValueError, match=r"options.parts.specialists.domain_coefficient must be 0 without data.mix"
    ):
        train(replace(config, model=replace(alone, options=options)), progress=False)
    taught = replace(config.training, gate_rows=2)
    with pytest.raises(ValueError, match="training.gate_rows must be 0 without data.mix_in, got 2"):
        train(replace(config, training=taught), progress=False)
    with pytest.raises(ValueError, match="training.gate_rows must be 0 for a model without spec"):
        data = replace(config.data, mix_in=write_general(tmp_path))
        train(replace(config, data=data, training=taught), progress=False)
