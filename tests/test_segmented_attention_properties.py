"""segmented_attention: what holds without a reference, and what it refuses."""

import re

import pytest
import torch
from segmented_factories import (
    BACKENDS,
    DEVICE,
    make_case,
    needs_cpp,
)

from memattn import segmented_attention
from memattn.testing import (
    make_segmented_inputs,
    run_with_gradients,
)

pytestmark = pytest.mark.operator


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
class TestProperties:
    """What must hold without a reference."""

    def run(self, backend, tensors, **options):
        return segmented_attention(**tensors, **options, backend=backend)

    @pytest.mark.parametrize(
        "options",
        [dict(), dict(window_size=9), dict(segment_len=8), dict(segment_len=8, window_size=5)],
        ids=["causal", "window", "segment", "union"],
    )
    def test_a_later_token_changes_nothing_before_it(self, backend, options):
        tensors = make_segmented_inputs(T=37, P=2, device=DEVICE[backend])
        before = self.run(backend, tensors, **options)
        for t in (1, 20, 36):
            changed = {k: v.clone() for k, v in tensors.items()}
            for name in ("query", "key", "value"):
                changed[name][:, :, t:] += 1.0
            after = self.run(backend, changed, **options)
            assert torch.equal(before.out[:, :, :t], after.out[:, :, :t])
            assert torch.equal(before.lse[:, :, :t], after.lse[:, :, :t])
            assert not torch.equal(before.out[:, :, t:], after.out[:, :, t:])

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

    def test_packed_documents_are_separate(self, backend):
        bounds = [0, 1, 9, 9, 30, 37]
        tensors = make_segmented_inputs(
            B=1, T=37, P=2, M=4, segment_len=8, n_segments=7, device=DEVICE[backend]
        )
        options = dict(segment_len=8, window_size=4)
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE[backend])
        packed = self.run(backend, tensors, cu_seqlens=cu_seqlens, **options)
        segment = 0
        for a, b in zip(bounds, bounds[1:], strict=False):
            part = dict(tensors)
            n = -(-(b - a) // 8)
            for name in ("query", "key", "value"):
                part[name] = tensors[name][:, :, a:b]
            for name in ("memory_key", "memory_value"):
                part[name] = tensors[name][:, :, segment : segment + n]
            segment += n
            alone = self.run(backend, part, **options)
            torch.testing.assert_close(packed.out[:, :, a:b], alone.out)
            torch.testing.assert_close(packed.lse[:, :, a:b], alone.lse)

    def test_padding_does_not_matter(self, backend):
        options = dict(segment_len=8, window_size=4)
        tensors = make_segmented_inputs(B=1, T=21, P=2, M=3, segment_len=8, device=DEVICE[backend])
        alone = self.run(backend, tensors, **options)
        for left, right in ((5, 0), (0, 5), (3, 2)):
            padded = dict(tensors)
            for name in ("query", "key", "value"):
                padded[name] = torch.nn.functional.pad(
                    tensors[name], (0, 0, left, right), value=torch.nan
                )
            for name in ("memory_key", "memory_value"):
                padded[name] = torch.nn.functional.pad(tensors[name], (0, 0, 0, 0, 0, 1))
            bounds = {
                "seq_start": torch.tensor([left], dtype=torch.int32, device=DEVICE[backend]),
                "seq_end": torch.tensor([left + 21], dtype=torch.int32, device=DEVICE[backend]),
            }
            out, lse = self.run(backend, padded, **options, **bounds)
            torch.testing.assert_close(out[:, :, left : left + 21], alone.out)
            torch.testing.assert_close(lse[:, :, left : left + 21], alone.lse)
            pad = torch.cat([out[:, :, :left], out[:, :, left + 21 :]], 2)
            assert torch.equal(pad, torch.zeros_like(pad))
            assert lse[:, :, :left].isneginf().all() and lse[:, :, left + 21 :].isneginf().all()

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

    def test_rows_without_keys_have_no_gradient(self, backend):
        tensors = make_segmented_inputs(T=9, P=2, device=DEVICE[backend])
        end = torch.tensor([4, 0], dtype=torch.int32, device=DEVICE[backend])
        for name in ("query", "key", "value"):
            tensors[name][0, :, 4:] = torch.nan
            tensors[name][1] = torch.inf
        results = run_with_gradients(
            segmented_attention, tensors, dict(seq_end=end, backend=backend)
        )
        for name, result in results.items():
            if name == "lse":
                assert result[1].isneginf().all() and result[0, :, :4].isfinite().all()
                continue
            assert result.isfinite().all(), name
            if "persistent" not in name:
                assert not result[1].any() and not result[0, :, 4:].any(), name

    def test_strides_do_not_matter(self, backend):
        tensors = make_segmented_inputs(T=19, P=2, D=16, device=DEVICE[backend])
        expected = run_with_gradients(segmented_attention, tensors, dict(backend=backend))
        forms = {
            "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
            "heads last": lambda t: t.movedim(-3, -2).contiguous().movedim(-2, -3),
            "padded": lambda t: torch.nn.functional.pad(t, (1, 2))[..., 1:-2],
        }
        for form in forms.values():
            views = {name: form(tensor) for name, tensor in tensors.items()}
            results = run_with_gradients(segmented_attention, views, dict(backend=backend))
            for name, result in results.items():
                torch.testing.assert_close(result, expected[name], msg=name)

    def test_expanded_inputs(self, backend):
        tensors = make_segmented_inputs(B=1, T=19, D=16, device=DEVICE[backend])
        wide = {name: tensor.expand(3, -1, -1, -1) for name, tensor in tensors.items()}
        out = self.run(backend, wide).out
        torch.testing.assert_close(out, self.run(backend, tensors).out.expand(3, -1, -1, -1))

    @pytest.mark.parametrize("sizes", [dict(T=0, S=0), dict(B=0), dict(T=0, S=5), dict(T=3, S=0)])
    def test_empty_sizes(self, backend, sizes):
        tensors = make_segmented_inputs(**sizes, device=DEVICE[backend])
        results = run_with_gradients(
            segmented_attention, tensors, dict(is_causal=False, backend=backend)
        )
        for name, result in results.items():
            assert not result.nan_to_num(neginf=0.0).any(), name

    def test_backward_repeats_bit_for_bit(self, backend):
        tensors, options = make_case("all-sources", backend)
        runs = [
            run_with_gradients(segmented_attention, tensors, {**options, "backend": backend})
            for _ in range(3)
        ]
        for name, result in runs[0].items():
            assert all(torch.equal(result, again[name]) for again in runs[1:]), name

    def test_autocast(self, backend):
        tensors = make_segmented_inputs(T=19, P=2, device=DEVICE[backend])
        with torch.autocast(DEVICE[backend], torch.bfloat16):
            out = self.run(backend, tensors).out
        assert out.dtype == torch.bfloat16
        low = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        assert torch.equal(out, self.run(backend, low).out)

    def test_compiles_whole(self, backend):
        tensors, options = make_case("all-sources", backend)

        def loss(tensors):
            out, lse = segmented_attention(**tensors, **options, backend=backend)
            return out.square().sum() + lse.sum()

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for t in tensors.values():
            t.requires_grad_()
        for function in (loss, compiled):
            function(tensors).backward()
        for name, t in tensors.items():
            assert t.grad is not None, name
        expected = [t.grad / 2 for t in tensors.values()]
        for t in tensors.values():
            t.grad = None
        loss(tensors).backward()
        for (name, t), e in zip(tensors.items(), expected, strict=True):
            torch.testing.assert_close(t.grad, e, msg=name)

    def test_activation_checkpointing(self, backend):
        tensors, options = make_case("persistent", backend)
        expected = run_with_gradients(segmented_attention, tensors, {**options, "backend": backend})

        actual = run_with_gradients(
            lambda query, key, value, **kwargs: torch.utils.checkpoint.checkpoint(
                segmented_attention, query, key, value, use_reentrant=False, **kwargs
            ),
            tensors,
            {**options, "backend": backend},
        )
        for name, result in actual.items():
            assert torch.equal(result, expected[name]), name


WRONG = {
    "query must be a tensor": (TypeError, dict(query=None)),
    "query must have 4 axes": (ValueError, dict(query=torch.zeros(2, 4, 9))),
    "query must have dtype": (ValueError, dict(query=torch.zeros(2, 4, 9, 16, dtype=torch.int64))),
    "key must have shape [B=2, Hkv, S, D=16], got [2, 2, 9, 8]": (
        ValueError,
        dict(key=torch.zeros(2, 2, 9, 8)),
    ),
    "key must have a number of heads that divides those of query, H=4": (
        ValueError,
        dict(key=torch.zeros(2, 3, 9, 16)),
    ),
    "key must have the dtype of query": (ValueError, dict(key=torch.zeros(2, 2, 9, 16).half())),
    "key must be on the device of query": (
        ValueError,
        dict(key=torch.zeros(2, 2, 9, 16, device="meta")),
    ),
    "value must have shape [B=2, Hkv=2, S=9, Dv]": (
        ValueError,
        dict(value=torch.zeros(2, 2, 8, 16)),
    ),
    "segment_len must be at least 1, got 0": (ValueError, dict(segment_len=0)),
    "window_size must be at least 1, got -3": (ValueError, dict(window_size=-3)),
    "window_size must be an integer, got float": (TypeError, dict(window_size=2.0)),
    "segment_len must be an integer, got bool": (TypeError, dict(segment_len=True)),
    "is_causal must be True or False": (TypeError, dict(is_causal=1)),
    "query_offset must be at least 0": (ValueError, dict(query_offset=-1)),
    "scale must be positive and finite": (ValueError, dict(scale=0.0)),
    "scale must be a number or None": (TypeError, dict(scale="1")),
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
    "seq_start must have dtype torch.int32": (ValueError, dict(seq_start=torch.zeros(2))),
    "seq_start must have shape [B=2]": (
        ValueError,
        dict(seq_start=torch.zeros(3, dtype=torch.int32)),
    ),
    "seq_end must be at least seq_start=3, got 1": (
        ValueError,
        dict(
            seq_start=torch.tensor([0, 3], dtype=torch.int32),
            seq_end=torch.tensor([9, 1], dtype=torch.int32),
        ),
    ),
    "seq_end must be at least seq_start=0, got -1": (
        ValueError,
        dict(seq_end=torch.tensor([9, -1], dtype=torch.int32)),
    ),
    "query must have B=1 with cu_seqlens": (
        ValueError,
        dict(cu_seqlens=torch.tensor([0, 9], dtype=torch.int32)),
    ),
    "backend must be one of auto, triton, cpp, reference, got 'cuda'": (
        ValueError,
        dict(backend="cuda"),
    ),
    "backend must be one of auto, triton, cpp, reference, got NoneType": (
        TypeError,
        dict(backend=None),
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_names_the_wrong_argument(message):
    error, change = WRONG[message]
    tensors = make_segmented_inputs(T=9)
    with pytest.raises(error, match=re.escape(message)):
        segmented_attention(**{**tensors, **change})


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([0, 5, 3, 9], "cu_seqlens must rise"),
        ([1, 5, 9], "cu_seqlens must begin with 0 and end with S=9"),
        ([0, 5], "cu_seqlens must begin with 0 and end with S=9"),
        ([0], "cu_seqlens must have at least 2 entries"),
    ],
)
def test_names_wrong_document_bounds(bounds, message):
    tensors = make_segmented_inputs(B=1, T=9)
    with pytest.raises(ValueError, match=message):
        segmented_attention(**tensors, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    with pytest.raises(ValueError, match="seq_end must be None with cu_seqlens"):
        segmented_attention(
            **tensors,
            cu_seqlens=torch.tensor([0, 9], dtype=torch.int32),
            seq_end=torch.tensor([9], dtype=torch.int32),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_named_backend_does_not_fall_back(backend):
    tensors = make_segmented_inputs(T=9, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="query must have dtype float16, bfloat16"):
        segmented_attention(**tensors, backend=backend)
    assert segmented_attention(**tensors).out.dtype == torch.float64


@needs_cpp
def test_the_extension_refuses_what_it_would_read_outside():
    """The operator checks first; a caller of the raw operator must not crash either."""
    op = torch.ops.memattn_cpp.segmented_attention.default
    t = make_segmented_inputs(B=1, T=9, M=2, segment_len=4, n_segments=1)
    args = [t["query"], t["key"], t["value"], None, None, t["memory_key"], t["memory_value"]]
    with pytest.raises(RuntimeError, match="memory_key must have at least n_segments"):
        op(*args, None, None, None, 4, None, True, False, 0, 1.0)
