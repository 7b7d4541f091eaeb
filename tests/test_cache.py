"""The cache: decoding and splitting equal one pass, generation, and everything done to rows."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_factories import SYSTEMS, logits_of, make_model, make_tokens, pad_left

from memattn.models import MemAttnCache
from memattn.parts import PartState
from memattn.parts.state import ROOM

EXACT = dict(rtol=0, atol=1e-12)
GREEDY = dict(do_sample=False, max_new_tokens=8, eos_token_id=None)


@pytest.fixture(params=SYSTEMS)
def system(request):
    return request.param


@torch.no_grad()
def run_pieces(model, tokens, sizes, mask=None, cache=None, full_mask=False):
    """Logits of the same tokens given piece by piece, and the cache."""
    cache = MemAttnCache(model.config) if cache is None else cache
    outputs, begin = [], 0
    for piece in tokens.split(sizes, 1):
        end = begin + piece.shape[1]
        piece_mask = None if mask is None else mask[:, 0 if full_mask else begin : end]
        outputs.append(model(piece, attention_mask=piece_mask, past_key_values=cache).logits)
        begin = end
    return torch.cat(outputs, 1), cache


def test_prefill_then_decoding_equals_one_pass(system):
    model, tokens = make_model(system), make_tokens()
    actual, cache = run_pieces(model, tokens, [9] + [1] * 14)
    torch.testing.assert_close(actual, logits_of(model, tokens), **EXACT)
    assert cache.position == cache.get_seq_length() == 23
    assert cache.batch_size == 2


def test_pieces_of_random_sizes_equal_one_pass(system):
    model, draw = make_model(system), random.Random(0)
    for seed in range(6):
        T = draw.randint(1, 40)
        cuts = sorted(draw.randint(0, T) for _ in range(draw.randint(0, 6)))
        sizes = [b - a for a, b in zip([0, *cuts], [*cuts, T], strict=True) if b > a]
        tokens = make_tokens(B=3, T=T, seed=seed)
        begin = torch.tensor([draw.randint(0, T - 1) for _ in range(3)])[:, None]
        end = torch.tensor([draw.randint(int(b) + 1, T) for b in begin])[:, None]
        columns = torch.arange(T)
        mask = ((columns >= begin) & (columns < end)).long()
        expected = logits_of(model, tokens, attention_mask=mask)
        # every other with the mask of all tokens so far
        actual, _ = run_pieces(model, tokens, sizes, mask, full_mask=seed % 2 == 1)
        kept = mask == 1
        torch.testing.assert_close(actual[kept], expected[kept], **EXACT)


def test_state_is_bounded_by_segment_and_window():
    model = make_model("both")  # segments of 7, a window of 4
    cache = MemAttnCache(model.config)
    sizes = []
    for t in range(60):
        run_pieces(model, make_tokens(T=1, seed=t), [1], cache=cache)
        layer = cache.layers[0]
        # the current segment, or 3 keys of the window, whatever is longer
        assert layer.kept == min(t + 1, max((t + 1) % 7, 3))
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for layer in cache.layers for t in layer.state.values()}  # fmt: skip
        assert sum(held.values()) == cache.nbytes
        sizes.append(cache.nbytes)
    row = 2 * 2 * 2 * 8 * 8  # B, Hkv, key and value, D, bytes
    # two layers, at most 6 keys, and room for one more and for those to come
    assert max(sizes) <= 2 * row * (6 + 1 + ROOM)
    # a long prefill leaves no more after
    _, cache = run_pieces(model, make_tokens(T=200), [200])
    assert cache.nbytes == 2 * row * max(200 % 7, 3)
    assert cache.layers[0].keys.untyped_storage().nbytes() == row // 2 * max(200 % 7, 3)
    _, cache = run_pieces(make_model("vanilla"), make_tokens(T=200), [200])
    assert cache.nbytes == 2 * row * 200


def test_left_padded_rows_drop_their_own_past():
    model = make_model("segments")  # segments of 5
    tokens, mask = pad_left([make_tokens()[0, :10], make_tokens()[1, :9]], 10)
    _, cache = run_pieces(model, tokens, [10], mask)
    assert cache.seq_start.tolist() == [0, 1]
    assert cache.layers[0].kept == 4  # row 0 begins a segment; row 1 is 4 tokens into its second


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_equals_uncached_generation(system, num_beams):
    model = make_model(system)
    tokens, mask = pad_left([make_tokens()[0, :9], make_tokens()[1, :4]], 9)
    options = GREEDY | dict(num_beams=num_beams)
    cached = model.generate(tokens, attention_mask=mask, **options)
    uncached = model.generate(tokens, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(cached, uncached)
    for row, length in ((0, 9), (1, 4)):
        alone = model.generate(tokens[row : row + 1, 9 - length :], **options)
        assert torch.equal(cached[row, 9 - length :], alone[0])


def test_sampling_and_chunked_prefill(system):
    model, tokens = make_model(system), make_tokens()
    tokens[0, :6] = 0
    mask = (tokens != 0).long()
    outputs = []
    for options in (dict(), dict(prefill_chunk_size=5), dict(use_cache=False)):
        torch.manual_seed(0)
        sampled = model.generate(
            tokens, attention_mask=mask, do_sample=True, max_new_tokens=8, **options
        )
        outputs.append(sampled)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_generation_continues_from_a_given_cache(system):
    model, tokens = make_model(system), make_tokens()
    whole = model.generate(tokens, **GREEDY)
    _, cache = run_pieces(model, tokens[:, :20], [20])
    assert torch.equal(model.generate(tokens, past_key_values=cache, **GREEDY), whole)
    assert cache.position == 30
    output = model.generate(tokens, return_dict_in_generate=True, **GREEDY)
    assert isinstance(output.past_key_values, MemAttnCache)


def test_save_and_load(tmp_path, system):
    model = make_model(system)
    tokens, mask = pad_left([make_tokens()[0], make_tokens()[1, :17]], 23)
    _, cache = run_pieces(model, tokens[:, :18], [18], mask[:, :18])
    cache.save(tmp_path / "state.safetensors")
    loaded = MemAttnCache.load(tmp_path / "state.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]
    assert (loaded.position, loaded.nbytes) == (18, cache.nbytes)
    for layer, expected in zip(loaded.layers, cache.layers, strict=True):
        for name, tensor in expected.state.items():
            assert torch.equal(layer.state[name], tensor)
    rest = [tokens[:, 18:], [5], mask[:, 18:]]
    expected, _ = run_pieces(model, *rest, cache=cache)
    actual, _ = run_pieces(model, *rest, cache=loaded)
    torch.testing.assert_close(actual, expected, **EXACT)
    whole = logits_of(model, tokens, attention_mask=mask)[:, 18:]
    torch.testing.assert_close(actual, whole, **EXACT)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    model, path = make_model(), tmp_path / "state.safetensors"
    _, cache = run_pieces(model, make_tokens(), [23])
    cache.save(path)
    before = path.read_bytes()

    def fill_the_disk(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fill_the_disk)
    with pytest.raises(OSError, match="no space left"):
        cache.save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "state.safetensors"
    with pytest.raises(FileNotFoundError, match="path must be a file .*, got .*state.safe"):
        MemAttnCache.load(path)
    _, cache = run_pieces(make_model(), make_tokens(), [23])
    cache.save(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="path must be a whole safetensors file, got .*state"):
        MemAttnCache.load(path)
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="path must be a saved MemAttnCache of format"):
        MemAttnCache.load(tmp_path / "model.safetensors")


def test_reset_rows_begin_anew(system):
    model, tokens = make_model(system), make_tokens(T=30)
    _, cache = run_pieces(model, tokens[:, :13], [13])
    cache.reset(torch.tensor([False, True]))
    actual, cache = run_pieces(model, tokens[:, 13:], [2, 9, 6], cache=cache)
    expected = logits_of(model, tokens)[0, 13:], logits_of(model, tokens[1:, 13:])[0]
    torch.testing.assert_close(actual, torch.stack(expected), **EXACT)
    cache.reset()
    assert (cache.position, cache.batch_size, cache.nbytes) == (0, -1, 0)
    actual, _ = run_pieces(model, tokens[:1], [30], cache=cache)
    torch.testing.assert_close(actual, logits_of(model, tokens[:1]), **EXACT)


def test_reset_rows_that_ended_begin_anew():
    model, tokens = make_model(), make_tokens(T=12)
    mask = torch.ones(2, 8)
    mask[1, 5:] = 0
    _, cache = run_pieces(model, tokens[:, :8], [8], mask)
    cache.reset(torch.tensor([False, True]))
    actual, _ = run_pieces(model, tokens[:, 8:], [4], cache=cache)
    torch.testing.assert_close(actual[0], logits_of(model, tokens)[0, 8:], **EXACT)
    torch.testing.assert_close(actual[1:], logits_of(model, tokens[1:, 8:]), **EXACT)


def test_split_merge_and_reorder(system):
    model = make_model(system)
    lengths = [17, 4, 9]
    rows = [make_tokens(B=1, T=25, seed=i)[0] for i in range(3)]
    caches = [
        run_pieces(model, row[None, :length], [length])[1]
        for row, length in zip(rows, lengths, strict=True)
    ]
    merged = MemAttnCache.merge(caches)
    assert (merged.batch_size, merged.position) == (3, 17)
    assert merged.seq_start.tolist() == [0, 13, 8]
    nexts = torch.stack([row[n : n + 8] for row, n in zip(rows, lengths, strict=True)])
    expected = torch.cat(
        [logits_of(model, row[None, : n + 8])[:, n:] for row, n in zip(rows, lengths, strict=True)]
    )

    merged.reorder_cache(torch.tensor([2, 0, 1]))
    actual, merged = run_pieces(model, nexts[[2, 0, 1]], [3, 5], cache=merged)
    torch.testing.assert_close(actual, expected[[2, 0, 1]], **EXACT)

    first, second = MemAttnCache.merge(caches).split([1, 2])
    assert (first.batch_size, second.batch_size) == (1, 2)
    for part, picked in ((first, slice(0, 1)), (second, slice(1, 3))):
        actual, _ = run_pieces(model, nexts[picked], [8], cache=part)
        torch.testing.assert_close(actual, expected[picked], **EXACT)

    repeated = MemAttnCache.merge(caches)
    repeated.batch_repeat_interleave(2)
    repeated.batch_select_indices(torch.tensor([1, 2, 5]))
    actual, _ = run_pieces(model, nexts, [8], cache=repeated)
    torch.testing.assert_close(actual, expected, **EXACT)


def test_cropped_columns_are_forgotten(system):
    model, tokens = make_model(system), make_tokens(T=30)
    mask = torch.ones(2, 30)
    mask[0, :6] = 0
    expected = logits_of(model, tokens, attention_mask=mask)
    _, cache = run_pieces(model, tokens[:, :12], [12], mask[:, :12])
    cache.activate_past_recording()
    for begin, right, wrong in ((12, 3, 4), (15, 0, 9), (15, 5, 0), (20, 1, 7)):
        end = begin + right
        guess = torch.cat([tokens[:, begin:end], make_tokens(T=wrong, seed=7)], 1)
        actual, _ = run_pieces(model, guess, [guess.shape[1]], cache=cache)
        torch.testing.assert_close(actual[:, :right], expected[:, begin:end], **EXACT)
        cache.crop(-wrong)
        assert cache.position == end
        state = cache.layers[0].parts["attention"]
        assert cache.layers[0].kept == (state.keep if state.tokens else 0)
    actual, _ = run_pieces(model, tokens[:, 21:], [9], cache=cache)
    torch.testing.assert_close(actual, expected[:, 21:], **EXACT)


def test_crop_reopens_rows_and_undoes_padding():
    model, tokens = make_model("vanilla"), make_tokens(T=12)
    mask = torch.ones(2, 8)
    mask[0, :7], mask[1, 5:] = 0, 0
    cache = MemAttnCache(model.config)
    cache.activate_past_recording()
    run_pieces(model, tokens[:, :8], [8], mask, cache)
    cache.crop(-4)
    assert (cache.seq_start.tolist(), cache.position) == ([4, 0], 4)
    actual, _ = run_pieces(model, tokens[:, 4:], [8], cache=cache)
    torch.testing.assert_close(actual[0], logits_of(model, tokens[:1, 4:])[0], **EXACT)
    torch.testing.assert_close(actual[1], logits_of(model, tokens)[1, 4:], **EXACT)


def test_decoding_that_guesses_ahead_equals_greedy(system):
    model, tokens = make_model(system), make_tokens(B=1, T=6).repeat(1, 4)
    expected = model.generate(tokens, **GREEDY)
    # a pad token that a draft makes is a token
    known = dict(attention_mask=torch.ones_like(tokens), pad_token_id=int(expected[0, -3]))
    options = GREEDY | known
    assert torch.equal(model.generate(tokens, prompt_lookup_num_tokens=4, **options), expected)
    for drafter in ("vanilla", "both"):
        draft = make_model(drafter, num_hidden_layers=1)
        assert torch.equal(model.generate(tokens, assistant_model=draft, **options), expected)


def test_detach_cuts_the_graph_but_keeps_the_values():
    model, tokens = make_model().train(), make_tokens()
    output = model(tokens[:, :12], use_cache=True)
    cache = output.past_key_values
    assert cache.layers[0].keys.requires_grad
    detached = cache.detach()
    assert not any(t.requires_grad for layer in detached.layers for t in layer.state.values())
    logits = model(tokens[:, 12:], past_key_values=detached).logits
    torch.testing.assert_close(logits, logits_of(model, tokens)[:, 12:], **EXACT)
    logits.sum().backward()
    # through the cache that was not detached, gradients flow to both pieces and equal one pass
    whole = [p.detach().clone() for p in _grads(model, lambda: model(tokens).logits[:, 12:])]

    def two_pieces():
        cache = model(tokens[:, :12], use_cache=True).past_key_values
        return model(tokens[:, 12:], past_key_values=cache).logits

    for grad, expected in zip(_grads(model, two_pieces), whole, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-10)


def _grads(model, function):
    return torch.autograd.grad(function().square().sum(), list(model.parameters()))


@settings(max_examples=40, deadline=None)
@given(
    segment_len=st.none() | st.integers(1, 9),
    window_size=st.none() | st.integers(1, 9),
    starts=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    position=st.integers(12, 30),
)
def test_what_is_kept_is_exactly_what_can_be_seen(segment_len, window_size, starts, position):
    state = PartState("segmented", segment_len, window_size)
    end = torch.full((len(starts),), 1 << 62)
    first = state.visible_from(position, torch.tensor(starts), end)

    def sees(start, i, j):
        if segment_len is None and window_size is None:
            return j >= start
        same = segment_len is not None and (i - start) // segment_len == (j - start) // segment_len
        near = window_size is not None and j > i - window_size
        return j >= start and (same or near)

    later = range(position, position + 12)
    seen = [j for j in range(position) for s in starts for i in later if sees(s, i, j)]
    assert first.min() == min(seen, default=position)
