"""future_attention of the C++ extension: lengths around its tiles, instruction sets, threads."""

import pytest
import torch

from memattn import future_attention, future_attention_loss
from memattn.ops._dispatch import cpp_is_built
from memattn.testing import (
    assert_results_within_budget,
    make_future_inputs,
    run_with_gradients,
)

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
@pytest.mark.parametrize("future_dim", [1, 17, 130])
@pytest.mark.parametrize("T", [2, 15, 16, 17, 63, 64, 65, 95, 96, 97, 128, 129, 200, 600])
def test_awkward_lengths(T, future_dim):
    future_dim = min(future_dim, T - 1)
    tensors = make_future_inputs(B=1, H=2, Hkv=1, T=T, D=32)
    check(future_attention, tensors, future_dim=future_dim)
    check(future_attention_loss, tensors, future_dim=future_dim, **THROUGH)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes", [dict(D=64), dict(D=80, Dv=40), dict(D=128), dict(D=256)], ids=str
)
def test_head_dims(sizes, dtype):
    tensors = make_future_inputs(B=1, H=2, Hkv=1, Hf=1, T=130, dtype=dtype, **sizes)
    check(future_attention, tensors, future_dim=70)
    check(future_attention_loss, tensors, future_dim=70, loss_type="cosine", detach_target=False)


@pytest.mark.parametrize(("H", "Hkv", "Hf"), [(12, 3, 2), (12, 2, 3), (6, 1, 6), (6, 6, 1)])
@pytest.mark.parametrize("T", [5, 70])
def test_groups_of_heads_that_share_keys_and_tables(T, H, Hkv, Hf):
    tensors = make_future_inputs(H=H, Hkv=Hkv, Hf=Hf, T=T)
    check(future_attention, tensors, future_dim=3)
    check(future_attention_loss, tensors, future_dim=3, **THROUGH)


@pytest.mark.parametrize("name", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(name, dtype):
    ops = torch.ops.memattn_cpp
    before = ops.cpu_capability()
    if name == "avx512" and before != "avx512":
        pytest.skip("this processor has no AVX-512")
    ops.set_cpu_capability(name)
    try:
        for sizes in (dict(T=150, D=72, B=1), dict(T=9, D=13, Dv=7, separate_query=True)):
            tensors = make_future_inputs(H=2, Hkv=1, dtype=dtype, **sizes)
            check(future_attention, tensors, future_dim=8)
            check(future_attention_loss, tensors, future_dim=8, **THROUGH)
    finally:
        ops.set_cpu_capability(before)


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


@pytest.mark.parametrize("sizes", [dict(T=0, S=9), dict(B=0), dict(T=3, S=0, rows=9)], ids=str)
def test_nothing_to_attend_to(sizes):
    tensors = make_future_inputs(**{"T": 9, **sizes})
    check(future_attention, tensors, future_dim=4)
    check(future_attention_loss, tensors, future_dim=4, **THROUGH)


@pytest.mark.parametrize("tables", [None, 2])
def test_gradients_do_not_depend_on_who_computes_them(tables):
    """Few heads leave threads idle, so their queries are split; the sums must still be right."""
    threads = torch.get_num_threads()
    tensors = make_future_inputs(B=2, H=2, Hkv=1, Hf=1, T=150, tables=tables)
    options = dict(future_dim=40, backend="cpp", **THROUGH)
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            check(future_attention_loss, tensors, future_dim=40, **THROUGH)
            first, again = (
                run_with_gradients(future_attention_loss, tensors, options) for _ in range(2)
            )
            assert all(torch.equal(first[name], again[name]) for name in first)
    finally:
        torch.set_num_threads(threads)


def raw_arguments(tensors, **changes):
    """Arguments of ``torch.ops.memattn_cpp.future_attention``, in its order."""
    named = dict.fromkeys(("future_query", "cu_seqlens", "seq_start", "seq_end"))
    rest = dict(table_len=tensors["future_key"].shape[-2], by_distance=False, future_dim=3)
    order = ("query", "key", "value", "future_key", "future_value")
    named = {name: tensors[name] for name in order} | named | rest
    return tuple((named | dict(query_offset=0, scale=0.25) | changes).values())


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(seq_start=int32(2, 0), seq_end=int32(9, 7)),
        dict(by_distance=True, future_dim=8),
    ],
    ids=["plain", "padded", "distance"],
)
def test_opcheck(changes):
    import memattn.cpp.future_attention  # noqa: F401  its fake kernels, loaded when first used

    tensors = make_future_inputs(T=9, separate_query="by_distance" in changes)
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    changes = {"future_query": tensors.get("future_query"), **changes}
    arguments = raw_arguments(tensors, **changes)
    ops = torch.ops.memattn_cpp
    torch.library.opcheck(ops.future_attention.default, arguments)
    torch.library.opcheck(ops.future_attention_loss.default, (*arguments, "cosine", False))


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
        torch.ops.memattn_cpp.future_attention_loss(
            *raw_arguments(make_future_inputs(T=9)), "huber", True
        )
