"""The neural memory in C++: the definition in float64, every instruction set, and by itself."""

import pytest
import torch
from neural_memory_factories import call, cut, make_inputs, run
from operator_contract import DTYPES, Recorder, assert_same, int32, needs_cpp
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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
    "documents": (dict(B=1, T=90), dict(chunk_size=4, cu_seqlens=int32(0, 0, 1, 37, 88, 90)), 0),
    "padded": (dict(T=90), dict(chunk_size=4, seq_start=int32(1, 9), seq_end=int32(90, 71)), 3),
    "empty": (dict(T=9), dict(chunk_size=4, seq_start=int32(0, 3), seq_end=int32(9, 3)), 6),
}  # fmt: skip


def check(case, dtype, seeds=4):
    """Assert the error rule over several inputs: a few numbers may be exact by luck."""
    sizes, options, before = CASES[case]
    found = {}
    for seed in range(seeds):
        inputs, given = make_inputs(**sizes, dtype=dtype, seed=seed), dict(options)
        if before:
            past = make_inputs(**{**sizes, "T": before}, dtype=dtype, seed=seed)
            alike = {n: o for n, o in options.items() if not n.startswith("seq_")}
            weights = {n: t for n, t in inputs.items() if n.startswith("weights_")}
            given["state"] = call({**past, **weights}, **alike, backend="reference").state
        three = [
            run(inputs, {**given, "backend": backend}, wide)
            for backend, wide in (("cpp", None), ("reference", None), ("reference", torch.float64))
        ]
        for name in set(three[0]) & {"count", "skipped"}:
            assert torch.equal(*(results.pop(name) for results in three[:2]))
        for name in three[0]:
            found.setdefault(name, []).append([results[name].flatten() for results in three])
    for name, draws in found.items():
        assert_within_budget(name, *(torch.cat(which) for which in zip(*draws, strict=True)))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case, dtype):
    """Values, the state and every gradient; memory that is not written is NaN."""
    check(case, dtype, seeds=4 if dtype == torch.float32 else 1)


@pytest.mark.parametrize("name", ["avx2", "portable"])
@pytest.mark.parametrize("case", ["depth2", "depth3", "no-momentum"])
def test_every_instruction_set(case, name):
    ops = torch.ops.memattn_cpp
    before = ops.cpu_capability()
    ops.set_cpu_capability(name)
    try:
        check(case, torch.float32)
    finally:
        ops.set_cpu_capability(before)


def test_results_do_not_depend_on_threads():
    inputs = make_inputs(B=3, T=40, hidden=(40,), dtype=torch.float32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run(inputs, dict(chunk_size=8, backend="cpp")))
    finally:
        torch.set_num_threads(before)
    for again in found[1:]:
        assert_same(again, found[0])


def test_absent_tokens_and_strides_do_not_matter():
    """NaN around the tokens, and tensors that are not contiguous: the same bits."""
    inputs = make_inputs(T=20, D=6, hidden=(9,), dtype=torch.float32)
    options = dict(chunk_size=6, backend="cpp")
    expected = run(inputs, options)
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
    views = {n: torch.stack([t, t], -1)[..., 0].mT.contiguous().mT for n, t in inputs.items()}
    assert_same(run(views, options), expected)


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
    options = dict(chunk_size=3)
    inputs = make_inputs(T=6, dtype=torch.float32)
    state = call(cut(inputs, 0, 2), **options).state
    for more in (dict(state=state), dict(cu_seqlens=int32(0, 2, 6), return_state=False)):
        given = make_inputs(B=2 if "state" in more else 1, T=6, dtype=torch.float32)
        given = {n: t.requires_grad_() for n, t in given.items()}
        with Recorder() as recorder:
            call(given, **options, **more, backend="cpp")
        ((operator, args, kwargs),) = recorder.calls
        torch.library.opcheck(operator, args, kwargs)


def test_compiles_once_for_all_lengths():
    function = lambda inputs: call(inputs, chunk_size=4, backend="cpp")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for T in (7, 12, 33):
            inputs = make_inputs(T=T, dtype=torch.float32)
            inputs = {n: t.requires_grad_() for n, t in inputs.items()}
            results = []
            for which in (compiled, function):
                found = which(inputs)
                loss = found.out.square().sum() + found.state.packed_weights.sum()
                results.append([found.out, *torch.autograd.grad(loss, list(inputs.values()))])
            for actual, expected in zip(*results, strict=True):
                torch.testing.assert_close(actual, expected)


def test_differentiable_once_and_recomputable():
    inputs = make_inputs(T=6, dtype=torch.float32)
    inputs = {n: t.requires_grad_() for n, t in inputs.items()}
    function = lambda *given: call(
        dict(zip(inputs, given, strict=True)), chunk_size=4, backend="cpp"
    ).out
    out = checkpoint(function, *inputs.values(), use_reentrant=False)
    expected = function(*inputs.values())
    grads = [torch.autograd.grad(x.sum(), list(inputs.values())) for x in (out, expected)]
    for actual, wanted in zip(*grads, strict=True):
        assert torch.equal(actual, wanted)
    (first,) = torch.autograd.grad(
        function(*inputs.values()).square().sum(), inputs["key"], create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiable once; backend='reference'"):
        first.square().sum().backward()
