"""The neural memory's state, and what the operator refuses."""

import copy
import pickle
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
    with pytest.raises(ValueError, match="n must be at most 5, what is kept of the open"):
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
    for name, wrong, message in (
        ("count", int32(5, 6), r"count must be from 0 to chunk_size - 1 = 5, got \[5, 6\]"),
        ("skipped", int32(0, 0), "state.skipped must have dtype torch.int64, got torch.int32"),
        (
            "pending_decay",
            zeros(2, 2, 4).double(),
            r"state.pending_decay must have shape \[2, 2, 5\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            NeuralMemoryState.from_tensors({**state.tensors(), name: wrong})
    with pytest.raises(ValueError, match="state.packed_momentum must have shape"):
        call(rest, state=replace(state, packed_momentum=state.packed_momentum[..., 1:]), **options)
    assert repr(state).startswith("NeuralMemoryState(R=2, H=2, sizes=(4, 6, 4), chunk_size=6")
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


# ------------------------------------------------------------ one token at a time


def steps(inputs, state, first, last, **options):
    """Outputs of steps beside each other, and the states after each."""
    outs, states = [], [state]
    for t in range(first, last):
        found = call(cut(inputs, t, t + 1), state=states[-1], **options)
        outs.append(found.out)
        states.append(found.state)
    return torch.cat(outs, 2), states


STEPS = {
    "plain": ({}, dict(chunk_size=4)),
    "deep": (dict(hidden=(5, 3, 4), momentum=False), dict(chunk_size=3, activation="silu")),
    "linear": (dict(hidden=(), decay=False), dict(chunk_size=1, residual=True)),
    "huber": (dict(Dv=3), dict(chunk_size=64, loss="huber", max_norm=0.5, clamp="soft")),
    "chunk-read": ({}, dict(chunk_size=4, read="chunk", max_norm=0.5)),
}


@pytest.mark.parametrize("name", STEPS)
def test_decoding_is_prefill(name):
    """Rows at unlike places of their chunks; also an update that is skipped."""
    sizes, options = STEPS[name]
    inputs = make_inputs(T=14, **sizes)
    inputs["key"][0, 1, 9] = torch.nan
    options = dict(options, skip_nonfinite=True)
    start = dict(seq_start=int32(2, 0), seq_end=int32(6, 5))
    state = call(cut(inputs, 0, 6), **start, **options).state
    with torch.no_grad():
        whole = call(cut(inputs, 6, 14), state=state, **options)
        out, states = steps(inputs, state, 6, 14, **options)
    torch.testing.assert_close(out, whole.out, **EQUAL)
    assert states[-1].skipped.tolist() == [1, 0]
    assert torch.equal(states[-1].count, whole.state.count)
    for n, expected in floating(whole.state).items():
        actual, expected = getattr(states[-1], n), expected.clone()
        if n.startswith("pending"):
            rows = torch.arange(actual.shape[2]) < states[-1].count[:, None]
            actual, expected = (x.movedim(1, 2)[rows] for x in (actual, expected))
        torch.testing.assert_close(actual, expected, **EQUAL, msg=n)


@torch.no_grad()
def test_a_step_writes_no_weights_and_changes_no_state():
    inputs = make_inputs(T=15)
    options = dict(chunk_size=5)
    state = call(cut(inputs, 0, 2), **options).state
    kept = {n: t.clone() for n, t in floating(state).items()}
    expected = call(cut(inputs, 2, 15), state=state, **options).out
    out, states = steps(inputs, state, 2, 15, **options)
    torch.testing.assert_close(out, expected, **EQUAL)
    assert all(torch.equal(getattr(state, n), t) for n, t in kept.items())
    # within a chunk all is in place: neither weights nor pending rows are copied
    for before, after in zip(states[4:7], states[5:8], strict=True):
        assert after.packed_weights is before.packed_weights
        assert after.packed_momentum is before.packed_momentum
        assert after.pending_h.data_ptr() == before.pending_h.data_ptr()
    # from any state one may go on, twice and into the next chunk, and get the same
    for t in (1, 3, 7, 4, 3, 12):
        again, _ = steps(inputs, states[t], 2 + t, 15, **options)
        torch.testing.assert_close(again, out[:, :, t:], **EQUAL)
    # a copy has rows of its own
    for copied in (copy.deepcopy(states[4]), pickle.loads(pickle.dumps(states[4]))):
        again, _ = steps(inputs, copied, 6, 15, **options)
        torch.testing.assert_close(again, out[:, :, 4:], **EQUAL)
    # beams: rows that go on apart
    pair = states[4].select(torch.tensor([1, 1]))
    other = {n: t if n.startswith("weights_") else t.flip(2) for n, t in inputs.items()}
    mixed = {n: t if n.startswith("weights_") else torch.stack([t[1], other[n][1]])
             for n, t in inputs.items()}  # fmt: skip
    split, _ = steps(mixed, pair, 6, 10, **options)
    torch.testing.assert_close(split[0], out[1, :, 4:8], **EQUAL)
    apart, _ = steps(other, states[4], 6, 10, **options)
    torch.testing.assert_close(split[1], apart[1], **EQUAL)


@torch.no_grad()
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_a_state_that_records_goes_back_into_the_last_chunk(chunk_size):
    """Assisted decoding: drafts are written in one call, and any number of them is taken back."""
    inputs = make_inputs(T=16)
    options = dict(chunk_size=chunk_size)
    start = dict(seq_start=int32(1, 0), seq_end=int32(5, 2))
    state = call(cut(inputs, 0, 5), **start, **options).state.record_past()
    rest = call(cut(inputs, 5, 16), state=state, **options).out
    drafts = call(cut(inputs, 5, 5 + chunk_size), state=state, **options)
    torch.testing.assert_close(drafts.out, rest[:, :, :chunk_size], **EQUAL)
    for n in range(chunk_size + 1):
        back = drafts.state.crop(n)
        kept = chunk_size - n
        again = call(cut(inputs, 5 + kept, 16), state=back, **options)
        torch.testing.assert_close(again.out, rest[:, :, kept:], **EQUAL)
    # twice in a row, after a call longer than a chunk, and with absent tokens between
    bounds = dict(seq_start=int32(0, 1), seq_end=int32(11, 0 + 11))
    longer = call(cut(inputs, 5, 16), state=state, **bounds, **options).state
    once = longer.crop(1)
    if chunk_size > 1:
        once = once.crop(chunk_size - 1)
    last = cut(inputs, 16 - chunk_size, 16)
    expected = call(cut(inputs, 5, 16), state=state, **bounds, **options).out
    again = call(last, state=once, **options).out
    torch.testing.assert_close(again, expected[:, :, 11 - chunk_size :], **EQUAL)
    with pytest.raises(ValueError, match=r"n must be at most \d+, what is kept"):
        longer.crop(3 * chunk_size)
    with pytest.raises(ValueError, match="n must be at most"):
        longer.reset(torch.tensor([True, False])).crop(1)
    moved = longer.select(torch.tensor([1, 0])).crop(chunk_size)
    swapped = {n: t if n.startswith("weights_") else t.flip(0) for n, t in last.items()}
    torch.testing.assert_close(call(swapped, state=moved, **options).out, again.flip(0), **EQUAL)


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
