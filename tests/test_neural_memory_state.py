"""The neural memory's state, and what the operator refuses."""

import re
from dataclasses import replace

import pytest
import torch
from neural_memory_factories import call, cut, floating, make_inputs, run
from operator_contract import int32

from memattn import NeuralMemoryState, neural_memory

EQUAL = dict(rtol=1e-11, atol=1e-12)  # float64, another order of sums


def test_state_can_be_cropped_reset_selected_and_saved(tmp_path):
    inputs = make_inputs(T=11)
    options = dict(chunk_size=6)
    state = call(inputs, **options).state
    assert state.count.tolist() == [5, 5]
    # crop: as if the newest tokens had never come
    shorter = call(cut(inputs, 0, 8), **options).state
    cropped = state.crop(3)
    for actual, expected in zip(cropped.current()[0], shorter.current()[0], strict=True):
        torch.testing.assert_close(actual, expected, **EQUAL)
    rest = cut(inputs, 8, 11)
    again = call(rest, state=cropped, **options)
    torch.testing.assert_close(again.out, call(inputs, **options).out[:, :, 8:], **EQUAL)
    with pytest.raises(ValueError, match="n must be at most the tokens of the open chunk, 5, got"):
        state.crop(6)
    # reset: as if the row were new
    mask = torch.tensor([False, True])
    anew = call(rest, state=state.reset(mask), **options).out
    torch.testing.assert_close(anew[1], call(rest, **options).out[1], **EQUAL)
    torch.testing.assert_close(anew[0], call(rest, state=state, **options).out[0], **EQUAL)
    other = [2 * inputs["weights_1"], inputs["weights_2"]]
    changed = state.reset(mask, other)
    assert torch.equal(changed.weights[0][1], other[0])
    assert not changed.count[1] and changed.count[0] == 5
    # select: rows may repeat
    twice = state.select(torch.tensor([1, 1, 0]))
    assert torch.equal(twice.pending_h[0], twice.pending_h[1])
    assert torch.equal(twice.packed_weights[2], state.packed_weights[0])
    # save and load
    torch.save(state.tensors(), tmp_path / "state.pt")
    loaded = NeuralMemoryState.from_tensors(torch.load(tmp_path / "state.pt"))
    assert torch.equal(
        call(rest, state=loaded, **options).out, call(rest, state=state, **options).out
    )
    with pytest.raises(ValueError, match="tensors must have count"):
        NeuralMemoryState.from_tensors({n: t for n, t in state.tensors().items() if n != "count"})
    # detach: gradients stop
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    history = call(leaves, **options).state
    assert history.packed_weights.requires_grad and history.pending_h.requires_grad
    assert not any(t.requires_grad for t in floating(history.detach()).values())


def test_rows_behind_the_count_may_be_anything():
    inputs = make_inputs(T=9)
    state = call(cut(inputs, 0, 2), chunk_size=6).state
    dirty = {n: t.clone() for n, t in floating(state).items()}
    for name, tensor in dirty.items():
        if name.startswith("pending"):
            tensor[:, :, 2:] = torch.nan
    expected = run(inputs, dict(chunk_size=6, state=state))
    for name, result in run(inputs, dict(chunk_size=6, state=replace(state, **dirty))).items():
        assert torch.equal(result, expected[name]), name
    assert all(layer.isfinite().all() for layer in replace(state, **dirty).current()[0])


# ------------------------------------------------------------ bad input


def zeros(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs)


WRONG = {
    "query must have 4 axes": (ValueError, dict(query=zeros(2, 2, 13))),
    "query must have dtype": (ValueError, dict(query=zeros(2, 2, 13, 4).int())),
    "key must have shape [B=2, H=2, T=13, D=4], got [2, 1, 13, 4]": (
        ValueError,
        dict(key=zeros(2, 1, 13, 4)),
    ),
    "value must have the dtype of query": (ValueError, dict(value=zeros(2, 2, 13, 4).half())),
    "value must have Dv = D = 4 with residual=True, got 3": (
        ValueError,
        dict(
            value=zeros(2, 2, 13, 3).double(),
            weights=(zeros(2, 3, 4).double(),),
            residual=True,
        ),
    ),
    "lr must have shape [B=2, H=2, T=13]": (ValueError, dict(lr=zeros(2, 2, 12))),
    "lr must have dtype torch.float64 with a query of torch.float64": (
        ValueError,
        dict(lr=zeros(2, 2, 13)),
    ),
    "momentum must be a tensor, got float": (TypeError, dict(momentum=0.9)),
    "decay must have shape": (ValueError, dict(decay=zeros(2, 13))),
    "weights must be a tuple of layers, got Tensor": (TypeError, dict(weights=zeros(2, 4, 4))),
    "weights must have from 1 to 4 layers, got 0": (ValueError, dict(weights=())),
    "weights must have from 1 to 4 layers, got 5": (
        ValueError,
        dict(weights=(zeros(2, 4, 4).double(),) * 5),
    ),
    "weights[0] must have shape [H=2, d_1, D=4], got [2, 4, 5]": (
        ValueError,
        dict(weights=(zeros(2, 4, 5).double(), zeros(2, 4, 4).double())),
    ),
    "weights[1] must have shape [H=2, Dv=4, d_1=6], got [2, 4, 5]": (
        ValueError,
        dict(weights=(zeros(2, 6, 4).double(), zeros(2, 4, 5).double())),
    ),
    "chunk_size must be at least 1, got 0": (ValueError, dict(chunk_size=0)),
    "chunk_size must be an integer, got float": (TypeError, dict(chunk_size=4.0)),
    "read must be one of token, chunk, got 'start'": (ValueError, dict(read="start")),
    "activation must be one of gelu, silu": (ValueError, dict(activation="relu")),
    "loss must be one of l2, huber": (ValueError, dict(loss="l1")),
    "huber_delta must be positive and finite, got 0.0": (ValueError, dict(huber_delta=0.0)),
    "max_norm must be positive and finite, got -1": (ValueError, dict(max_norm=-1)),
    "max_norm must be a number, got str": (TypeError, dict(max_norm="1")),
    "clamp must be one of hard, soft": (ValueError, dict(clamp="none")),
    "skip_nonfinite must be True or False": (TypeError, dict(skip_nonfinite=1)),
    "seq_start must have dtype torch.int32": (ValueError, dict(seq_start=zeros(2))),
    "seq_end must be at least seq_start=3, got 1": (
        ValueError,
        dict(seq_start=int32(0, 3), seq_end=int32(9, 1)),
    ),
    "query must have B=1 with cu_seqlens": (ValueError, dict(cu_seqlens=int32(0, 13))),
    "state must be a NeuralMemoryState, got dict": (TypeError, dict(state={})),
    "backend must be one of": (ValueError, dict(backend="cuda")),
}


@pytest.mark.parametrize("message", WRONG)
def test_names_the_wrong_argument(message):
    error, change = WRONG[message]
    inputs = make_inputs()
    layers = tuple(t for n, t in inputs.items() if n.startswith("weights_"))
    named = {n: t for n, t in inputs.items() if not n.startswith("weights_")}
    with pytest.raises(error, match=re.escape(message)):
        neural_memory(**{**named, "weights": layers, **change})


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        (dict(B=3), {}, "state must be of B=3 sequences, got 2"),
        (dict(H=1), {}, "state must be of H=1 heads, got 2"),
        (
            dict(hidden=(7,)),
            {},
            "state must be of a memory with the sizes [4, 7, 4], got [4, 6, 4]",
        ),
        ({}, dict(chunk_size=5), "state must be of chunks of chunk_size=5, got 4"),
        (dict(momentum=False), {}, "state must have no momentum, as momentum is None, got one"),
        (dict(dtype=torch.float32), {}, "state must have dtype torch.float32 with a query of"),
        (dict(B=1), dict(cu_seqlens=int32(0, 13)), "state must be None with cu_seqlens"),
    ],
)
def test_a_state_of_another_memory_is_refused(sizes, options, message):
    state = call(make_inputs(), chunk_size=4).state
    with pytest.raises(ValueError, match=re.escape(message)):
        call(make_inputs(**sizes), state=state, **{"chunk_size": 4, **options})
