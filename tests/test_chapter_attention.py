"""Chapter attention: its definition against loops, identities, and what it refuses."""

import pytest
import torch
from chapter_factories import attend_by_loops, make_chapter_inputs

from memattn import chapter_attention
from memattn.reference.chapter_quantization import dequantize_rows, quantize_rows
from memattn.testing import run_with_gradients

COMBINE = ("joint", "independent")


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


# form -> rows, options, and the routing row of each of 11 tokens of two sequences (None: absent)
FORMS = {
    "sequence": (None, {}, [[0] * 11, [0] * 11]),
    "token": (11, {}, [list(range(11))] * 2),
    "block": (3, dict(routing_block=4), [[t // 4 for t in range(11)]] * 2),
    "offset": (
        4,
        dict(routing_block=4, query_offset=6),
        [[(6 + t) // 4 - 1 for t in range(11)]] * 2,
    ),
    "sequence-padded": (
        None,
        dict(seq_start=int32(2, 0), seq_end=int32(11, 7)),
        [[None] * 2 + [0] * 9, [0] * 7 + [None] * 4],
    ),
    "token-padded": (
        11,
        dict(seq_start=int32(2, 0), seq_end=int32(11, 7)),
        [[None] * 2 + list(range(2, 11)), list(range(7)) + [None] * 4],
    ),
    "block-padded": (
        4,
        dict(routing_block=3, seq_start=int32(2, 0), seq_end=int32(11, 7)),
        [
            [None] * 2 + [(t - 2) // 3 for t in range(2, 11)],
            [t // 3 for t in range(7)] + [None] * 4,
        ],
    ),
    "block-padded-offset": (
        4,
        dict(routing_block=4, query_offset=6, seq_start=int32(3, 8), seq_end=int32(17, 12)),
        [[(3 + t) // 4 for t in range(11)], [None] * 2 + [0] * 4 + [None] * 5],
    ),
    "documents": (
        5,
        dict(routing_block=3, cu_seqlens=int32(0, 4, 4, 9, 11)),
        [[0, 0, 0, 1, 2, 2, 2, 3, 3, 4, 4]],
    ),
    "documents-offset": (
        5,
        dict(routing_block=3, cu_seqlens=int32(0, 4, 4, 9, 16), query_offset=5),
        [[0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 4]],
    ),
}


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_definition_is_that_of_loops(form, weighted, combine):
    n_rows, options, rows = FORMS[form]
    tensors, slots = make_chapter_inputs(
        B=len(rows),
        T=11,
        D=6,
        Dv=4,
        N=n_rows,
        weights=weighted,
        empty=True,
        repeats=True,
        dtype=torch.float64,
    )
    actual = chapter_attention(**tensors, **slots, **options, combine=combine)
    indices = slots["chapter_indices"].view(len(rows), -1, 3)
    weights = tensors.get("chapter_weights", torch.ones_like(indices)).view(indices.shape)
    lists = [
        [
            []
            if row is None
            else list(zip(indices[b, row].tolist(), weights[b, row].tolist(), strict=True))
            for row in of_sequence
        ]
        for b, of_sequence in enumerate(rows)
    ]
    bank = tensors["query"], tensors["chapter_key"], tensors["chapter_value"]
    out, lse = attend_by_loops(*bank, lists, combine, 6**-0.5)
    torch.testing.assert_close(actual.out, out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual.lse, lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize(("n_rows", "options"), [(None, {}), (2, dict(routing_block=3)), (5, {})])
def test_gradients_of_the_definition(n_rows, options, combine):
    tensors, slots = make_chapter_inputs(
        **dict(B=2, H=2, Hkv=1, T=5, D=3, Dv=2, C=4, M=2, K=3, N=n_rows),
        repeats=True,
        dtype=torch.float64,
    )
    names = list(tensors)

    def call(*values):
        given = dict(zip(names, values, strict=True))
        return tuple(chapter_attention(**given, **slots, **options, combine=combine))

    inputs = [t.requires_grad_() for t in tensors.values()]
    assert torch.autograd.gradcheck(call, inputs)


def test_empty_slots_have_no_gradient_and_absent_queries_may_hold_anything():
    tensors, slots = make_chapter_inputs(N=37, empty=True, dtype=torch.float64)
    slots["chapter_indices"][0, 3] = -1
    tensors["query"][0, :, 3] = torch.nan
    found = run_with_gradients(chapter_attention, tensors, slots)
    filled = (slots["chapter_indices"] >= 0) & (tensors["chapter_weights"] > 0)
    assert not found["d_chapter_weights"][~filled].any()
    assert found["d_chapter_weights"][filled].all()
    assert not found["out"][0, :, 3].any() and not found["d_query"][0, :, 3].any()
    assert (found["lse"][0, :, 3] == -torch.inf).all()
    assert all(t.isfinite().all() for name, t in found.items() if name != "lse")


@pytest.mark.parametrize("combine", COMBINE)
def test_nan_in_a_chapter_that_a_sequence_did_not_select(combine):
    tensors, slots = make_chapter_inputs(N=37, dtype=torch.float64)
    slots["chapter_indices"][0] = slots["chapter_indices"][0] % 3
    slots["chapter_indices"][1] = slots["chapter_indices"][1] % 2
    options = dict(slots, combine=combine)
    expected = run_with_gradients(chapter_attention, tensors, options)
    for name in ("chapter_key", "chapter_value"):
        tensors[name][3:] = torch.nan  # nobody's
    found = run_with_gradients(chapter_attention, tensors, options)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    for name in ("chapter_key", "chapter_value"):
        tensors[name][2] = torch.nan  # the first sequence's
    found = run_with_gradients(chapter_attention, tensors, options)
    assert torch.equal(found["out"][1], expected["out"][1])
    assert torch.equal(found["d_query"][1], expected["d_query"][1])


def test_all_chapters_are_attention_to_the_whole_bank():
    tensors, _ = make_chapter_inputs(weights=False, dtype=torch.float64)
    indices = torch.arange(7, dtype=torch.int32).flip(0).expand(2, 7)
    out = chapter_attention(**tensors, chapter_indices=indices).out
    key, value = (
        tensors[name].transpose(0, 1).flatten(1, 2).repeat_interleave(2, 0).expand(2, -1, -1, -1)
        for name in ("chapter_key", "chapter_value")
    )
    expected = torch.nn.functional.scaled_dot_product_attention(tensors["query"], key, value)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("combine", COMBINE)
def test_repeats_are_the_sum_of_weights(combine):
    tensors, _ = make_chapter_inputs(K=3, dtype=torch.float64)
    twice = dict(chapter_indices=int32([4, 1, 4], [2, 2, 2]), combine=combine)
    weights = torch.tensor([[0.5, 1.0, 0.25], [0.5, 0.25, 2.0]], dtype=torch.float64)
    once = dict(chapter_indices=int32([4, 1], [2, -1]), combine=combine)
    summed = torch.tensor([[0.75, 1.0], [2.75, 1.0]], dtype=torch.float64)
    a = chapter_attention(**tensors | {"chapter_weights": weights}, **twice)
    b = chapter_attention(**tensors | {"chapter_weights": summed}, **once)
    torch.testing.assert_close(a.out, b.out, rtol=1e-12, atol=1e-12)
    same_lse = torch.allclose(a.lse, b.lse, rtol=1e-12)
    assert same_lse == (combine == "joint")  # where weights do not enter, every slot counts


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_rows(bits):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1000, 64, generator=generator)
    rows[7] = 0.0
    codes, scale = quantize_rows(rows, bits)
    assert codes.shape == ((1000, 64) if bits == 8 else (1000, 32))
    back = dequantize_rows(codes, scale, torch.float32)
    largest = 127 if bits == 8 else 7
    assert torch.equal(scale, (rows.abs().amax(-1) / largest).clamp(min=1e-8))
    assert ((back - rows).abs() <= 0.5 * scale[:, None] * (1 + 1e-6)).all()
    error = (back - rows).square().mean().sqrt() / rows.square().mean().sqrt()
    assert abs(float(error) - (0.0059 if bits == 8 else 0.107)) < (2e-4 if bits == 8 else 2e-3)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_bank_is_the_bank_of_its_values(bits):
    tensors, slots = make_chapter_inputs(N=37, dtype=torch.float64)
    quantised, plain = dict(tensors), dict(tensors)
    for name in ("key", "value"):
        codes, scale = quantize_rows(tensors[f"chapter_{name}"], bits)
        quantised |= {f"chapter_{name}": codes, f"{name}_scale": scale}
        plain[f"chapter_{name}"] = dequantize_rows(codes, scale, torch.float64)
    assert torch.equal(
        chapter_attention(**quantised, **slots).out, chapter_attention(**plain, **slots).out
    )


WRONG = {
    "chapter_indices must be from -1 to C - 1 = 6, got 7": dict(
        chapter_indices=int32([7, 0, 0], [0, 0, 0])
    ),
    "chapter_indices must be from -1 to C - 1 = 6, got -2": dict(
        chapter_indices=int32([-2, 0, 0], [0, 0, 0])
    ),
    "chapter_indices must have dtype": dict(chapter_indices=torch.zeros(2, 3)),
    "chapter_indices must have shape [B=2, K]": dict(chapter_indices=int32([0])),
    "chapter_indices must have 2 or 3 axes": dict(chapter_indices=int32(0, 0)),
    "chapter_weights must have shape [B=2, K=1]": dict(chapter_indices=int32([0], [0])),
    "chapter_key must have a number of heads": dict(chapter_key=torch.zeros(7, 3, 5, 16)),
    "chapter_key must have shape": dict(chapter_key=torch.zeros(7, 2, 5, 8)),
    "chapter_value must have shape": dict(chapter_value=torch.zeros(6, 2, 5, 16)),
    "chapter_value must have the dtype": dict(chapter_value=torch.zeros(7, 2, 5, 16).half()),
    "combine must be one of": dict(combine="sum"),
    "routing_block must be None": dict(routing_block=4),
    "value_scale must be given together": dict(key_scale=torch.ones(7, 2, 5)),
    "chapter_key must have dtype int8": dict(
        key_scale=torch.ones(7, 2, 5), value_scale=torch.ones(7, 2, 5)
    ),
    "scale must be positive": dict(scale=0.0),
    "backend must be one of": dict(backend="cuda"),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_input(message):
    tensors, slots = make_chapter_inputs()
    with pytest.raises((ValueError, TypeError)) as error:
        chapter_attention(**{**tensors, **slots, **WRONG[message]})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("n_rows", "options"),
    [
        (9, dict(routing_block=4)),
        (11, dict(routing_block=4)),
        (9, dict(routing_block=4, seq_end=int32(37, 37))),
        (11, dict(routing_block=4, query_offset=3)),
    ],
)
def test_rows_must_fit_the_blocks(n_rows, options):
    tensors, slots = make_chapter_inputs(N=n_rows)
    with pytest.raises(ValueError, match="chapter_indices must have"):
        chapter_attention(**tensors, **slots, **options)
