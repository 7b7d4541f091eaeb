"""future_attention: what holds without a reference, and what bad input is told."""

import re

import pytest
import torch
from operator_contract import DEVICE, EVERY, int32
from specs_future_attention import FUTURE, LOSSES
from torch.nn import functional as F

from memattn import future_attention, future_attention_loss, segmented_attention
from memattn.bench.inputs import make_future_inputs
from memattn.testing import run_with_gradients

pytestmark = pytest.mark.operator
TOKENS = ("query", "key", "value")


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


@pytest.mark.parametrize("backend", EVERY)
class TestProperties:
    """What must hold without a reference."""

    def run(self, backend, tensors, operator=future_attention, **options):
        return operator(**tensors, **options, backend=backend)

    def test_a_prefix_gives_the_same(self, backend):
        tensors = make_future_inputs(H=2, Hkv=1, T=37, device=DEVICE[backend])
        whole = self.run(backend, tensors, future_dim=9)
        for t in (1, 16, 30):
            prefix = {k: v[:, :, :t] if k in TOKENS else v for k, v in tensors.items()}
            part = self.run(backend, prefix, future_dim=9)
            for result, expected in zip(part, whole, strict=True):
                torch.testing.assert_close(result, expected[:, :, :t])

    @pytest.mark.parametrize("future_dim", [1, 5, 36])
    @pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
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

    def test_decoding_continues_the_pass(self, backend):
        tensors = make_future_inputs(H=2, Hkv=1, T=21, rows=30, device=DEVICE[backend])
        whole = self.run(backend, tensors, future_dim=6)
        last = {**tensors, "query": tensors["query"][:, :, 17:]}
        split = self.run(backend, last, query_offset=17, future_dim=6)
        torch.testing.assert_close(split.out, whole.out[:, :, 17:])

    def test_an_expanded_table(self, backend):
        """A view of one table for each sequence: as copies of it."""
        tensors = make_future_inputs(H=2, Hkv=1, Hf=1, T=18, tables=1, device=DEVICE[backend])
        tensors |= {n: t.expand(2, -1, -1, -1) for n, t in tensors.items() if "future" in n}
        plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
        options = dict(future_dim=5, loss_type="cosine", detach_target=False, backend=backend)
        expected = run_with_gradients(future_attention_loss, plain, options)

        def views(**leaves):
            for name in ("future_key", "future_value"):
                leaves[name] = leaves[name][:1].expand(2, -1, -1, -1)
            return future_attention_loss(**leaves, **options)

        for name, result in run_with_gradients(future_attention_loss, tensors, options).items():
            assert torch.equal(result, expected[name]), name
        for name, result in run_with_gradients(views, plain, {}).items():
            if name in ("d_future_key", "d_future_value"):
                torch.testing.assert_close(result[0], expected[name].sum(0), msg=name)
            else:
                assert torch.equal(result, expected[name]), name

    def test_no_position_is_left_for_the_loss(self, backend):
        tensors = make_future_inputs(H=2, Hkv=1, T=5, rows=20, device=DEVICE[backend])
        results = run_with_gradients(
            future_attention_loss, tensors, dict(future_dim=6, backend=backend)
        )
        assert results["loss"].item() == 0.0
        assert all(result.isfinite().all() for result in results.values())


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
    "loss_type must be one of mse, cosine, got 'l1'": (ValueError, dict(loss_type="l1")),
    "detach_target must be True or False": (TypeError, dict(detach_target=1)),
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


def test_every_case_reaches_the_future():
    for name, case in FUTURE.cases.items():
        assert FUTURE.run(*FUTURE.make(case)).out_future.any(), name
