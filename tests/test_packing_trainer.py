"""Packed rows where others call: trainer, heads, specialists, attached parts, models of others."""

import pytest
import torch
from adapter_factories import make_attached
from hf_attention_factories import make_model as make_hf_model
from model_factories import SIZES, make_config, make_model, make_tokens, perturb
from packing_factories import EXACT, LENGTHS, T, count, documents
from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from memattn.models import MemAttnForSequenceClassification, MemAttnForTokenClassification
from memattn.models.shiftable import ShiftableLanguageModel


def trainer_of(model, data, folder, collator, **options):
    arguments = TrainingArguments(
        folder,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        **options,
    )
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data, data_collator=collator)


@pytest.mark.parametrize("options", [{}, dict(return_flash_attn_kwargs=True, return_seq_idx=True)])
def test_a_packed_step_of_the_trainer_is_one_of_the_documents(options, tmp_path):
    """Over two batches of unlike sizes, whose losses count by their labels."""
    tokens = make_tokens(1, T)
    data = [{"input_ids": ids[0].tolist()} for ids in documents(tokens, LENGTHS[:1])]
    model = make_model("both").train()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = [
        model(ids, labels=ids).loss * (ids.shape[1] - 1)
        for ids in documents(tokens, LENGTHS[:1])
        if ids.shape[1] > 1
    ]
    total = sum(losses) / (T - 4)
    total.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    step = dict(
        optim="sgd", learning_rate=1.0, max_grad_norm=0.0, max_steps=1, lr_scheduler_type="constant"
    )
    trainer = trainer_of(
        model,
        data,
        tmp_path,
        DataCollatorWithFlattening(**options),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=4,
        **step,
    )
    torch.testing.assert_close(trainer.evaluate()["eval_loss"], total.item())
    result = trainer.train()
    torch.testing.assert_close(result.training_loss, total.item())
    for name, parameter in model.named_parameters():
        moved = start[name] - parameter
        torch.testing.assert_close(moved, expected[name], rtol=1e-6, atol=1e-7)


def test_heads_of_tokens_are_packed_and_those_of_sequences_are_not(tmp_path):
    torch.manual_seed(0)
    config = make_config("both", num_labels=3)
    model, tokens = (
        perturb(MemAttnForTokenClassification(config).double().eval()),
        make_tokens(2, T),
    )
    logits = model(tokens, position_ids=count(LENGTHS)).logits
    alone = [model(ids).logits[0] for ids in documents(tokens)]
    torch.testing.assert_close(logits.flatten(0, 1), torch.cat(alone), **EXACT)
    data = [
        {"input_ids": ids[0].tolist(), "labels": (ids[0] % 3).tolist()} for ids in documents(tokens)
    ]
    options = dict(max_steps=1, per_device_train_batch_size=7)
    trainer_of(model, data, tmp_path, DataCollatorWithFlattening(), **options).train()
    model = perturb(MemAttnForSequenceClassification(config).double().eval())
    with pytest.raises(ValueError, match="position_ids must be of one document a row, padded to"):
        model(tokens, position_ids=count(LENGTHS))
    with pytest.raises(ValueError, match="seq_idx must be of one document a row, padded to the"):
        model(tokens, seq_idx=count(LENGTHS) // 4)
    whole = model(tokens, position_ids=torch.arange(T)[None]).logits
    assert torch.equal(whole, model(tokens).logits)
    # transformers gives such a row the class of its last document, and says nothing of the others
    sizes = dict(SIZES, num_labels=3)
    llama = perturb(LlamaForSequenceClassification(LlamaConfig(**sizes)).double().eval())
    packed = llama(tokens, position_ids=count(LENGTHS), use_cache=False).logits
    last = [llama(row[None, -n[-1] :]).logits for row, n in zip(tokens, LENGTHS, strict=True)]
    torch.testing.assert_close(packed, torch.cat(last), **EXACT)
    data = [{"input_ids": ids.tolist(), "labels": i} for i, ids in enumerate(tokens)]
    trainer_of(model, data, tmp_path, None, max_steps=1).train()


def test_gates_and_inputs_of_specialists_in_packed_rows():
    model = ShiftableLanguageModel(make_model("vanilla"), num_specialists=2)
    perturb(model)
    for name in model.specialists.names:
        model.specialists.open(name) if hasattr(model.specialists, "open") else None
    tokens, positions = make_tokens(2, T), count(LENGTHS)
    weights = torch.rand(2, T, 3, dtype=torch.float64).softmax(-1)
    packed = model(tokens, position_ids=positions, domain_weights=weights).logits
    pairs = zip(documents(tokens), documents(weights), strict=True)
    alone = [model(ids, domain_weights=own).logits[0] for ids, own in pairs]
    torch.testing.assert_close(packed.flatten(0, 1), torch.cat(alone), **EXACT)
    prior = torch.rand(3)
    packed = model(tokens, position_ids=positions, domain_prior=prior).logits
    alone = [model(ids, domain_prior=prior).logits[0] for ids in documents(tokens)]
    torch.testing.assert_close(packed.flatten(0, 1), torch.cat(alone), **EXACT)
    with pytest.raises(ValueError, match="domain_prior must be of all rows or of each token, "):
        model(tokens, position_ids=positions, domain_prior=prior.expand(2, -1))
    with pytest.raises(ValueError, match="return_gates must be None or False with packed"):
        model(tokens, position_ids=positions, return_gates=True)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_attached_parts_take_several_packed_rows(architecture):
    model, tokens = make_attached(architecture), make_tokens(2, T)
    keywords = dict(position_ids=count(LENGTHS), use_cache=False)
    packed = model(tokens, labels=tokens, output_losses=True, **keywords)
    alone = [model(ids, use_cache=False).logits[0] for ids in documents(tokens)]
    torch.testing.assert_close(packed.logits.flatten(0, 1), torch.cat(alone), **EXACT)
    cu_seqlens = torch.tensor([0, 4, 5, 16, 23, 35, 46], dtype=torch.int32)
    with pytest.raises(
        ValueError, match="cu_seq_lens_q must begin documents where position_ids do"
    ):
        model(tokens, cu_seq_lens_q=torch.tensor([0, 23, 46]), **keywords)
    with pytest.raises(
        ValueError, match=r"position_ids must be given with cu_seq_lens_q, \[B, T\]"
    ):
        model(tokens, cu_seq_lens_q=cu_seqlens, use_cache=False)


def test_the_hook_agrees_with_positions_or_refuses():
    model, tokens = make_hf_model("llama", memattn_segment_len=6), make_tokens(2, T)
    cu_seqlens = torch.tensor([0, 4, 5, 16, 23, 35, 46], dtype=torch.int32)
    seq_idx = count(LENGTHS).eq(0).cumsum(1)
    run = lambda **inputs: model(tokens, use_cache=False, **inputs).logits
    expected = run(position_ids=count(LENGTHS))
    flash = dict(cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens.clone(), max_length_q=12)
    for inputs in (flash, dict(seq_idx=seq_idx), dict(seq_idx=seq_idx, **flash)):
        assert torch.equal(run(position_ids=count(LENGTHS), **inputs), expected)
    place = torch.arange(2 * T).view(2, T) % T  # without positions these go on
    pairs = zip(documents(tokens), documents(place), strict=True)
    alone = [model(ids, position_ids=own, use_cache=False).logits[0] for ids, own in pairs]
    torch.testing.assert_close(run(**flash).flatten(0, 1), torch.cat(alone), **EXACT)
    for message, inputs in (
        ("seq_idx must change where position_ids or cu_seq_lens_q", dict(seq_idx=seq_idx)),
        ("cu_seq_lens_q must begin documents where position_ids do",
         dict(cu_seq_lens_q=torch.tensor([0, 23, 46]), position_ids=count(LENGTHS))),
        ("max_length_q must be at least 12, got 11", {**flash, "max_length_q": 11}),
        ("attention_mask must be None with cu_seq_lens_q, got one with padding",
         dict(attention_mask=(torch.arange(T) > 2).long().expand(2, -1), **flash)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            run(**inputs)
    cache = model(tokens).past_key_values
    with pytest.raises(
        ValueError, match="past_key_values must be None with cu_seq_lens_q, got keys"
    ):
        model(tokens, past_key_values=cache, **flash)


@pytest.mark.parametrize("kind", ["decoder", "hook", "attached"])
def test_continuous_batching_is_refused_before_it_begins(kind):
    model = dict(decoder=make_model, hook=lambda: make_hf_model("llama"), attached=make_attached)[
        kind
    ]()
    with pytest.raises(NotImplementedError, match="model must read a paged cache for continuous b"):
        model.generate_batch([[3, 4, 5], [6]], max_new_tokens=2)
