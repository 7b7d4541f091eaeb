"""A token of the neural memory whose update is not finite: nothing before it may know."""

import pytest
import torch
from neural_memory_factories import call, cut, make_inputs
from operator_contract import needs_cpp

BACKENDS = ["reference", pytest.param("cpp", marks=needs_cpp)]
BAD = {
    "key": (5, torch.nan),
    "value": ((5, 2), torch.inf),
    "lr": (5, torch.nan),
}
LOST = (1, 0)  # the sequence and the head


@pytest.mark.parametrize("momentum", [True, False], ids=["momentum", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BAD)
def test_nothing_before_it_changes(name, backend, momentum):
    """In its own chunk too, in one call, in two, token by token; all that follows is NaN."""
    options = dict(chunk_size=8, backend=backend)
    inputs = make_inputs(T=11, dtype=torch.float32, momentum=momentum, decay=momentum)
    expected = call(inputs, **options)
    at, value = BAD[name]
    inputs[name][(*LOST, *(at if isinstance(at, tuple) else (at,)))] = value

    def check(out):
        kept = torch.ones(2, 2, 11, dtype=torch.bool)
        kept[LOST][5:] = False
        torch.testing.assert_close(out[kept], expected.out[kept])
        assert out[~kept].isnan().all()

    whole = call(inputs, **options)
    assert torch.equal(whole.out[:, :, :5], expected.out[:, :, :5])
    check(whole.out)
    assert whole.state.packed_weights[LOST].isnan().all()
    with torch.no_grad():
        for bounds in ([0, 4, 11], [0, 6, 11], [0, 3, *range(4, 12)]):
            outs, state, states = [], None, {}
            for first, last in zip(bounds, bounds[1:], strict=False):
                found = call(cut(inputs, first, last), state=state, **options)
                outs.append(found.out)
                states[last] = state = found.state
            check(torch.cat(outs, 2))
    # taken back, it has never been
    assert states[6].current()[0][0][LOST].isnan().all()
    again = call(cut(inputs, 7, 11), state=states[7].crop(2), **options)
    assert again.out.isfinite().all()
    assert not whole.state.skipped.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_that_overflows_alone_is_no_loss(backend):
    """The square is beyond float32, the update is not: it is written as it is."""
    inputs = make_inputs(B=1, H=1, T=4, dtype=torch.float32, momentum=False)
    inputs["value"][0, 0, 1] = 1e25
    inputs["lr"][0, 0, 1] = 1e-25
    out = call(inputs, chunk_size=4, backend=backend).out
    wide = call({n: t.double() for n, t in inputs.items()}, chunk_size=4).out
    torch.testing.assert_close(out, wide.float())
