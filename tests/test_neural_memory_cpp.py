"""The neural memory in C++, beside the shared tests: all depths and options, states, decoding."""

import pytest
import torch
from neural_memory_factories import call, check, cut, floating, make_inputs, run, small_steps
from operator_contract import DTYPES, Recorder, int32, needs_cpp
from torch.nn import functional as F

from memattn import NeuralMemoryState
from memattn.testing import assert_within_budget

pytestmark = [pytest.mark.operator, needs_cpp]

# sizes of the inputs, options, and the tokens that a state holds already
CASES = {
    "depth1": (dict(hidden=()), dict(chunk_size=4), 3),
    "depth2": (dict(T=41, D=20, Dv=33), dict(chunk_size=17), 5),
    "depth3": (dict(hidden=(9, 18)), dict(chunk_size=5, max_norm=0.5), 2),
    "depth4": (dict(hidden=(5, 6, 3)), dict(chunk_size=5, activation="silu"), 2),
    "no-momentum": (dict(T=50, hidden=(40,), momentum=False), dict(chunk_size=40), 7),
    "no-decay": (dict(decay=False), dict(chunk_size=3), 0),
    "neither": (dict(momentum=False, decay=False), dict(chunk_size=3, return_state=False), 0),
    "recurrence": (dict(T=7), dict(chunk_size=1), 2),
    "chunk-read": (dict(), dict(chunk_size=4, read="chunk"), 3),
    "residual": (dict(hidden=(5, 6)), dict(chunk_size=4, residual=True, activation="silu"), 0),
    "huber": (dict(), dict(chunk_size=4, loss="huber", huber_delta=0.3, residual=True), 3),
    "soft": (dict(hidden=(7, 5)), dict(chunk_size=4, max_norm=0.5, clamp="soft"), 0),
    "documents": (dict(B=1, H=16, T=90), dict(cu_seqlens=int32(0, 0, 1, 37, 88, 90)), 0),
    "padded": (dict(B=2, H=12, T=90), dict(seq_start=int32(1, 9), seq_end=int32(90, 71)), 3),
    "empty": (dict(B=2, H=12, T=9), dict(seq_start=int32(0, 3), seq_end=int32(9, 3)), 6),
}  # fmt: skip


def check_case(case, dtype):
    sizes, options, before = CASES[case]
    check("cpp", dict(B=12, H=2, dtype=dtype) | sizes, dict(chunk_size=4) | options, before)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case, dtype):
    """Values, the state and every gradient; memory that is not written is NaN."""
    check_case(case, dtype)


@pytest.mark.parametrize("name", ["avx2", "portable"])
@pytest.mark.parametrize("case", ["depth3", "no-momentum"])
def test_every_instruction_set(case, name):
    ops = torch.ops.memattn_cpp
    before = ops.cpu_capability()
    ops.set_cpu_capability(name)
    try:
        check_case(case, torch.float32)
    finally:
        ops.set_cpu_capability(before)


@torch.no_grad()
@pytest.mark.parametrize("case", [*CASES][:12])
def test_decoding_is_prefill(case):
    """Token by token, rows at unlike places of their chunks: as near as one call is."""
    sizes, options, _ = CASES[case]
    inputs = small_steps(**dict(B=32, T=20) | sizes, dtype=torch.float32)
    start, steps, B = 4, 9, inputs["query"].shape[0]
    options = dict(options, return_state=True)
    bounds = dict(seq_start=torch.arange(B, dtype=torch.int32) % 3, seq_end=int32(*[start] * B))
    state = call(cut(inputs, 0, start), **bounds, **options, backend="reference").state
    rest = cut(inputs, start, start + steps)
    results = []
    for backend, dtype in (("reference", None), ("reference", torch.float64)):
        wide = {n: getattr(state, n).to(dtype) for n in (*floating(state), "initial")}
        given = NeuralMemoryState(**{**vars(state), **wide})
        found = call({n: t.to(dtype) for n, t in rest.items()}, state=given, **options,
                     backend=backend)  # fmt: skip
        results.append([found.out, *floating(found.state).values()])
    outs, after = [], state
    for t in range(steps):
        found = call(cut(rest, t, t + 1), state=after, **options, backend="cpp")
        outs.append(found.out)
        after = found.state
    rows = torch.arange(after.chunk_size - 1) < after.count[:, None, None]
    for name, low, high in zip(("out", *floating(after)), *results, strict=True):
        actual = torch.cat(outs, 2) if name == "out" else getattr(after, name)
        if name.startswith("pending"):  # what stands after the count may be anything
            actual = torch.where(rows[..., None] if actual.dim() == 4 else rows, actual, 0.0)
        assert_within_budget(name, actual, low, high)


def test_absent_tokens_do_not_matter():
    """NaN around the tokens: the same bits."""
    inputs = make_inputs(T=20, D=6, hidden=(9,), dtype=torch.float32)
    options = dict(chunk_size=6, backend="cpp")
    tokens = [n for n in inputs if not n.startswith("weights_")]
    padded = {
        n: F.pad(inputs[n], (0, 0) * (inputs[n].dim() - 3) + (3, 2), value=torch.nan)
        for n in tokens
    }
    bounds = dict(seq_start=int32(3, 3), seq_end=int32(23, 23))
    outs = [call({**inputs, **x}, **o, **options) for x, o in ((padded, bounds), ({}, {}))]
    assert torch.equal(outs[0].out[:, :, 3:-2], outs[1].out)
    assert torch.equal(outs[0].state.packed_weights, outs[1].state.packed_weights)
    assert not outs[0].out[:, :, :3].any() and not outs[0].surprise[:, :, -2:].any()


def test_saved_memory_does_not_grow_with_chunks():
    """Besides its inputs a call saves at most as much as query, key and value have."""
    inputs = make_inputs(B=1, H=1, T=1000, D=8, hidden=(32,), dtype=torch.float32)
    inputs = {n: t.requires_grad_() for n, t in inputs.items()}
    saved = {}
    keep = lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        call(inputs, chunk_size=4, backend="cpp")
    given = sum(t.numel() for n, t in inputs.items() if n in ("query", "key", "value"))
    given += sum(t.numel() for t in inputs.values())
    assert sum(t.numel() for t in saved.values()) <= given + 8 * 32 * 2


def test_skipped_updates_leave_no_trace():
    inputs = make_inputs(T=9, dtype=torch.float32)
    harmless = {n: t.clone() for n, t in inputs.items()}
    inputs["key"][1, 0, 3] = torch.nan
    inputs["value"][0, 1, 6, 2] = torch.inf
    for row in ((1, 0, 3), (0, 1, 6)):
        harmless["lr"][row] = 0.0
    options = dict(chunk_size=4, skip_nonfinite=True, max_norm=1.0, backend="cpp")
    results, expected = run(inputs, options), run(harmless, options)
    assert results.pop("skipped").tolist() == [1, 1]
    assert (~results.pop("surprise").isfinite()).sum() == 2
    for name, result in results.items():
        assert result.isfinite().all(), name
        if name.startswith("d_weights_") or name in ("out", "packed_weights", "d_query"):
            torch.testing.assert_close(result, expected[name], msg=name)


def test_opcheck():
    options, inputs = dict(chunk_size=3), make_inputs(T=6, dtype=torch.float32)
    state = call(cut(inputs, 0, 2), **options).state
    given = {n: t.requires_grad_() for n, t in inputs.items()}
    with Recorder() as recorder:
        call(given, state=state, **options, backend="cpp")
    ((operator, args, kwargs),) = recorder.calls
    leaf = lambda x: x.detach().requires_grad_(x.requires_grad)
    args = [leaf(x) if isinstance(x, torch.Tensor) else x for x in args]
    torch.library.opcheck(operator, tuple(args), kwargs)
