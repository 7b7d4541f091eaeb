"""Packed rows: several documents in a row are computed as each of them alone."""

import pytest
import torch
from model_factories import (
    SYSTEMS,
    enable_checkpointing,
    logits_of,
    make_model,
    make_tokens,
    pad_left,
)
from packing_factories import EXACT, LENGTHS, T, count, documents
from torch.nn.functional import cross_entropy
from transformers import DataCollatorWithFlattening

from memattn.models import MemAttnCache


def loss_sum(logits, ids):
    """The summed cross-entropy of one document, in the dtype of the logits."""
    return cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")


def spread(x):
    """``[2, T]`` with columns of 0 before, between and after those of the documents."""
    column = torch.arange(T) + torch.tensor([[0], [3]]) * (torch.arange(T) > 5)
    return torch.zeros(2, T + 6, dtype=torch.long).scatter(1, column + 3, x)


@pytest.mark.parametrize("system", SYSTEMS)
def test_documents_of_packed_rows_are_as_alone(system):
    """Outputs, gradients and the losses of parts, with and without columns that hold no token."""
    model, tokens = make_model(system).train(), make_tokens(2, T)
    alone = [model(ids).logits for ids in documents(tokens)]
    total = sum(map(loss_sum, alone, documents(tokens)))
    total.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    mask, ids, positions = map(spread, (torch.ones_like(tokens), tokens, count(LENGTHS)))
    packed = model(ids, attention_mask=mask, position_ids=positions, labels=ids)
    logits = packed.logits[mask == 1]
    torch.testing.assert_close(logits, torch.cat(alone, 1)[0], **EXACT)
    sum(map(loss_sum, documents(logits.view(2, T, -1)), documents(tokens))).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(packed.lm_loss, (total / (2 * T - 6)).float())
    torch.testing.assert_close(
        logits_of(model, tokens, position_ids=count(LENGTHS)).flatten(0, 1), logits, **EXACT
    )
    if model.config.losses:  # of all documents together
        rows, there = pad_left([ids[0] for ids in documents(tokens)], 12)
        batch = model(rows, attention_mask=there, labels=rows)
        assert packed.loss_counts == batch.loss_counts and batch.losses
        for name, mean in batch.losses.items():
            torch.testing.assert_close(packed.losses[name], mean)


def test_collators_without_padding_say_it_in_any_form():
    model, tokens = make_model(), make_tokens(1, T)
    features = [{"input_ids": ids[0].tolist()} for ids in documents(tokens, LENGTHS[:1])]
    plain = DataCollatorWithFlattening()(features)
    expected = model(**plain)
    bounds = dict(return_flash_attn_kwargs=True)
    for options in (
        bounds,
        dict(return_seq_idx=True, **bounds),
        dict(return_seq_idx=True),
        dict(return_position_ids=False, **bounds),
        dict(return_position_ids=False, return_seq_idx=True),
    ):
        batch = DataCollatorWithFlattening(**options)(features)
        for name in (None, "cu_seq_lens_k", "max_length_q", "max_length_k"):
            out = model(**{key: value for key, value in batch.items() if key != name})
            assert torch.equal(out.logits, expected.logits) and out.loss == expected.loss
        mask = torch.ones_like(tokens)
        assert torch.equal(model(**batch, attention_mask=mask).logits, expected.logits)
    # of several rows they follow each other
    rows = make_tokens(2, T)
    cu_seqlens = torch.tensor([0, 4, 5, 5, 16, 23, 35, 46], dtype=torch.int32)
    flash = logits_of(model, rows, cu_seq_lens_q=cu_seqlens)
    assert torch.equal(flash, logits_of(model, rows, position_ids=count(LENGTHS)))
    mask = (torch.rand(2, T, generator=torch.Generator().manual_seed(0)) > 0.4).long()
    kept = logits_of(model, rows, cu_seq_lens_q=cu_seqlens, attention_mask=mask)[mask == 1]
    pieces = zip(documents(rows), documents(mask == 1), strict=True)
    alone = [logits_of(model, ids[there][None])[0] for ids, there in pieces if there.any()]
    torch.testing.assert_close(kept, torch.cat(alone), **EXACT)


def test_a_document_predicts_none_of_the_next():
    """Whatever the label of its first token, and with what is shifted already, too."""
    model, tokens, positions = make_model("vanilla"), make_tokens(2, T), count(LENGTHS)
    marked = tokens.masked_fill(positions == 0, -100)
    loss = model(tokens, position_ids=positions, labels=marked).loss
    assert model(tokens, position_ids=positions, labels=tokens).loss == loss
    ahead = torch.cat([marked[:, 1:], torch.full((2, 1), -100)], 1)
    assert model(tokens, position_ids=positions, shift_labels=ahead).loss == loss
    for options in (dict(num_items_in_batch=100), dict(skip_logits=True)):
        pair = [
            model(tokens, position_ids=positions, labels=x, **options).loss
            for x in (tokens, marked)
        ]
        assert pair[0] == pair[1]
    torch.testing.assert_close(pair[0], loss)
    cu_seqlens = torch.tensor([0, 4, 5, 16, 23], dtype=torch.int32)
    pair = [model(tokens[:1], cu_seqlens=cu_seqlens, labels=x[:1]).loss for x in (tokens, marked)]
    assert pair[0] == pair[1]
    kept = model(tokens, position_ids=positions, labels=tokens[:, -9:], logits_to_keep=9).loss
    assert (
        kept == model(tokens, position_ids=positions, labels=marked[:, -9:], logits_to_keep=9).loss
    )


def test_packed_rows_have_no_cache_and_may_be_longer_than_a_document():
    model, tokens = make_model("learned", max_position_embeddings=12), make_tokens(2, T)
    out = model(tokens, position_ids=count(LENGTHS))
    assert out.past_key_values is None and out.logits.shape[:2] == (2, T)
    with pytest.raises(ValueError, match="at most max_position_embeddings=12 tokens a row, got 13"):
        model(tokens, position_ids=count([[13, 10], [12, 11]]))
    mask = torch.ones_like(tokens)
    mask[:, -2:] = 0  # which repeat the column before them
    logits = logits_of(model, tokens, position_ids=count(LENGTHS), attention_mask=mask)
    assert torch.equal(logits[:, -1], logits[:, -3])
    newest = logits_of(model, tokens, position_ids=count(LENGTHS), logits_to_keep=2)
    assert torch.equal(newest, out.logits[:, -2:])


def test_checkpointing_packed_rows_gives_the_same_gradients():
    model, tokens = make_model("titans-mac").train(), make_tokens(2, T)
    grads = []
    for _ in range(2):
        model.zero_grad()
        model(tokens, position_ids=count(LENGTHS), labels=tokens).loss.backward()
        grads.append([p.grad for p in model.parameters()])
        enable_checkpointing(model)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


INT32 = dict(dtype=torch.int32)
BOUNDS = torch.tensor([0, 4, 5, 16, 23], **INT32)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            dict(position_ids=torch.arange(1, T + 1)[None]),
            "position_ids must count from 0 in each document, got others in row 0",
        ),
        (
            dict(position_ids=torch.arange(T)[None] % 7 + (torch.arange(T) > 13)),
            "position_ids must count from 0 in each document",
        ),
        (dict(position_ids=torch.arange(T)), r"position_ids must have shape \[B, T=23\], got"),
        (
            dict(position_ids=count([[4, 1, 10, 8]]), cu_seq_lens_q=BOUNDS),
            "position_ids must begin with 0 where cu_seq_lens_q begins documents, got others",
        ),
        (
            dict(cu_seq_lens_q=BOUNDS, seq_idx=count([LENGTHS[0]]).eq(0).cumsum(1) // 2),
            "seq_idx must change where cu_seq_lens_q begins documents",
        ),
        (
            dict(position_ids=count([LENGTHS[0]]), seq_idx=torch.zeros(1, T)),
            "position_ids must begin with 0 where seq_idx begins documents",
        ),
        (dict(seq_idx=torch.zeros(T)), r"seq_idx must have shape \[B, T=23\], got \[23\]"),
        (
            dict(cu_seq_lens_q=BOUNDS, cu_seq_lens_k=BOUNDS + 1),
            r"cu_seq_lens_k must be cu_seq_lens_q, \[0, 4, 5, 16, 23\], got \[1, 5, 6, 17, 24\]",
        ),
        (dict(cu_seq_lens_q=BOUNDS[:-1]), r"cu_seq_lens_q must rise from 0 to B \* T = 23, got"),
        (dict(cu_seq_lens_q=BOUNDS.float()), r"cu_seq_lens_q must be integers \[n\+1\]"),
        (dict(max_length_q=11), "cu_seq_lens_q must be given together with max_length_q, got None"),
        (dict(cu_seq_lens_k=BOUNDS), "cu_seq_lens_q must be given together with cu_seq_lens_k"),
        (
            dict(cu_seq_lens_q=BOUNDS, max_length_q=11, max_length_k=10),
            "max_length_k must be at least 11, got 10",
        ),
        (
            dict(cu_seq_lens_q=BOUNDS, cu_seqlens=BOUNDS),
            "cu_seqlens must be None with cu_seq_lens_q, got Tensor",
        ),
        (
            dict(position_ids=count([LENGTHS[0]]), use_cache=True),
            "use_cache must not be True with packed documents, got True",
        ),
        (
            dict(position_ids=count([LENGTHS[0]]), past_key_values=MemAttnCache),
            "position_ids must count from the start of each sequence",
        ),
        (
            dict(cu_seq_lens_q=BOUNDS, past_key_values=MemAttnCache),
            "past_key_values must be None with cu_seq_lens_q, got MemAttnCache",
        ),
    ],
)  # fmt: skip
def test_bad_descriptions_of_documents(inputs, message):
    model = make_model()
    if "past_key_values" in inputs:
        inputs = {**inputs, "past_key_values": MemAttnCache(model.config)}
    with pytest.raises(ValueError, match=message):
        model(make_tokens(1, T), **inputs)


def test_a_document_does_not_go_over_the_end_of_a_row():
    bounds = torch.tensor([0, 40, 46], **INT32)
    with pytest.raises(ValueError, match="must begin a document with each row of 23 tokens, got"):
        make_model()(make_tokens(2, T), cu_seq_lens_q=bounds)


def test_other_keywords_are_refused_by_name():
    with pytest.raises(TypeError, match="cu_seq_lens must be an argument of forward or of a part"):
        make_model()(make_tokens(1, T), cu_seq_lens=BOUNDS)


@pytest.mark.usefixtures("new_programs")
def test_compiled_and_exported_programs_take_bounds_and_refuse_restarts():
    model = make_model("both", torch.float32, num_hidden_layers=1)
    tokens = make_tokens(2, T)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    cu_seqlens = torch.tensor([0, 4, 5, 16, 23, 35, 46], **INT32)
    keywords = dict(cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens, max_length_q=12)
    expected = logits_of(model, tokens, **keywords)
    inputs = dict(position_ids=count(LENGTHS), **keywords)
    torch.testing.assert_close(logits_of(compiled, tokens, **inputs), expected)
    plain = torch.arange(T)[None]
    torch.testing.assert_close(
        logits_of(compiled, tokens, position_ids=plain), logits_of(model, tokens)
    )
    with pytest.raises(RuntimeError, match="position_ids must begin with 0 in each row alone"):
        logits_of(compiled, tokens, position_ids=count(LENGTHS))
    program = torch.export.export(
        model, (tokens,), dict(position_ids=plain.expand(2, -1), use_cache=False)
    ).module()
    out = program(tokens, position_ids=plain.expand(2, -1), use_cache=False)
    torch.testing.assert_close(out.logits, logits_of(model, tokens))
    with pytest.raises(RuntimeError, match="position_ids must begin with 0 in each row alone"):
        program(tokens, position_ids=count(LENGTHS), use_cache=False)
