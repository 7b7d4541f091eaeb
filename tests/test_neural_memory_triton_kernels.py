"""The neural memory in Triton: the definition in float64, and what is special in its kernels."""

import pytest
import torch
from neural_memory_factories import call, check, cut, make_inputs, run, small_steps
from operator_contract import DEVICE, INTERPRETED, Recorder, assert_same, int32, needs_triton

pytestmark = [pytest.mark.operator, needs_triton]

# sizes of the inputs, options, tokens that a state holds already
CASES = {
    # several tiles of tokens and of features in the interpreter
    "tiles": (dict(T=19, D=17, Dv=33, hidden=(33,)), dict(chunk_size=17, max_norm=0.5), 5),
    "depth-1": (dict(B=2, hidden=(), T=9), dict(chunk_size=4, seq_end=int32(9, 5)), 2),
    "groups": (dict(H=2, T=9, hidden=(6,)), dict(chunk_size=4, return_state=False), 0),
    "documents": (dict(B=1, T=11), dict(chunk_size=4, cu_seqlens=int32(0, 0, 1, 6, 11)), 0),
    "depth-3": (
        dict(T=4, hidden=(20, 24)),
        dict(chunk_size=4, residual=True, loss="huber", huber_delta=0.3, max_norm=0.4,
             clamp="soft"),
        3,
    ),
    "depth-4, plain": (
        dict(T=3, hidden=(20, 24, 18), momentum=False, decay=False),
        dict(chunk_size=4, activation="silu"),
        2,
    ),
    "chunk-read": (dict(H=2, T=7), dict(chunk_size=3, read="chunk"), 2),
}  # fmt: skip
HALF = ("depth-1", "documents")
ONE = dict(B=1, H=1, D=16, hidden=(24,))
# the interpreter takes seconds for each head of a sequence, so it has one of a case; alone one may
# miss the budget by its draw, and these do not. A GPU pools the error of many
POOLED, SEEDS = (ONE, 1) if INTERPRETED else (ONE | dict(B=12, H=12), 2)


def check_case(case: str, dtype: torch.dtype) -> None:
    sizes, options, before = CASES[case]
    device = DEVICE["triton"]
    options = {n: o.to(device) if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    check("triton", POOLED | sizes | dict(dtype=dtype, device=device), options, before, SEEDS)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case):
    """Values, the state and every gradient; memory that is not written is NaN."""
    check_case(case, torch.float32)


@pytest.mark.parametrize("case", HALF if INTERPRETED else CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_matches_reference_in_half_precision(case, dtype):
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bfloat16 wrongly")
    check_case(case, dtype)


def test_launches_and_strides_change_no_bit(monkeypatch):
    """Scratch for one head at a time, and tensors that are not contiguous."""
    from memattn_kernels.neural_memory import launch

    sizes = dict(B=2, H=1, T=4, D=8, hidden=(8,))
    inputs = small_steps(**sizes, dtype=torch.float32, device=DEVICE["triton"])
    options = dict(chunk_size=3, backend="triton")
    expected = run(inputs, options)
    monkeypatch.setattr(launch, "SCRATCH_BYTES", 1)
    views = {n: torch.stack([t, t], -1)[..., 0].mT.contiguous().mT for n, t in inputs.items()}
    assert_same(run(views, options), expected)


def test_skipped_updates_leave_no_trace():
    inputs = make_inputs(B=2, H=1, T=5, dtype=torch.float32, device=DEVICE["triton"])
    harmless = {n: t.clone() for n, t in inputs.items()}
    inputs["key"][1, 0, 1] = torch.nan
    inputs["value"][0, 0, 2, 2] = torch.inf
    for row in ((1, 0, 1), (0, 0, 2)):
        harmless["lr"][row] = 0.0
    options = dict(chunk_size=4, skip_nonfinite=True, max_norm=1.0)
    results = run(inputs, {**options, "backend": "triton"})
    expected = run(harmless, {**options, "backend": "reference"})
    assert results.pop("skipped").tolist() == [1, 1]
    assert (~results.pop("surprise").isfinite()).sum() == 2
    for name, result in results.items():
        assert result.isfinite().all(), name
        if name.startswith("d_weights_") or name in ("out", "packed_weights", "d_query"):
            torch.testing.assert_close(result, expected[name], msg=name)


def test_no_tokens_and_gradients_of_the_state_alone():
    """A call without tokens passes weights on; one whose output is not used has a gradient."""
    inputs = small_steps(**ONE, T=4, dtype=torch.float32, device=DEVICE["triton"])
    options = dict(chunk_size=3, backend="triton")
    empty = call(cut(inputs, 0, 0), **options)
    assert empty.out.shape == (1, 1, 0, 16) and not empty.state.count.any()
    layers = [inputs[n].flatten() for n in ("weights_1", "weights_2")]
    assert torch.equal(empty.state.packed_weights.flatten(), torch.cat(layers))
    found = {}
    for backend in ("triton", "reference"):
        leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
        state = call(leaves, **{**options, "backend": backend}).state
        loss = state.packed_weights.square().sum() + state.pending_delta.sum()
        found[backend] = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    for actual, expected in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(actual, expected)


def test_opcheck():
    inputs = make_inputs(B=1, H=1, T=1, dtype=torch.float32, device=DEVICE["triton"])
    state = call(cut(inputs, 0, 1), chunk_size=2, backend="reference").state
    given = {n: t.requires_grad_() for n, t in inputs.items()}
    with Recorder() as recorder:
        call(given, state=state, chunk_size=2, backend="triton")
    ((operator, args, kwargs),) = recorder.calls
    leaf = lambda x: x.detach().requires_grad_(x.requires_grad)
    args = [leaf(x) if isinstance(x, torch.Tensor) else x for x in args]
    torch.library.opcheck(operator, tuple(args), kwargs)
