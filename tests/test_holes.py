"""Masks with holes: a sequence with columns without tokens is the sequence without them."""

import pytest
import torch
from model_factories import SYSTEMS, VOCAB, logits_of, make_model, make_tokens

from memattn.models import MemAttnCache

EXACT = dict(rtol=0, atol=1e-12)
T = 40


def make_mask(seed: int = 0) -> torch.Tensor:
    """Rows with scattered holes, one long hole, none, and holes beside padding on both sides."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(4, T, generator=generator) > 0.35).long()
    mask[1, 10:24], mask[2] = 0, 1
    mask[3, :7], mask[3, 30:] = 0, 0
    return mask


def alone(model, tokens, mask):
    """Logits of each row's tokens without the other columns, where they stand in the batch."""
    logits = torch.zeros(*tokens.shape, VOCAB, dtype=torch.float64)
    for row, ids, there in zip(logits, tokens, mask == 1, strict=True):
        row[there] = logits_of(model, ids[there][None])[0]
    return logits


@torch.no_grad()
def run_pieces(model, tokens, mask, cuts, cache=None, full_mask=True, begin=0):
    """Logits of the pieces of a batch between cuts, and the cache."""
    cache = MemAttnCache(model.config) if cache is None else cache
    logits = []
    for a, b in zip([begin, *cuts], [*cuts, tokens.shape[1]], strict=True):
        piece = mask[:, :b] if full_mask else mask[:, a:b]
        out = model(tokens[:, a:b], attention_mask=piece, past_key_values=cache)
        logits.append(out.logits)
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("system", SYSTEMS)
def test_holes_are_as_if_they_were_not_there(system):
    """In one pass, in pieces and by single tokens; what stands in a hole changes no bit."""
    model, tokens, mask = make_model(system), make_tokens(4, T), make_mask()
    there, expected = mask == 1, alone(model, tokens, mask)
    whole = logits_of(model, tokens, attention_mask=mask)
    torch.testing.assert_close(whole[there], expected[there], **EXACT)
    other = torch.where(there, tokens, make_tokens(4, T, seed=5))
    assert torch.equal(logits_of(model, other, attention_mask=mask)[there], whole[there])
    for cuts, full_mask in (([17], True), ([1, 2, 11, 24, 39], False), (range(29, T), True)):
        pieces, cache = run_pieces(model, tokens, mask, list(cuts), full_mask=full_mask)
        torch.testing.assert_close(pieces[there], expected[there], **EXACT)
        assert torch.equal(cache.present, there) and cache.position == T


@pytest.mark.parametrize("system", SYSTEMS)
def test_rows_with_holes_are_selected_merged_saved_and_cropped(system, tmp_path):
    model, tokens, mask = make_model(system), make_tokens(4, T), make_mask(1)
    there, expected = mask == 1, alone(model, tokens, mask)
    _, first = run_pieces(model, tokens[:, :21], mask[:, :21], [13])
    _, short = run_pieces(model, tokens[:2, 9:21], mask[:2, 9:21], [])
    first.save(tmp_path / "cache")
    merged = MemAttnCache.merge([MemAttnCache.load(tmp_path / "cache"), short])
    rows = torch.tensor([5, 3, 0, 2])
    merged.reorder_cache(rows)
    left = torch.cat([torch.zeros(2, 9, dtype=torch.long), mask[:2, 9:]], 1)
    masks = torch.cat([mask, left])[rows]
    ids = torch.cat([tokens, tokens[:2]])[rows]
    actual, _ = run_pieces(model, ids, masks, [30], cache=merged, begin=21)
    wanted = torch.cat([expected, alone(model, tokens[:2], left)])[rows]
    kept = masks[:, 21:] == 1
    torch.testing.assert_close(actual[kept], wanted[:, 21:][kept], **EXACT)

    first.activate_past_recording()
    for begin, right, wrong in ((21, 3, 4), (24, 0, 6), (24, 5, 2)):
        end = begin + right
        guess, seen = make_tokens(4, right + wrong, seed=7), make_mask(3)[:, : right + wrong]
        guess[:, :right], seen[:, :right] = tokens[:, begin:end], mask[:, begin:end]
        run_pieces(model, guess, seen, [], cache=first)
        first.crop(-wrong)
        assert torch.equal(first.present, there[:, :end])
    actual, _ = run_pieces(model, tokens, mask, [33], cache=first, begin=29)
    torch.testing.assert_close(actual[there[:, 29:]], expected[:, 29:][there[:, 29:]], **EXACT)


@pytest.mark.parametrize("way", ["moved", "merged", "loaded"])
@pytest.mark.parametrize("system", ["segments", "both"])
def test_a_crop_of_rows_that_moved_is_exact_or_refused(system, way, tmp_path):
    model, tokens, cropped = make_model(system), make_tokens(4, T), []
    mask = torch.ones(4, T, dtype=torch.long)
    mask[0, 12:17], mask[1, 5:9], mask[2, 14:16] = 0, 0, 0
    there, expected = mask == 1, alone(model, tokens, mask)
    for position in range(17, 8, -1):
        _, cache = run_pieces(model, tokens[:, :18], mask[:, :18], [2, 9, 16])
        if way == "merged":
            cache = MemAttnCache.merge(cache.split(1))
        if way == "loaded":
            cache.save(tmp_path / "cache")
            cache = MemAttnCache.load(tmp_path / "cache")
        try:
            cache.crop(position - 18)
        except ValueError as error:
            assert "must leave what later tokens see" in str(error)
        else:
            cropped.append(position)
            rest, _ = run_pieces(model, tokens, mask, [], cache, begin=position)
            known = there[:, position:]
            torch.testing.assert_close(rest[known], expected[:, position:][known], **EXACT)
    assert len(cropped) < 9 and (cropped or system == "both")  # whose window needs every token


@pytest.mark.parametrize("system", ["vanilla", "learned"])
def test_gradients_reach_the_hidden_states_that_are_returned(system):
    """They are those of what stands in the other columns: none."""
    model, tokens, mask = make_model(system), make_tokens(4, T), make_mask()
    out = model(tokens, attention_mask=mask, output_hidden_states=True)
    plain = model(tokens, attention_mask=mask)
    assert torch.equal(out.logits, plain.logits)
    gradients = torch.autograd.grad(out.logits[mask == 1].square().sum(), out.hidden_states)
    for gradient in gradients:
        assert gradient[mask == 1].ne(0).any(1).all()
        assert gradient[mask == 0].eq(0).all()


@pytest.mark.parametrize("system", ["vanilla", "both"])
def test_a_batch_without_rows(system):
    model, tokens = make_model(system), make_tokens(4, 6)[:0]
    cache = MemAttnCache(model.config)
    for _ in range(2):
        assert logits_of(model, tokens, past_key_values=cache).shape == (0, 6, VOCAB)


def test_a_token_before_a_hole_predicts_the_next_token():
    model, tokens, mask = make_model("vanilla"), make_tokens(4, T), make_mask()
    loss = model(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)).loss
    losses = []
    for ids, there in zip(tokens, mask == 1, strict=True):
        row = ids[there][None]
        losses += [model(row, labels=row).loss] * (row.shape[1] - 1)
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    labels, last = (
        tokens.masked_fill(mask == 0, -100),
        mask.cumsum(1) - mask[:, :-9].sum(1)[:, None],
    )
    torch.testing.assert_close(
        model(tokens, attention_mask=mask, labels=labels[:, -9:], logits_to_keep=9).loss,
        # the first token of the last nine columns is predicted before them
        model(tokens, attention_mask=mask, labels=labels.masked_fill(last < 2, -100)).loss,
    )
    ahead = torch.cat([tokens[:, 1:], torch.full((4, 1), -100)], 1)
    given = model(tokens, shift_labels=ahead).loss
    torch.testing.assert_close(given, model(tokens, labels=tokens).loss)
    with pytest.raises(ValueError, match=r"shift_labels must have shape \[4, 40\], got \[4, 39\]"):
        model(tokens, shift_labels=ahead[:, 1:])


GREEDY = dict(do_sample=False, max_new_tokens=6, eos_token_id=None)


def new_tokens(model, ids):
    """What greedy decoding of one sequence adds."""
    return model.generate(ids[None], attention_mask=torch.ones_like(ids[None]), **GREEDY)[0, -6:]


@pytest.mark.parametrize("system", SYSTEMS)
def test_generation_goes_on_behind_holes(system):
    """Prompts padded on the right, with pad tokens inside; conversations that go on."""
    model = make_model(system)
    tokens, mask = make_tokens(4, 12), make_mask(2)[:, :12]
    mask[0, 9:], mask[3, 10:] = 0, 0
    tokens = tokens.masked_fill(mask == 0, 0)  # the pad token, which generate finds by itself
    first = model.generate(tokens, return_dict_in_generate=True, **GREEDY)
    again = model.generate(tokens, attention_mask=mask, use_cache=False, **GREEDY)
    assert torch.equal(first.sequences, again)
    for row, ids, there in zip(first.sequences, tokens, mask == 1, strict=True):
        assert torch.equal(row[12:], new_tokens(model, ids[there]))
    turn = make_tokens(4, 9, seed=3)
    for row, length in zip(turn, (9, 2, 5, 7), strict=True):
        row[length:] = 0
    talk = torch.cat([first.sequences, turn], 1)
    masks = torch.cat([mask, torch.ones(4, 6, dtype=torch.long), (turn != 0).long()], 1)
    second = model.generate(
        talk, attention_mask=masks, past_key_values=first.past_key_values, **GREEDY
    )
    for row, ids, there in zip(second, talk, masks == 1, strict=True):
        assert torch.equal(row[-6:], new_tokens(model, ids[there]))


def test_the_next_turn_drops_what_was_generated_behind_an_end():
    model = make_model("future")
    ids = make_tokens(2, 8)
    first = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    talk = torch.cat([first.sequences, make_tokens(2, 5, seed=4)], 1)
    mask = torch.ones_like(talk)
    mask[1, 9:14] = 0  # the answer ended with its first token
    second = model.generate(
        talk, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY
    )
    for row, tokens, there in zip(second, talk, mask == 1, strict=True):
        assert torch.equal(row[-6:], new_tokens(model, tokens[there]))
    # windows drop what would be needed again, unless the past is recorded
    model, cache = make_model("both"), MemAttnCache(make_model("both").config)
    for records in (False, True):
        if records:
            cache.activate_past_recording()
        first = model.generate(ids, past_key_values=cache, return_dict_in_generate=True, **GREEDY)
        talk[:, :14] = first.sequences
        go_on = lambda: model.generate(talk, attention_mask=mask, past_key_values=cache, **GREEDY)
        if not records:
            with pytest.raises(ValueError, match="attention_mask must have the tokens that past_k"):
                go_on()
        else:
            for row, tokens, there in zip(go_on(), talk, mask == 1, strict=True):
                assert torch.equal(row[-6:], new_tokens(model, tokens[there]))
        cache.reset()
