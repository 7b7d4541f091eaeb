"""segmented_attention: what holds without a reference, and what it refuses."""

import math
import re

import pytest
import torch
from operator_contract import DEVICE, EVERY, INSTRUCTION_SETS, needs_cpp

from memattn import segmented_attention
from memattn.bench.inputs import make_segmented_inputs
from memattn.ops import AttentionOutput
from memattn.testing import assert_results_within_budget, run_with_gradients

pytestmark = pytest.mark.operator


@pytest.mark.parametrize("backend", EVERY)
class TestProperties:
    """What must hold without a reference."""

    def run(self, backend, tensors, **options):
        return segmented_attention(**tensors, **options, backend=backend)

    def test_a_long_segment_or_window_is_causal(self, backend):
        tensors = make_segmented_inputs(T=37, device=DEVICE[backend])
        causal = self.run(backend, tensors)
        for options in (dict(segment_len=37), dict(window_size=37), dict(window_size=10**12)):
            assert torch.equal(self.run(backend, tensors, **options).out, causal.out)

    def test_is_scaled_dot_product_attention(self, backend):
        tensors = make_segmented_inputs(T=37, device=DEVICE[backend])
        key, value = (tensors[n].repeat_interleave(2, 1) for n in ("key", "value"))
        expected = torch.nn.functional.scaled_dot_product_attention(
            tensors["query"], key, value, is_causal=True
        )
        torch.testing.assert_close(self.run(backend, tensors).out, expected)

    def test_decoding_continues_the_pass(self, backend):
        options = dict(segment_len=8, window_size=4)
        tensors = make_segmented_inputs(T=21, P=2, device=DEVICE[backend])
        whole = self.run(backend, tensors, **options)
        last = {**tensors, "query": tensors["query"][:, :, 17:]}
        split = self.run(backend, last, query_offset=17, **options)
        torch.testing.assert_close(split.out, whole.out[:, :, 17:])
        # the keys before position 8 are out of reach of position 17 and later: drop them
        for name in ("key", "value"):
            last[name] = last[name][:, :, 8:]
        start = torch.full((2,), -8, dtype=torch.int32, device=DEVICE[backend])
        trimmed = self.run(backend, last, query_offset=9, seq_start=start, **options)
        torch.testing.assert_close(trimmed.out, whole.out[:, :, 17:])

    def test_no_score_exceeds_its_cap(self, backend):
        tensors = make_segmented_inputs(T=20, P=2, device=DEVICE[backend])
        whole = self.run(backend, tensors)
        assert not torch.allclose(self.run(backend, tensors, softcap=1.0).out, whole.out, atol=1e-2)
        # far above all scores it changes next to nothing
        torch.testing.assert_close(self.run(backend, tensors, softcap=1e4).out, whole.out)
        large = tensors | {"query": tensors["query"] * 1e6}
        n_keys = torch.arange(3, 23, device=DEVICE[backend])
        beyond = (self.run(backend, large, softcap=0.5).lse - n_keys.log()).abs()
        assert 0.2 < beyond.max() <= 0.5 + 1e-5


WRONG = {
    "segment_len must be at least 1, got 0": (ValueError, dict(segment_len=0)),
    "window_size must be at least 1, got -3": (ValueError, dict(window_size=-3)),
    "window_size must be an integer, got float": (TypeError, dict(window_size=2.0)),
    "segment_len must be an integer, got bool": (TypeError, dict(segment_len=True)),
    "softcap must be positive and finite, got 0.0": (ValueError, dict(softcap=0.0)),
    "softcap must be positive and finite, got -30": (ValueError, dict(softcap=-30)),
    "softcap must be positive and finite, got nan": (ValueError, dict(softcap=math.nan)),
    "softcap must be positive and finite, got inf": (ValueError, dict(softcap=math.inf)),
    "softcap must be a number or None, got bool": (TypeError, dict(softcap=True)),
    "softcap must be a number or None, got str": (TypeError, dict(softcap="30")),
    "softcap must be a number or None, got Tensor": (TypeError, dict(softcap=torch.tensor(30.0))),
    "persistent_value must be given together with persistent_key": (
        ValueError,
        dict(persistent_key=torch.zeros(2, 3, 16)),
    ),
    "persistent_key must have shape [Hkv=2, P, D=16]": (
        ValueError,
        dict(persistent_key=torch.zeros(4, 3, 16), persistent_value=torch.zeros(2, 3, 16)),
    ),
    "memory_key must be given together with memory_value": (
        ValueError,
        dict(memory_value=torch.zeros(2, 2, 3, 4, 16), segment_len=4),
    ),
    "segment_len must be given together with memory_key": (
        ValueError,
        dict(memory_key=torch.zeros(2, 2, 3, 4, 16), memory_value=torch.zeros(2, 2, 3, 4, 16)),
    ),
    "memory_key must have at least n_segments=3, got 2": (
        ValueError,
        dict(
            memory_key=torch.zeros(2, 2, 2, 4, 16),
            memory_value=torch.zeros(2, 2, 2, 4, 16),
            segment_len=4,
        ),
    ),
    "memory_key must have at least n_segments=2, got 1": (
        ValueError,
        dict(
            memory_key=torch.zeros(2, 2, 1, 4, 16),
            memory_value=torch.zeros(2, 2, 1, 4, 16),
            segment_len=4,
            seq_start=torch.tensor([4, 6], dtype=torch.int32),
            seq_end=torch.tensor([9, 9], dtype=torch.int32),
        ),
    ),
    "memory_key must have M=4 rows": (
        ValueError,
        dict(
            memory_key=torch.zeros(2, 2, 3, 5, 16),
            memory_value=torch.zeros(2, 2, 3, 5, 16),
            segment_len=4,
            memory_is_causal=True,
        ),
    ),
    "memory_key must be given with memory_is_causal=True": (
        ValueError,
        dict(memory_is_causal=True),
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_names_the_wrong_argument(message):
    error, change = WRONG[message]
    tensors = make_segmented_inputs(T=9)
    with pytest.raises(error, match=re.escape(message)):
        segmented_attention(**{**tensors, **change})


@needs_cpp
def test_the_extension_refuses_what_it_would_read_outside():
    """The operator checks first; a caller of the raw operator must not crash either."""
    import memattn.cpp.segmented_attention  # noqa: F401  registers the operator

    op = torch.ops.memattn_cpp.segmented_attention.default
    t = make_segmented_inputs(B=1, T=9, M=2, segment_len=4, n_segments=1)
    args = [t["query"], t["key"], t["value"], None, None, t["memory_key"], t["memory_value"]]
    with pytest.raises(RuntimeError, match="memory_key must have at least n_segments"):
        op(*args, None, None, None, 4, None, None, True, False, 0, 1.0, None)


@needs_cpp
@pytest.mark.parametrize("window_size", [8, 9, 10])
@pytest.mark.parametrize("capability", INSTRUCTION_SETS)
def test_keys_are_nobody_elses_neighbours(capability, window_size):
    """Products may take keys in pairs: one that a later row does not see must not reach it."""
    widest = torch.ops.memattn_cpp.cpu_capability()
    try:
        torch.ops.memattn_cpp.set_cpu_capability(capability)
    except RuntimeError:
        pytest.skip(f"this processor has no {capability}")
    try:
        t = make_segmented_inputs(B=1, H=1, Hkv=1, T=64, D=16, dtype=torch.bfloat16)
        first = 33 - window_size  # what row 32 sees: rows from there on share no panel with others
        t["key"][:, :, :first] = t["value"][:, :, :first] = torch.nan
        query = t["query"].requires_grad_()
        out = segmented_attention(query, t["key"], t["value"], window_size=window_size).out
        out[:, :, 32:].float().sum().backward()
    finally:
        torch.ops.memattn_cpp.set_cpu_capability(widest)
    assert out[:, :, 32:].isfinite().all()
    assert query.grad is not None and query.grad[:, :, 32:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_logits_of_sinks_are_columns_of_the_softmax(dtype, softcap):
    """Beside the scores of the keys that a query sees, not capped, and of no value."""
    t = make_segmented_inputs(B=2, H=4, Hkv=2, T=19, D=8, dtype=dtype)
    logits = torch.randn(4, generator=torch.Generator().manual_seed(3)).to(dtype)
    ends = torch.tensor([19, 11], dtype=torch.int32)
    options = dict(window_size=4, seq_end=ends, softcap=softcap)

    def joined(query, key, value, sink_logits):
        G = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(G, 1).mT / query.shape[-1] ** 0.5
        if softcap is not None:
            scores = (scores / softcap).tanh() * softcap
        i, j = torch.arange(19)[:, None], torch.arange(19)
        seen = (j <= i) & (j > i - 4)
        within = torch.tensor([19, 11])[:, None] > j
        seen = (seen & within[:, None] & within[..., None])[:, None]
        sink = sink_logits[:, None, None].expand(2, 4, 19, 1)
        whole = torch.cat([scores.masked_fill(~seen, -torch.inf), sink], -1)
        exists = seen.any(-1)
        weights = whole.softmax(-1)[..., :-1] * exists[..., None]
        lse = (whole if whole.dtype == torch.float64 else whole.float()).logsumexp(-1)
        out = weights @ value.repeat_interleave(G, 1)
        return AttentionOutput(out, lse.masked_fill(~exists, -torch.inf))

    given = {**t, "sink_logits": logits}
    actual = run_with_gradients(segmented_attention, given, options)
    low = run_with_gradients(joined, given, {})
    high = run_with_gradients(joined, given, {}, dtype=torch.float64)
    assert_results_within_budget(actual, low, high)
    assert actual["d_sink_logits"].any()


def test_a_logit_of_minus_infinity_is_no_sink():
    t = make_segmented_inputs(B=1, H=2, Hkv=1, T=5, D=8)
    options = dict(seq_end=torch.tensor([3], dtype=torch.int32))
    given = {**t, "sink_logits": torch.full((2,), -torch.inf)}
    actual = run_with_gradients(segmented_attention, given, options)
    expected = run_with_gradients(segmented_attention, t, options)
    assert not actual.pop("d_sink_logits").any()  # rows without a key gave NaN
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
