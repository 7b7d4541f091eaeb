"""future_attention of the C++ extension: lengths around its tiles, instruction sets, threads."""

import pytest
import torch

from memattn import future_attention, future_attention_loss
from memattn.bench.inputs import make_future_inputs
from memattn.ops._dispatch import cpp_is_built
from memattn.testing import assert_results_within_budget, run_with_gradients

pytestmark = [
    pytest.mark.operator,
    pytest.mark.skipif(not cpp_is_built(), reason="the C++ extension is not built"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
THROUGH = dict(loss_type="mse", detach_target=False)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def check(operator, tensors, **options):
    """Assert the error rule for outputs and all gradients."""
    assert_results_within_budget(
        run_with_gradients(operator, tensors, {**options, "backend": "cpp"}),
        run_with_gradients(operator, tensors, {**options, "backend": "reference"}),
        run_with_gradients(
            operator, tensors, {**options, "backend": "reference"}, dtype=torch.float64
        ),
    )


# lengths around the sizes of panels, tiles and blocks


@pytest.mark.parametrize(("H", "Hkv", "Hf"), [(12, 3, 2), (12, 2, 3), (6, 1, 6), (6, 6, 1)])
@pytest.mark.parametrize("T", [5, 70])
def test_groups_of_heads_that_share_keys_and_tables(T, H, Hkv, Hf):
    tensors = make_future_inputs(H=H, Hkv=Hkv, Hf=Hf, T=T)
    check(future_attention, tensors, future_dim=3)
    check(future_attention_loss, tensors, future_dim=3, **THROUGH)


def test_documents_side_by_side_give_what_they_give_alone():
    """With a table of its own for each document, in tiles that several documents share."""
    lengths, rows = (1, 40, 90, 2, 67), 95
    tensors = make_future_inputs(B=1, T=200, rows=rows, tables=5, Hf=2)
    options = dict(future_dim=20, backend="cpp")
    bounds = int32(0, *torch.tensor(lengths).cumsum(0).tolist())
    out, out_future, lse = future_attention(**tensors, **options, cu_seqlens=bounds)
    for d, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        alone = {name: t[..., begin:end, :] for name, t in tensors.items() if "future" not in name}
        alone |= {name: tensors[name][d] for name in ("future_key", "future_value")}
        expected = future_attention(**alone, **options)
        torch.testing.assert_close(out[:, :, begin:end], expected.out)
        torch.testing.assert_close(out_future[:, :, begin:end], expected.out_future)
        torch.testing.assert_close(lse[:, :, begin:end], expected.lse)


@pytest.mark.parametrize("loss", [None, THROUGH], ids=str)
def test_nan_that_nobody_sees_stays_away(loss):
    """Rows of the table between the bands of two documents, and tokens outside the sequence."""
    tensors = make_future_inputs(B=1, T=60, rows=50, tables=2)
    options = dict(future_dim=7, cu_seqlens=int32(0, 20, 60), backend="cpp")
    operator = future_attention if loss is None else future_attention_loss
    expected = run_with_gradients(operator, tensors, {**options, **(loss or {})})
    for name in ("future_key", "future_value"):
        tensors[name] = tensors[name].clone()
        tensors[name][0, :, 26:] = torch.nan
    actual = run_with_gradients(operator, tensors, {**options, **(loss or {})})
    for name, result in actual.items():
        assert torch.equal(result, expected[name]), name

    tensors = make_future_inputs(B=2, T=70)
    options = dict(future_dim=9, seq_start=int32(5, 0), seq_end=int32(70, 33), backend="cpp")
    expected = run_with_gradients(operator, tensors, {**options, **(loss or {})})
    for name in ("query", "key", "value"):
        tensors[name] = tensors[name].clone()
        tensors[name][0, :, :5] = tensors[name][1, :, 33:] = torch.nan
    actual = run_with_gradients(operator, tensors, {**options, **(loss or {})})
    for name, result in actual.items():
        assert torch.equal(result, expected[name]), name


def raw_arguments(tensors, **changes):
    """Arguments of ``torch.ops.memattn_cpp.future_attention``, in its order."""
    named = dict.fromkeys(("future_query", "cu_seqlens", "seq_start", "seq_end"))
    rest = dict(table_len=tensors["future_key"].shape[-2], by_distance=False, future_dim=3)
    order = ("query", "key", "value", "future_key", "future_value")
    named = {name: tensors[name] for name in order} | named
    rest |= dict(query_offset=0, scale=0.25, loss_type=None, detach_target=True)
    return tuple((named | rest | changes).values())


WRONG = {
    "value must have shape": dict(value=torch.zeros(2, 2, 8, 16)),
    "future_value must have shape": dict(future_value=torch.zeros(4, 7, 16)),
    "future_query must have shape": dict(future_query=torch.zeros(2, 4, 9, 8)),
    "seq_end must have dtype int32": dict(seq_end=torch.zeros(2, dtype=torch.long)),
    "seq_start must have shape": dict(seq_start=int32(0)),
    "cu_seqlens must rise": dict(cu_seqlens=int32(0, 9, 3)),
    "cu_seqlens must have at least 2 entries": dict(cu_seqlens=int32(0)),
    "table_len must be at least future_dim=9": dict(future_dim=9),
    "table_len must be at least future_dim=3 and at most": dict(table_len=9),
    "rows for each of 3 documents": dict(table_len=4, cu_seqlens=int32(0, 1, 2, 9)),
    "future_dim must be at least 1": dict(future_dim=0),
    "query_offset must be at least 0": dict(query_offset=-1),
    "heads of key and future_key must divide": dict(future_key=torch.zeros(3, 8, 16)),
}


@pytest.mark.parametrize("message", WRONG)
def test_the_extension_refuses_what_it_would_read_outside(message):
    """The operator checks first; a caller of the raw operator must not crash either."""
    arguments = raw_arguments(make_future_inputs(T=9), **WRONG[message])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.memattn_cpp.future_attention(*arguments)


def test_the_extension_refuses_an_unknown_loss():
    with pytest.raises(RuntimeError, match="loss_type must be one of mse, cosine, got huber"):
        torch.ops.memattn_cpp.future_attention(
            *raw_arguments(make_future_inputs(T=9), loss_type="huber")
        )
