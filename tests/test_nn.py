"""Modules: shapes, what they compute, gradients, and that they are usable alone."""

import math

import pytest
import torch

from memattn.nn import (
    GELUMLP,
    RotaryEmbedding,
    SegmentedAttention,
    SwiGLU,
    apply_rotary,
    sequence_positions,
)

E = 32


def make_attention(**options):
    torch.manual_seed(0)
    return SegmentedAttention(E, 4, **options).double()


def make_hidden(B=2, T=23):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, T, E, generator=generator, dtype=torch.float64)


def plain_attention(module, hidden):
    """The same layer from a dense mask and torch's softmax, query by query."""
    B, T, _ = hidden.shape
    q, k, v = (
        proj(hidden).view(B, T, -1, module.head_dim).transpose(1, 2)
        for proj in (module.q_proj, module.k_proj, module.v_proj)
    )
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    out = torch.zeros_like(q)
    for i in range(T):
        near = [
            j
            for j in range(i + 1)
            if (module.segment_len is None and module.window_size is None)
            or (
                module.segment_len is not None
                and i // module.segment_len == j // module.segment_len
            )
            or (module.window_size is not None and j > i - module.window_size)
        ]
        keys, values = k[:, :, near], v[:, :, near]
        if module.persistent_key is not None:
            many = [t.repeat_interleave(repeats, 0).expand(B, -1, -1, -1)
                    for t in (module.persistent_key, module.persistent_value)]  # fmt: skip
            keys, values = torch.cat([keys, many[0]], 2), torch.cat([values, many[1]], 2)
        scores = q[:, :, i : i + 1] @ keys.mT / math.sqrt(module.head_dim)
        if module.softcap is not None:
            scores = module.softcap * torch.tanh(scores / module.softcap)
        out[:, :, i : i + 1] = scores.softmax(-1) @ values
    return module.o_proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(num_kv_heads=2, segment_len=5),
        dict(num_kv_heads=1, window_size=4, num_persistent_tokens=3),
        dict(head_dim=6, segment_len=7, window_size=3, num_persistent_tokens=1),
        dict(num_kv_heads=2, window_size=4, num_persistent_tokens=3, softcap=0.3),
    ],
    ids=str,
)
def test_attention_matches_its_definition(options):
    attention, hidden = make_attention(**options), make_hidden()
    torch.testing.assert_close(
        attention(hidden), plain_attention(attention, hidden), rtol=0, atol=1e-14
    )


def test_attention_example_in_its_docstring():
    attention = SegmentedAttention(hidden_size=64, num_heads=4, segment_len=16)
    x = torch.randn(2, 50, 64)
    assert attention(x).shape == (2, 50, 64)
    rotary = RotaryEmbedding(attention.head_dim)
    rotated = attention(x, rotary=rotary(sequence_positions(x)))
    assert rotated.shape == (2, 50, 64)
    assert not torch.equal(rotated, attention(x))


def test_every_parameter_receives_a_gradient():
    attention = make_attention(num_kv_heads=2, segment_len=5, num_persistent_tokens=3)
    attention(make_hidden()).square().sum().backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).all(), name


def test_persistent_tokens_start_small():
    attention = make_attention(num_persistent_tokens=4)
    scale = attention.persistent_value.square().mean().sqrt().item()
    assert scale < 0.1 * attention.v_proj(make_hidden()).square().mean().sqrt().item()


def test_packed_documents_equal_separate_ones():
    attention, rotary = make_attention(segment_len=5, window_size=3), RotaryEmbedding(8)
    hidden = make_hidden(B=1)
    cu_seqlens = torch.tensor([0, 4, 4, 16, 23], dtype=torch.int32)
    positions = sequence_positions(hidden, cu_seqlens=cu_seqlens)
    packed = attention(hidden, rotary=rotary(positions, hidden.dtype), cu_seqlens=cu_seqlens)
    for part, expected in zip(
        hidden.split([4, 12, 7], 1), packed.split([4, 12, 7], 1), strict=True
    ):
        positions = sequence_positions(part)
        alone = attention(part, rotary=rotary(positions, part.dtype))
        torch.testing.assert_close(alone, expected, rtol=0, atol=1e-14)


def test_positions_count_from_the_start_of_a_sequence():
    hidden = torch.empty(2, 5, E)
    start = torch.tensor([0, 2], dtype=torch.int32)
    assert sequence_positions(hidden, seq_start=start).tolist() == [
        [0, 1, 2, 3, 4],
        [-2, -1, 0, 1, 2],
    ]
    cu_seqlens = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    assert sequence_positions(hidden[:1], cu_seqlens=cu_seqlens).tolist() == [[0, 1, 0, 1, 2]]
    assert sequence_positions(hidden, offset=7).tolist() == [[7, 8, 9, 10, 11]]


def test_rotary_keeps_norms_and_depends_on_distance_only():
    rotary = RotaryEmbedding(8, theta=100.0)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator, dtype=torch.float64)

    def score(i, j):
        rotated = [
            apply_rotary(states, *rotary(torch.tensor([[position]]), torch.float64))
            for states, position in ((q, i), (k, j))
        ]
        torch.testing.assert_close(rotated[0].norm(), q.norm())
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100), rtol=0, atol=1e-12)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3
    # the first pair turns by one radian per position
    turned = apply_rotary(q, *rotary(torch.tensor([[1]]), torch.float64))[0, 0, 0]
    x, y = q[0, 0, 0, 0], q[0, 0, 0, 4]
    torch.testing.assert_close(turned[0], x * math.cos(1) - y * math.sin(1))
    torch.testing.assert_close(turned[4], y * math.cos(1) + x * math.sin(1))


def test_rotary_of_a_bfloat16_module_is_not_rounded():
    positions = torch.arange(1000, 1010)[None]
    cos, _ = RotaryEmbedding(8).to(torch.bfloat16)(positions, torch.bfloat16)
    assert torch.equal(cos, RotaryEmbedding(8)(positions)[0])
    states = torch.ones(1, 1, 10, 8, dtype=torch.bfloat16)
    assert apply_rotary(states, cos, cos).dtype == torch.bfloat16


def test_swiglu():
    mlp = SwiGLU(8, 12).double()
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gate = x @ mlp.gate_proj.weight.T
    expected = (gate * gate.sigmoid() * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(x), expected)


def test_gelu_mlp():
    mlp = GELUMLP(8, 12).double()
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inner = x @ mlp.up_proj.weight.T
    expected = (inner * (1 + torch.erf(inner / math.sqrt(2))) / 2) @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SegmentedAttention(30, 4), "hidden_size must be divisible by num_heads=4, got 30"),
        (lambda: SegmentedAttention(E, 4, num_kv_heads=3), "num_kv_heads must divide num_heads=4"),
        (lambda: SegmentedAttention(E, 4, segment_len=0), "segment_len must be at least 1, got 0"),
        (lambda: SegmentedAttention(E, 4, window_size=0), "window_size must be at least 1, got 0"),
        (
            lambda: SegmentedAttention(E, 4, num_persistent_tokens=-1),
            "num_persistent_tokens must be at least 0, got -1",
        ),
        (lambda: SegmentedAttention(E, 4, softcap=0.0), "softcap must be positive and finite, got"),
        (
            lambda: SegmentedAttention(E, 4, backend="gpu")(torch.zeros(1, 2, E)),
            "backend must be one of auto, triton, cpp, reference, got 'gpu'",
        ),
        (lambda: SegmentedAttention(E, 4)(torch.zeros(2, E)), "hidden_states must have 3 axes"),
        (lambda: RotaryEmbedding(7), "head_dim must be even, got 7"),
        (lambda: RotaryEmbedding(8, theta=0.0), "theta must be positive, got 0.0"),
        (lambda: SwiGLU(8, 0), "intermediate_size must be at least 1, got 0"),
        (lambda: GELUMLP(0, 8), "hidden_size must be at least 1, got 0"),
    ],
)
def test_error_messages(make, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        make()


def test_sizes_must_be_integers():
    with pytest.raises(TypeError, match="hidden_size must be an integer, got float"):
        SegmentedAttention(32.0, 4)
