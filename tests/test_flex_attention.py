"""Segmented attention by FlexAttention: its mask is that of the definition."""

import pytest
import torch

from memattn import segmented_attention
from memattn.models import MemAttnConfig, MemAttnForCausalLM
from memattn.testing import assert_within_budget

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
B, H, HKV, T, D, L = 2, 4, 2, 37, 16, 8
SEGMENTS = -(-T // L)


def inputs(seed: int = 0, batch: int = B) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    return dict(
        query=draw(batch, H, T, D), key=draw(batch, HKV, T, D), value=draw(batch, HKV, T, D)
    )


def memory(rows: int, segments: int = SEGMENTS, batch: int = B) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    draw = lambda: torch.randn(batch, HKV, segments, rows, D, generator=generator)
    return dict(memory_key=draw(), memory_value=draw())


def persistent(rows: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    draw = lambda: torch.randn(HKV, rows, D, generator=generator)
    return dict(persistent_key=draw(), persistent_value=draw())


int32 = lambda *values: torch.tensor(values, dtype=torch.int32)
CASES = {
    "causal": lambda: inputs(),
    "both directions": lambda: {**inputs(), "is_causal": False, "window_size": 5},
    "segments and window": lambda: {**inputs(), **persistent(), "segment_len": L, "window_size": 5},
    "sinks": lambda: {
        **inputs(),
        "window_size": 5,
        "num_sink_tokens": 3,
        "seq_start": int32(-2, 6),
    },
    "softcap": lambda: {**inputs(), **persistent(), "softcap": 0.7, "seq_start": int32(0, 6)},
    "causal memory": lambda: {
        **inputs(),
        **persistent(),
        **memory(L),
        "segment_len": L,
        "memory_is_causal": True,
        "seq_start": int32(0, 6),
        "seq_end": int32(30, 37),
    },
    "packed, with memory": lambda: {
        **inputs(batch=1),
        **memory(2, segments=7, batch=1),
        "segment_len": L,
        "cu_seqlens": int32(0, 11, 11, 37),
    },
    "decoding": lambda: {
        **inputs(),
        "query": inputs()["query"][:, :, -2:],
        "query_offset": T - 2,
        "window_size": 9,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_definition(case):
    options = CASES[case]()
    actual = segmented_attention(**options, backend="flex")
    low = segmented_attention(**options, backend="reference")
    double = {
        name: value.double()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in options.items()
    }
    high = segmented_attention(**double, backend="reference")
    for name in ("out", "lse"):
        assert_within_budget(name, getattr(actual, name), getattr(low, name), getattr(high, name))


def test_other_bounds_are_another_mask():
    options = inputs()
    seq_start = int32(0, 6)
    for seq_end in (int32(30, 37), int32(37, 20), int32(30, 37)):
        bounds = dict(seq_start=seq_start, seq_end=seq_end)
        actual, wanted = (
            segmented_attention(**options, **bounds, backend=name).out
            for name in ("flex", "reference")
        )
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("preset", ["vanilla", "titans"])
def test_models_run_on_it_and_name_what_the_cpu_lacks(preset):
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    make = getattr(MemAttnConfig, preset)
    torch.manual_seed(0)
    flex = MemAttnForCausalLM(make(**sizes, backend="flex")).eval().requires_grad_(False)
    plain = MemAttnForCausalLM(make(**sizes)).eval()
    plain.load_state_dict(flex.state_dict())
    ids = torch.randint(64, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(flex(ids, use_cache=False).logits, plain(ids).logits)
    with pytest.raises(NotImplementedError, match="query must have device cuda .* no backward"):
        flex.requires_grad_(True).train()(ids)
    with pytest.raises(ValueError, match="attention.backend must be one of auto, .*reference, got"):
        MemAttnConfig.future(**sizes, backend="flex")
