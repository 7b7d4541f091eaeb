"""FutureAttention: what it computes, its sources of future keys, its loss, leaks and states."""

import pytest
import torch
from future_factories import (
    F_DIM,
    N_CTX,
    E,
    make_attention,
    make_hidden,
    plain_attention,
    run,
    turn,
)
from torch.nn import functional as F

from memattn.nn import (
    FutureAttention,
    RotaryEmbedding,
    SegmentedAttention,
    sequence_positions,
)
from memattn.ops import future_attention
from memattn.parts import PartState

KEY_SOURCES = ["table", "relative", "computed"]


@pytest.fixture(params=KEY_SOURCES)
def source(request):
    return request.param


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("rope", [False, True], ids=["plain", "rope"])
def test_attention_and_loss_match_their_definition(source, rope, num_kv_heads):
    for loss_type, T in (("mse", N_CTX), ("cosine", 17)):
        attention = make_attention(source, num_kv_heads=num_kv_heads, loss_type=loss_type)
        hidden = make_hidden(T=T)
        out, loss = run(attention, hidden, rope=rope)
        expected, pairs = zip(
            *(plain_attention(attention, x, rope=rope) for x in hidden), strict=True
        )
        torch.testing.assert_close(out, torch.stack(expected), rtol=0, atol=1e-13)
        future, target = (torch.stack(t) for t in zip(*sum(pairs, []), strict=True))
        rows = (future - target).square()
        if loss_type == "cosine":
            rows = (1 - F.cosine_similarity(future, target, dim=-1)) / 2
        torch.testing.assert_close(loss, rows.mean(), rtol=1e-12, atol=0)


def test_example_in_the_docstring():
    attention = FutureAttention(64, 4, future_dim=8, num_positions=100, loss_type="mse")
    x = torch.randn(2, 50, 64)
    hidden_states, loss = attention(x)
    assert hidden_states.shape == (2, 50, 64) and loss.shape == ()
    rotary = RotaryEmbedding(attention.head_dim)
    rotary_angles = rotary(sequence_positions(x)), rotary(attention.future_positions(x))
    rotated = attention(x, rotary=rotary_angles[0], future_rotary=rotary_angles[1]).hidden_states
    assert rotated.shape == (2, 50, 64) and not torch.equal(rotated, hidden_states)


@pytest.mark.parametrize("rope", [False, True], ids=["plain", "rope"])
def test_later_tokens_do_not_change_earlier_outputs(source, rope):
    attention = make_attention(source, num_kv_heads=2)
    hidden = make_hidden()
    out = run(attention, hidden, rope=rope).hidden_states
    for cut in range(1, N_CTX):
        other = hidden.clone()
        other[:, cut:] = make_hidden(seed=cut)[:, cut:]
        changed = run(attention, other, rope=rope).hidden_states
        assert torch.equal(out[:, :cut], changed[:, :cut]), cut
        assert not torch.equal(out[:, cut], changed[:, cut]), cut


def test_each_row_takes_the_first_token_that_may_see_it():
    """A source one token later would show the first query of a band its future."""
    attention = make_attention("computed")
    hidden = make_hidden(B=1).requires_grad_()
    latent = attention.future.latent(hidden)
    rows = attention.future(N_CTX - 1, latent=latent)
    for p in range(1, N_CTX):
        (gradient,) = torch.autograd.grad(
            rows.key[0, :, p - 1].sum(), hidden, retain_graph=True, allow_unused=True
        )
        used = gradient[0].any(-1).nonzero()[:, 0].tolist()
        assert used == ([p - F_DIM] if p >= F_DIM else [])


def test_prefixes_give_equal_outputs_in_training_and_evaluation(source):
    attention = make_attention(source, loss_type="mse")
    hidden = make_hidden()
    whole = run(attention, hidden).hidden_states
    for training in (True, False):
        attention.train(training)
        for T in (1, 2, F_DIM, F_DIM + 1, N_CTX - 1):
            part, loss = run(attention, hidden[:, :T])
            torch.testing.assert_close(part, whole[:, :T], rtol=0, atol=1e-14)
            assert (loss is not None) == training
            # with fewer tokens than a band, no position has all of its real keys
            assert loss is None or (loss > 0) == (T > F_DIM)


def test_weightless_rows_leave_causal_attention(source):
    attention = make_attention(source, num_kv_heads=2)
    causal = SegmentedAttention(E, 4, num_kv_heads=2).double()
    with torch.no_grad():
        attention.q_proj.weight[:, 0] = 0.0
        attention.q_proj.weight[::8] = 0.0
        attention.q_proj.weight[::8, 0] = 1.0  # the first feature of each head is that of the input
        for parameter in attention.future.parameters():
            parameter.zero_()
        attention.future.key[..., 0] = -1e6
    causal.load_state_dict(attention.state_dict(), strict=False)
    hidden = make_hidden()
    hidden[..., 0] = 1.0
    out = run(attention, hidden, rope=False).hidden_states
    assert torch.equal(out, causal(hidden))


@pytest.mark.parametrize("loss_type", ["mse", "cosine"])
def test_a_table_of_the_real_keys_has_no_loss(loss_type):
    attention = make_attention(loss_type=loss_type)
    hidden = make_hidden(B=1)
    _, key, value = attention.split_heads(hidden)  # before rotation, like the table
    with torch.no_grad():
        attention.future.key.copy_(key[0, :, 1:])
        attention.future.value.copy_(value[0, :, 1:])
    out, loss = run(attention, hidden)
    assert abs(loss) < 1e-15
    i = torch.arange(N_CTX)
    query, key, value = attention.split_heads(hidden)
    query, key = (turn(t[0], i.tolist(), True)[None] for t in (query, key))
    banded = F.scaled_dot_product_attention(query, key, value, i[None] <= i[:, None] + F_DIM)
    torch.testing.assert_close(out, attention.merge_heads(banded), rtol=0, atol=1e-13)


def test_rows_that_no_query_sees_are_cut_without_effect(monkeypatch):
    attention = make_attention("computed", loss_type="mse")
    hidden = make_hidden(T=9)
    assert attention.future.num_rows(9) == 8 + F_DIM
    cut = run(attention, hidden, rope=False)
    monkeypatch.setattr(attention.future, "num_rows", lambda length: N_CTX - 1)
    whole = run(attention, hidden, rope=False)
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-14)


def test_future_keys_start_small(source):
    attention = FutureAttention(E, 4, source=source, future_dim=F_DIM, num_positions=N_CTX)
    hidden = make_hidden().float()
    latent = attention.future.latent(hidden)
    rows = attention.future(attention.future.num_rows(N_CTX), latent=latent)
    scale = attention.k_proj(hidden).square().mean().sqrt().item()
    for table in rows:
        assert 0 < table.square().mean().sqrt().item() < 0.1 * scale


def test_every_parameter_receives_a_gradient(source):
    attention = make_attention(source, num_kv_heads=2)
    run(attention, make_hidden()).hidden_states.square().sum().backward()
    for name, parameter in attention.named_parameters():
        assert (parameter.grad != 0).all(), name


def test_gradients_are_those_of_finite_differences(source):
    attention = make_attention(source, num_kv_heads=2, loss_type="mse", detach_target=False)
    hidden = make_hidden(B=1, T=9)
    names, parameters = zip(*attention.named_parameters(), strict=True)
    direction = [torch.randn_like(p) for p in parameters]

    def value(step):
        moved = {n: p + step * d for n, p, d in zip(names, parameters, direction, strict=True)}
        out, loss = torch.func.functional_call(attention, moved, (hidden,))
        return out.sin().sum() + loss

    slope = sum(
        (g * d).sum()
        for g, d in zip(torch.autograd.grad(value(0.0), parameters), direction, strict=True)
    )
    difference = (value(1e-6) - value(-1e-6)) / 2e-6
    torch.testing.assert_close(slope, difference, rtol=1e-7, atol=0)


@pytest.mark.parametrize("detach_target", [True, False])
def test_only_a_target_that_is_not_detached_trains_the_real_values(source, detach_target):
    attention = make_attention(source, loss_type="cosine", detach_target=detach_target)
    run(attention, make_hidden()).loss.backward()
    assert attention.future.value.grad.any()
    values = attention.v_proj.weight.grad
    assert (values is not None and bool(values.any())) != detach_target


def test_packed_documents_equal_separate_ones(source):
    attention = make_attention(source, loss_type="mse")
    hidden = make_hidden(B=1, T=40)  # more than a sequence may have
    sizes = [7, 0, N_CTX, 9]
    cu_seqlens = torch.tensor([0, 7, 7, 31, 40], dtype=torch.int32)
    packed, loss = run(attention, hidden, cu_seqlens=cu_seqlens)
    parts = [run(attention, part) for part in hidden.split(sizes, 1) if part.shape[1]]
    alone = torch.cat([part.hidden_states for part in parts], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-13)
    # positions with all of their real keys: without those whose band is cut by the table's end
    counts = [max(T - (1 if T == N_CTX and source != "relative" else F_DIM), 0)
              for T in sizes if T]  # fmt: skip
    mean = sum(n * part.loss for n, part in zip(counts, parts, strict=True)) / sum(counts)
    torch.testing.assert_close(loss, mean, rtol=1e-12, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(source, side):
    attention = make_attention(source)
    hidden, lengths = make_hidden(B=3), [N_CTX, 13, 2]
    first = [0 if side == "right" else N_CTX - n for n in lengths]
    bounds = dict(
        seq_start=torch.tensor(first, dtype=torch.int32),
        seq_end=torch.tensor([a + n for a, n in zip(first, lengths, strict=True)]).int(),
    )
    out = run(attention, hidden, **bounds).hidden_states
    for b, (start, n) in enumerate(zip(first, lengths, strict=True)):
        alone = run(attention, hidden[b : b + 1, start : start + n]).hidden_states[0]
        torch.testing.assert_close(out[b, start : start + n], alone, rtol=0, atol=1e-13)
        filled = hidden.clone()
        filled[b, :start], filled[b, start + n :] = torch.nan, 1e6
        again = run(attention, filled, **bounds).hidden_states
        assert torch.equal(again[b, start : start + n], out[b, start : start + n])


def test_pieces_with_a_cache_equal_one_pass(source):
    attention = make_attention(source, num_kv_heads=2).eval()
    hidden = make_hidden()
    whole = run(attention, hidden).hidden_states
    cache, offset, parts = PartState("future"), 0, []
    cache.keep = N_CTX
    for piece in hidden.split([1, 9, 1, 1, 8, 3, 1], 1):
        parts.append(run(attention, piece, offset=offset, cache=cache).hidden_states)
        offset += piece.shape[1]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-13)
    assert ("latent" in cache.tokens) == (source == "computed")


def test_decoding_makes_only_the_rows_that_are_seen():
    attention = make_attention("computed").eval()
    hidden, lengths = make_hidden(T=12), []
    cache = PartState("future")
    cache.keep = N_CTX
    hook = attention.future.key_proj.register_forward_hook(
        lambda module, args, out: lengths.append(out.shape[1])
    )
    run(attention, hidden[:, :11], cache=cache)
    run(attention, hidden[:, 11:], cache=cache, offset=11)
    hook.remove()
    assert lengths == [10 + F_DIM, F_DIM]


def test_relative_keys_reach_beyond_any_length():
    attention = make_attention("relative", num_positions=2)
    out = run(attention, make_hidden(T=50)).hidden_states
    assert out.shape == (2, 50, E)
    # with equal tokens and no rotation, all that a query knows of its place is its past
    same = make_hidden(T=1).expand(-1, 50, -1)
    out = run(attention, same, rope=False).hidden_states
    assert not torch.allclose(out[:, 0], out[:, -1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_and_autocast(source, dtype):
    attention = make_attention(source, loss_type="mse", num_kv_heads=2).float()
    hidden = make_hidden().float()
    exact = run(attention, hidden).hidden_states
    with torch.autocast("cpu", dtype):
        out, loss = run(attention, hidden)
    assert loss.dtype == torch.float32
    loss.backward()
    assert attention.future.key.grad.any()
    low = run(attention.to(dtype), hidden.to(dtype)).hidden_states
    assert low.dtype == dtype
    for result in (out, low):
        error = (result.float() - exact).norm() / exact.norm()
        assert error < 8 * torch.finfo(dtype).eps


def test_the_operator_is_called_with_queries_that_fit_the_rows():
    """Rows by distance meet the unrotated query, and give the angle between two positions."""
    attention = make_attention("relative")
    hidden = make_hidden(B=1)
    query, key, value = attention.split_heads(hidden)
    positions = list(range(N_CTX))
    i = 11
    rows = turn(attention.future.key, list(range(i + 1, i + F_DIM + 1)), True)
    rotated, key = (turn(t[0], positions, True)[None] for t in (query, key))
    expected = future_attention(
        *(rotated[:, :, i : i + 1], key[:, :, : i + 1], value[:, :, : i + 1]),
        *(rows, attention.future.value),
        future_dim=F_DIM, future_index="distance", query_offset=i,
    ).out  # fmt: skip
    actual = run(attention, hidden).hidden_states[:, i : i + 1]
    torch.testing.assert_close(actual, attention.merge_heads(expected), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(future_dim=0), "future_dim must be at least 1, got 0"),
        (dict(future_dim=24), "future_dim must be at most num_positions - 1 = 23, got 24"),
        (dict(num_positions=1), "num_positions must be at least 2, got 1"),
        (dict(source="tokens"), "source must be one of table, relative, computed, got 'tokens'"),
        (dict(source="computed", source_rank=0), "rank must be at least 1, got 0"),
        (dict(source="relative", future_dim=0), "future_dim must be at least 1, got 0"),
        (dict(loss_type="l1"), "loss_type must be None or one of mse, cosine, got 'l1'"),
        (dict(num_kv_heads=3), "num_kv_heads must divide num_heads=4, got 3"),
    ],
    ids=str,
)
def test_error_messages(options, message):
    with pytest.raises(ValueError, match=message):
        FutureAttention(E, 4, **dict(future_dim=F_DIM, num_positions=N_CTX) | options)


def test_bad_calls_name_the_argument():
    attention, hidden = make_attention(), make_hidden(T=N_CTX + 1)
    with pytest.raises(ValueError, match="query_offset must be such that query_offset"):
        run(attention, hidden)
    hidden = hidden[:, :N_CTX]
    rotary = RotaryEmbedding(8)(sequence_positions(hidden), hidden.dtype)
    with pytest.raises(ValueError, match="future_rotary must be given together with rotary"):
        attention(hidden, rotary=rotary)
    few = tuple(t[:, :, :7] for t in rotary)
    with pytest.raises(ValueError, match="future_rotary must have a row for each of 23 positions"):
        attention(hidden, rotary=rotary, future_rotary=few)
    with pytest.raises(TypeError, match="detach_target must be True or False, got int"):
        make_attention(detach_target=1)
