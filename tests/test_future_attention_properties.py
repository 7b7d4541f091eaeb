"""future_attention: what holds without a reference, and what bad input is told."""

import re

import pytest
import torch
from test_future_attention import BACKENDS, CASES, DEVICE, LOSSES, make_case
from torch.nn import functional as F

from memattn import future_attention, future_attention_loss, segmented_attention
from memattn.testing import make_future_inputs, run_with_gradients

pytestmark = pytest.mark.operator
TOKENS = ("query", "key", "value")


@pytest.mark.parametrize("future_index", ["position", "distance"])
def test_reference_gradcheck(future_index):
    rows = 5 if future_index == "position" else 3
    tensors = make_future_inputs(
        B=1, H=2, Hkv=1, T=5, D=3, rows=rows, separate_query=True, dtype=torch.float64
    )
    leaves = [t.requires_grad_() for t in tensors.values()]
    options = dict(future_dim=3, future_index=future_index)

    def function(*args):
        return future_attention(**dict(zip(tensors, args, strict=True)), **options)

    torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("loss_type", ["mse", "cosine"])
def test_reference_gradcheck_of_the_loss(loss_type):
    tensors = make_future_inputs(B=1, H=2, Hkv=1, T=5, D=3, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in tensors.values()]
    options = dict(future_dim=3, loss_type=loss_type, detach_target=False)

    def function(*args):
        return future_attention_loss(**dict(zip(tensors, args, strict=True)), **options)

    torch.autograd.gradcheck(function, leaves)


def explicit(query, key, value, future_key, future_value, future_dim):
    """The published module's matrices, written out: one row of weights at a time."""
    T, n_ctx = query.shape[2], future_key.shape[1] + 1
    scale = query.shape[-1] ** -0.5
    out, out_future, target = (torch.zeros_like(query) for _ in range(3))
    for i in range(T):
        band = range(i + 1, min(i + future_dim, n_ctx - 1) + 1)
        rows = torch.tensor([p - 1 for p in band], dtype=torch.long)
        real = torch.tensor([p for p in band if p < T], dtype=torch.long)
        past = torch.einsum("bhd,bhjd->bhj", query[:, :, i], key[:, :, : i + 1]) * scale
        future = torch.einsum("bhd,hjd->bhj", query[:, :, i], future_key[:, rows]) * scale
        weights = torch.cat([past, future], -1).softmax(-1)
        out_future[:, :, i] = torch.einsum(
            "bhj,hjd->bhd", weights[..., i + 1 :], future_value[:, rows]
        )
        out[:, :, i] = out_future[:, :, i] + torch.einsum(
            "bhj,bhjd->bhd", weights[..., : i + 1], value[:, :, : i + 1]
        )
        ahead = torch.einsum("bhd,bhjd->bhj", query[:, :, i], key[:, :, real]) * scale
        weights = torch.cat([past, ahead], -1).softmax(-1)[..., i + 1 :]
        target[:, :, i] = torch.einsum("bhj,bhjd->bhd", weights, value[:, :, real])
    return out, out_future, target


@pytest.mark.parametrize(("T", "rows", "future_dim"), [(9, 8, 8), (9, 8, 3), (6, 8, 3), (1, 4, 2)])
def test_definition_is_the_published_one(T, rows, future_dim):
    tensors = make_future_inputs(H=2, Hkv=2, T=T, rows=rows, dtype=torch.float64)
    out, out_future, target = explicit(*tensors.values(), future_dim)
    result = future_attention(**tensors, future_dim=future_dim)
    torch.testing.assert_close(result.out, out)
    torch.testing.assert_close(result.out_future, out_future)
    # positions with a band, all of whose real keys are there
    whole = [i for i in range(T) if i < min(i + future_dim, rows) < T]
    expected = (out_future - target)[:, :, whole].square().mean() if whole else torch.zeros(())
    loss = future_attention_loss(**tensors, future_dim=future_dim).loss
    torch.testing.assert_close(loss, expected.to(loss))
    cosine = F.cosine_similarity(out_future, target, dim=-1)[:, :, whole]
    expected = ((1 - cosine) / 2).mean() if whole else torch.zeros(())
    loss = future_attention_loss(**tensors, future_dim=future_dim, loss_type="cosine").loss
    torch.testing.assert_close(loss, expected.to(loss))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
class TestProperties:
    """What must hold without a reference."""

    def run(self, backend, tensors, operator=future_attention, **options):
        return operator(**tensors, **options, backend=backend)

    @pytest.mark.parametrize("operator", [future_attention, future_attention_loss])
    def test_a_later_token_changes_nothing_before_it(self, backend, operator):
        tensors = make_future_inputs(H=2, Hkv=1, T=37, device=DEVICE[backend])
        before = self.run(backend, tensors, operator, future_dim=7)
        for t in (1, 20, 36):
            changed = {name: tensor.clone() for name, tensor in tensors.items()}
            for name in TOKENS:
                changed[name][:, :, t:] += 1.0
            after = self.run(backend, changed, operator, future_dim=7)
            assert torch.equal(before.out[:, :, :t], after.out[:, :, :t])
            assert torch.equal(before.lse[:, :, :t], after.lse[:, :, :t])
            assert not torch.equal(before.out[:, :, t:], after.out[:, :, t:])

    def test_a_prefix_gives_the_same(self, backend):
        tensors = make_future_inputs(H=2, Hkv=1, T=37, device=DEVICE[backend])
        whole = self.run(backend, tensors, future_dim=9)
        for t in (1, 16, 30):
            prefix = {k: v[:, :, :t] if k in TOKENS else v for k, v in tensors.items()}
            part = self.run(backend, prefix, future_dim=9)
            for result, expected in zip(part, whole, strict=True):
                torch.testing.assert_close(result, expected[:, :, :t])

    @pytest.mark.parametrize("future_dim", [1, 5, 36])
    @pytest.mark.parametrize("loss", LOSSES, ids=str)
    def test_a_perfect_table_has_no_loss(self, backend, loss, future_dim):
        tensors = make_future_inputs(B=1, H=2, Hkv=2, T=37, device=DEVICE[backend])
        tensors["future_key"] = tensors["key"][0, :, 1:]
        tensors["future_value"] = tensors["value"][0, :, 1:]
        result = self.run(backend, tensors, future_attention_loss, future_dim=future_dim, **loss)
        # both sides are rounded alike, but for the order of their sums
        step = 8 * torch.finfo(torch.float32).eps
        assert abs(result.loss.item()) <= (step if loss["loss_type"] == "cosine" else step**2)
        mask = torch.ones(37, 37, dtype=torch.bool, device=DEVICE[backend]).tril(future_dim)
        banded = F.scaled_dot_product_attention(*(tensors[n] for n in TOKENS), attn_mask=mask)
        torch.testing.assert_close(result.out, banded)

    def test_far_away_rows_give_causal_attention(self, backend):
        tensors = make_future_inputs(H=2, Hkv=1, T=37, device=DEVICE[backend])
        tensors["future_key"] = torch.zeros_like(tensors["future_key"])
        tensors["query"][..., 0] = 4.0
        tensors["future_key"][..., 0] = -1000.0
        causal = segmented_attention(*(tensors[n] for n in TOKENS), backend=backend)
        result = self.run(backend, tensors, future_dim=9)
        torch.testing.assert_close(result.out, causal.out)
        torch.testing.assert_close(result.lse, causal.lse)
        assert not result.out_future.any()

    def test_unseen_rows_do_not_matter(self, backend):
        tensors = make_future_inputs(H=2, Hkv=1, T=10, rows=36, device=DEVICE[backend])
        expected = run_with_gradients(
            future_attention, tensors, dict(future_dim=5, backend=backend)
        )
        for name in ("future_key", "future_value"):
            tensors[name][:, 14:] = torch.nan
        actual = run_with_gradients(future_attention, tensors, dict(future_dim=5, backend=backend))
        for name, result in actual.items():
            assert torch.equal(result, expected[name]), name
        assert not actual["d_future_key"][:, 14:].any()
        assert actual["d_future_key"][:, :14].any()

    def test_packed_documents_are_separate(self, backend):
        bounds = [0, 1, 9, 9, 30, 37]
        for name in ("packed", "packed-tables"):
            tensors, options = make_case(name, backend)
            packed = self.run(backend, tensors, **options)
            losses = self.run(backend, tensors, future_attention_loss, **options).loss
            total, count = 0.0, 0
            for d, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
                part = {k: v[:, :, a:b] if k in TOKENS else v for k, v in tensors.items()}
                if name == "packed-tables":
                    part |= {k: part[k][d] for k in ("future_key", "future_value")}
                alone = self.run(backend, part, future_dim=4)
                for result, expected in zip(packed, alone, strict=True):
                    torch.testing.assert_close(result[:, :, a:b], expected)
                loss = self.run(backend, part, future_attention_loss, future_dim=4).loss
                n = max(b - a - 4, 0)
                total, count = total + loss * n, count + n
            torch.testing.assert_close(losses, total / count)

    def test_padding_does_not_matter(self, backend):
        tensors = make_future_inputs(B=1, H=2, Hkv=1, T=21, rows=30, device=DEVICE[backend])
        options = dict(future_dim=4, backend=backend)
        alone = future_attention(**tensors, **options)
        loss = future_attention_loss(**tensors, **options).loss
        for left, right in ((5, 0), (0, 5), (3, 2)):
            padded = {
                k: F.pad(v, (0, 0, left, right), value=torch.nan) if k in TOKENS else v
                for k, v in tensors.items()
            }
            bounds = {
                "seq_start": torch.tensor([left], dtype=torch.int32, device=DEVICE[backend]),
                "seq_end": torch.tensor([left + 21], dtype=torch.int32, device=DEVICE[backend]),
            }
            out, out_future, lse = future_attention(**padded, **options, **bounds)
            inner = slice(left, left + 21)
            torch.testing.assert_close(out[:, :, inner], alone.out)
            torch.testing.assert_close(out_future[:, :, inner], alone.out_future)
            torch.testing.assert_close(lse[:, :, inner], alone.lse)
            pad = torch.cat([out[:, :, :left], out[:, :, left + 21 :]], 2)
            assert torch.equal(pad, torch.zeros_like(pad))
            results = future_attention_loss(**padded, **options, **bounds)
            torch.testing.assert_close(results.loss, loss)

    def test_decoding_continues_the_pass(self, backend):
        tensors = make_future_inputs(H=2, Hkv=1, T=21, rows=30, device=DEVICE[backend])
        whole = self.run(backend, tensors, future_dim=6)
        last = {**tensors, "query": tensors["query"][:, :, 17:]}
        split = self.run(backend, last, query_offset=17, future_dim=6)
        torch.testing.assert_close(split.out, whole.out[:, :, 17:])

    def test_no_position_is_left_for_the_loss(self, backend):
        tensors = make_future_inputs(H=2, Hkv=1, T=5, rows=20, device=DEVICE[backend])
        results = run_with_gradients(
            future_attention_loss, tensors, dict(future_dim=6, backend=backend)
        )
        assert results["loss"].item() == 0.0
        assert all(result.isfinite().all() for result in results.values())

    @pytest.mark.parametrize("loss", LOSSES[-1:], ids=str)
    @pytest.mark.parametrize("sizes", [dict(T=0, S=0, rows=3), dict(B=0, T=4)], ids=str)
    def test_empty_sizes(self, backend, sizes, loss):
        tensors = make_future_inputs(H=2, Hkv=1, **sizes, device=DEVICE[backend])
        for operator, options in ((future_attention, {}), (future_attention_loss, loss)):
            results = run_with_gradients(
                operator, tensors, dict(future_dim=2, backend=backend, **options)
            )
            for name, result in results.items():
                assert not result.nan_to_num(neginf=0.0).any(), name

    def test_strides_do_not_matter(self, backend):
        tensors = make_future_inputs(H=2, Hkv=1, T=19, device=DEVICE[backend])
        options = dict(future_dim=4, backend=backend)
        expected = run_with_gradients(future_attention_loss, tensors, options)
        views = {
            name: F.pad(t.movedim(-3, -2).contiguous().movedim(-2, -3), (1, 2))[..., 1:-2]
            for name, t in tensors.items()
        }
        results = run_with_gradients(future_attention_loss, views, options)
        for name, result in results.items():
            torch.testing.assert_close(result, expected[name], msg=name)

    def test_backward_repeats_bit_for_bit(self, backend):
        tensors, options = make_case("packed", backend)
        runs = [
            run_with_gradients(
                future_attention_loss, tensors, {**options, **LOSSES[-1], "backend": backend}
            )
            for _ in range(3)
        ]
        for name, result in runs[0].items():
            assert all(torch.equal(result, again[name]) for again in runs[1:]), name

    def test_autocast(self, backend):
        tensors = make_future_inputs(H=2, Hkv=1, T=19, device=DEVICE[backend])
        with torch.autocast(DEVICE[backend], torch.bfloat16):
            out = self.run(backend, tensors, future_dim=3).out
        assert out.dtype == torch.bfloat16
        low = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        assert torch.equal(out, self.run(backend, low, future_dim=3).out)

    def test_compiles_whole(self, backend):
        tensors, options = make_case("padded-tables", backend)
        leaves = [t.requires_grad_() for t in tensors.values()]

        def loss(tensors):
            result = future_attention_loss(**tensors, **options, backend=backend)
            plain = future_attention(**tensors, **options, backend=backend)
            return result.out.square().sum() + result.loss + plain.out_future.sum()

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        expected = torch.autograd.grad(loss(tensors), leaves)
        for actual, wanted in zip(
            torch.autograd.grad(compiled(tensors), leaves), expected, strict=True
        ):
            torch.testing.assert_close(actual, wanted)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


WRONG = {
    "future_key must be a tensor": (TypeError, dict(future_key=None)),
    "future_key must have 3 axes [Hf, N_ctx-1, D]": (ValueError, dict(future_key=torch.zeros(8))),
    "future_key must have shape [Hf=4, N_ctx-1=8, D=16], got [4, 8, 8]": (
        ValueError,
        dict(future_key=torch.zeros(4, 8, 8)),
    ),
    "future_key must have a number of heads that divides those of query, H=4": (
        ValueError,
        dict(future_key=torch.zeros(3, 8, 16), future_value=torch.zeros(3, 8, 16)),
    ),
    "future_key must have the dtype of query": (
        ValueError,
        dict(future_key=torch.zeros(4, 8, 16).half()),
    ),
    "future_key must have shape [B=2, Hf=4, N_ctx-1=8, D=16]": (
        ValueError,
        dict(future_key=torch.zeros(3, 4, 8, 16)),
    ),
    "future_value must have shape [Hf=4, N_ctx-1=8, Dv=16]": (
        ValueError,
        dict(future_value=torch.zeros(4, 7, 16)),
    ),
    "future_query must have shape [B=2, H=4, T=9, D=16]": (
        ValueError,
        dict(future_query=torch.zeros(2, 4, 8, 16)),
    ),
    "future_dim must be at least 1, got 0": (ValueError, dict(future_dim=0)),
    "future_dim must be an integer, got float": (TypeError, dict(future_dim=2.0)),
    "future_key must have at least future_dim=9 rows, got 8": (ValueError, dict(future_dim=9)),
    "future_key must have future_dim=4 rows, one per distance, got 8": (
        ValueError,
        dict(future_dim=4, future_index="distance"),
    ),
    "future_index must be one of position, distance, got 'time'": (
        ValueError,
        dict(future_index="time"),
    ),
    "query_offset must be such that query_offset + T=9 <= N_ctx=9, got 1": (
        ValueError,
        dict(query_offset=1),
    ),
    "future_key must have a row for each position, at least 10, got 8": (
        ValueError,
        dict(seq_start=int32(-2, 0)),
    ),
    "query must have B=1 with cu_seqlens": (ValueError, dict(cu_seqlens=int32(0, 9))),
    "loss_type must be one of mse, cosine, got 'l1'": (ValueError, dict(loss_type="l1")),
    "detach_target must be True or False": (TypeError, dict(detach_target=1)),
    "backend must be one of auto, triton, cpp, reference": (ValueError, dict(backend="cuda")),
}


@pytest.mark.parametrize("message", WRONG)
def test_names_the_wrong_argument(message):
    error, change = WRONG[message]
    inputs = {**make_future_inputs(T=9), "future_dim": 2, **change}
    with pytest.raises(error, match=re.escape(message)):
        future_attention_loss(**inputs)
    if change.keys() & {"loss_type", "detach_target"}:
        return
    with pytest.raises(error, match=re.escape(message)):
        future_attention(**inputs)


def test_a_document_longer_than_the_table_is_refused():
    tensors = make_future_inputs(B=1, T=9, rows=5)
    with pytest.raises(ValueError, match="row for each position, at least 6, got 5"):
        future_attention(**tensors, future_dim=2, cu_seqlens=int32(0, 7, 9))
    result = future_attention(**tensors, future_dim=2, cu_seqlens=int32(0, 6, 9))
    assert result.out.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_named_backend_does_not_fall_back(backend):
    tensors = make_future_inputs(T=9, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="query must have dtype float16, bfloat16"):
        future_attention(**tensors, future_dim=2, backend=backend)
    assert future_attention(**tensors, future_dim=2).out.dtype == torch.float64


def test_every_case_reaches_the_future():
    for name in CASES:
        tensors, options = make_case(name, "reference")
        assert future_attention(**tensors, **options, backend="reference").out_future.any(), name
