"""Cross-attention to a memory bank: shapes, zero start, and identities of selections."""

import pytest
import torch
from torch.nn import functional as F

from memattn.nn import MemoryCrossAttention, StandardMemoryBank
from memattn.nn.chapter_memory import selected_union

EXACT = dict(rtol=0, atol=1e-13)
ALL = torch.arange(4)


def make(**options):
    torch.manual_seed(0)
    bank = StandardMemoryBank(24, 10, num_chapters=4, init_std=1.0).double()
    options = {"num_heads": 4, "zero_output": False, **options}
    attention = MemoryCrossAttention(16, 10, **options).double()
    return attention, bank, torch.randn(2, 9, 16, dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(num_kv_heads=2),
        dict(inner_size=8),
        dict(projection_rank=3),
        dict(combine="independent", num_kv_heads=1),
    ],
    ids=str,
)
def test_output_has_the_shape_of_the_input(options):
    attention, bank, x = make(**options)
    out = attention(x, bank, torch.tensor([[0, 2], [3, -1]]))
    assert out.shape == x.shape and out.isfinite().all()


@pytest.mark.parametrize("rank", [None, 3])
def test_zero_output_projection_gives_zero(rank):
    attention, bank, x = make(zero_output=True, projection_rank=rank)
    assert not attention(x, bank, ALL.expand(2, 4)).any()


@pytest.mark.parametrize("combine", ["joint", "independent"])
def test_attention_weights_sum_to_one(combine):
    """Values of ones come back as they are."""
    attention, bank, x = make(combine=combine)
    weights = torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64)
    projected = attention.project(bank)
    projected = projected._replace(value=torch.ones_like(projected.value))
    indices = torch.tensor([[0, 2], [3, 1]])
    out = attention(x, bank, indices, weights, projected=projected)
    ones = torch.ones(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(out, attention.o_proj(ones), **EXACT)


def whole_bank(attention, bank, x):
    """Attention to all rows, as PyTorch computes it."""
    heads = lambda y: y.unflatten(-1, (-1, attention.head_dim)).transpose(-3, -2)
    key, value = (
        heads(p(bank().flatten(0, 1)))[None] for p in (attention.k_proj, attention.v_proj)
    )
    out = F.scaled_dot_product_attention(
        heads(attention.q_proj(x)), key.expand(len(x), -1, -1, -1), value.expand(len(x), -1, -1, -1)
    )
    return attention.o_proj(out.transpose(1, 2).flatten(2))


def test_all_chapters_are_the_whole_bank():
    attention, bank, x = make()
    expected = whole_bank(attention, bank, x)
    ones = torch.ones(2, 4, dtype=torch.float64)
    for weights in (None, ones):
        actual = attention(x, bank, ALL.expand(2, 4), weights)
        torch.testing.assert_close(actual, expected, **EXACT)


def test_one_chapter_is_attention_to_it():
    attention, bank, x = make()
    alone = StandardMemoryBank(6, 10).double()
    alone.load_state_dict({"rows": bank()[2]})
    actual = attention(x, bank, torch.tensor([[2], [2]]))
    torch.testing.assert_close(actual, whole_bank(attention, alone, x), **EXACT)


@pytest.mark.parametrize("combine", ["joint", "independent"])
def test_order_repeats_and_permutations(combine):
    attention, bank, x = make(combine=combine)
    w = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).expand(2, 3)
    out = attention(x, bank, torch.tensor([[0, 2, 3]]).expand(2, 3), w)
    turned = attention(x, bank, torch.tensor([[3, 0, 2]]).expand(2, 3), w[:, [2, 0, 1]])
    assert torch.equal(turned, out)
    split = torch.tensor([[0.1, 0.3, 0.2, 0.4]], dtype=torch.float64).expand(2, 4)
    repeated = attention(x, bank, torch.tensor([[0, 2, 3, 0]]).expand(2, 4), split)
    torch.testing.assert_close(repeated, out, **EXACT)
    moved = StandardMemoryBank(24, 10, 4).double()
    moved.load_state_dict({"rows": bank(torch.tensor([3, 2, 1, 0])).flatten(0, 1)})
    swapped = attention(x, moved, torch.tensor([[3, 1, 0]]).expand(2, 3), w)
    torch.testing.assert_close(swapped, out, **EXACT)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_read_as_training_sees_them(bits):
    attention, bank, x = make(kv_bits=bits)
    indices = ALL.expand(2, 4)
    trained = attention(x, bank, indices)
    with torch.no_grad():
        read = attention(x, bank, indices)
        assert attention.project(bank).key.dtype == {8: torch.int8, 4: torch.uint8}[bits]
    torch.testing.assert_close(read, trained, **EXACT)
    trained.sum().backward()
    assert attention.k_proj.weight.grad.any() and bank.rows.grad.any()


def test_the_union_has_a_fixed_size():
    indices = torch.tensor([[5, -1, 2], [2, 9, 5]])
    chapters, mapped = selected_union(indices, 20)
    assert chapters.shape == (6,) and chapters[:3].tolist() == [2, 5, 9]
    assert len(set(chapters.tolist())) == 6
    assert torch.equal(torch.where(mapped < 0, -1, chapters[mapped.long().clamp(min=0)]), indices)
    assert selected_union(indices, 6) == (None, indices)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_heads=3), "num_heads must divide inner_size=16, got 3"),
        (dict(num_kv_heads=3), "num_kv_heads must divide num_heads=4, got 3"),
        (dict(combine="both"), "combine must be one of joint, independent"),
        (dict(kv_bits=3), "kv_bits must be None or one of 8, 4"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
