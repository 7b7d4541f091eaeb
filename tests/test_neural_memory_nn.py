"""The neural memory as a layer: one pass or many, padding, documents, its state, its rates."""

import pytest
import torch
from operator_contract import DOCUMENTS, int32
from torch.nn import functional as F

from memattn.nn import NeuralMemory, NeuralMemoryLayerState
from memattn.reference.neural_memory import memory_forward

EQUAL = dict(rtol=1e-10, atol=1e-11)  # float64, another order of sums


def make_layer(seed=0, **options):
    """A layer in float64 whose rates differ from token to token."""
    torch.manual_seed(seed)
    defaults = dict(hidden_size=6, num_heads=2, head_dim=4, expansion=2, chunk_size=4, lr=0.2)
    layer = NeuralMemory(**{**defaults, **options}).double()
    torch.nn.init.normal_(layer.rate_proj.weight, std=0.3)
    return layer


def make_hidden(B=2, T=13, E=6, seed=1):
    return torch.randn(B, T, E, generator=torch.Generator().manual_seed(seed)).double()


def in_calls(layer, hidden, bounds, state=None):
    """Outputs of calls that hand on their state, beside each other, and the last state."""
    outs = []
    for a, b in zip(bounds, bounds[1:], strict=False):
        out, state, _ = layer(hidden[:, a:b], state=state)
        outs.append(out)
    return torch.cat(outs, 1), state


def assert_same_state(actual, expected):
    for name, tensor in expected.tensors().items():
        if "pending" not in name:  # rows without a token may be anything
            torch.testing.assert_close(actual.tensors()[name], tensor, **EQUAL, msg=name)
    for a, b in zip(actual.memory.current()[0], expected.memory.current()[0], strict=True):
        torch.testing.assert_close(a, b, **EQUAL)


LAYERS = {
    "usual": {},
    "persistent": dict(num_persistent_tokens=5),
    "bare": dict(conv_size=1, momentum=None, decay=None, gate=False, depth=1),
    "options": dict(options=dict(activation="silu", residual=True, loss="huber", max_norm=0.5)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


@every_layer
def test_a_sequence_may_be_cut_anywhere(name):
    """Parts, and token by token, with gradients and without."""
    layer, hidden = make_layer(**LAYERS[name]), make_hidden()
    whole, state, surprise = layer(hidden)
    assert surprise.shape == (2, 2, 13) and not surprise.requires_grad
    for bounds in ([0, 2, 9, 13], list(range(14))):
        out, last = in_calls(layer, hidden, bounds)
        torch.testing.assert_close(out, whole, **EQUAL)
        assert_same_state(last, state)
    with torch.no_grad():
        out, last = in_calls(layer, hidden, [0, 3, *range(4, 14)])
    torch.testing.assert_close(out, whole, **EQUAL)
    assert_same_state(last, state)
    # nothing sees a later token, and everything learns
    changed = hidden.clone()
    changed[:, 7:] *= 2
    assert torch.equal(layer(changed).out[:, :7], whole[:, :7])
    assert not torch.equal(layer(changed).out[:, 7:], whole[:, 7:])
    whole.square().sum().backward()
    for parameter_name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), parameter_name


@every_layer
@pytest.mark.parametrize("sides", [(3, 0), (0, 2), (2, 4)], ids=str)
def test_padding_does_not_matter(name, sides):
    left, right = sides
    layer, hidden = make_layer(**LAYERS[name]), make_hidden()
    expected, state = in_calls(layer, hidden, [0, 6, 13])
    outs, last = [], None
    for a, b in ((0, 6), (6, 13)):
        padded = F.pad(hidden[:, a:b], (0, 0, left, right), value=torch.nan)
        bounds = dict(seq_start=int32(left, left), seq_end=int32(*[left + b - a] * 2))
        out, last, _ = layer(padded, state=last, **bounds)
        outs.append(out[:, left : left + b - a])
    torch.testing.assert_close(torch.cat(outs, 1), expected, **EQUAL)
    assert_same_state(last, state)
    # a row without a token keeps what it has
    _, same, _ = layer(padded, state=last, seq_start=int32(2, 2), seq_end=int32(2, 2))
    assert_same_state(same, last)


@every_layer
def test_packed_documents_are_separate(name):
    layer, hidden = make_layer(**LAYERS[name]), make_hidden(B=1, T=37)
    packed = layer(hidden, cu_seqlens=int32(*DOCUMENTS))
    for d, (a, b) in enumerate(zip(DOCUMENTS, DOCUMENTS[1:], strict=False)):
        alone = layer(hidden[:, a:b])
        torch.testing.assert_close(packed.out[:, a:b], alone.out, **EQUAL)
        torch.testing.assert_close(packed.surprise[..., a:b], alone.surprise, **EQUAL)
        assert_same_state(packed.state.select(torch.tensor([d])), alone.state)


def test_state_can_be_reset_merged_cropped_and_saved(tmp_path):
    layer, hidden = make_layer(num_persistent_tokens=3), make_hidden(T=16)
    with torch.no_grad():
        _, state, _ = layer(hidden[:, :6])
        rest = hidden[:, 6:]
        whole = layer(rest, state=state).out
        # reset: the other row goes on
        mask = torch.tensor([True, False])
        anew = layer(rest, state=state.reset(mask, layer.start())).out
        torch.testing.assert_close(anew[0], layer(rest).out[0], **EQUAL)
        torch.testing.assert_close(anew[1], whole[1], **EQUAL)
        # rows apart and together
        rows = [state.select(torch.tensor([r])) for r in (1, 0)]
        merged = NeuralMemoryLayerState.merge(rows)
        torch.testing.assert_close(layer(rest.flip(0), state=merged).out, whole.flip(0), **EQUAL)
        # crop: unlike numbers in the rows, over the end of a chunk, and in two steps
        _, drafts, _ = layer(rest[:, :4], state=state.record_past())
        back = drafts.crop(1).crop(torch.tensor([2, 0]))
        again = layer(torch.stack([rest[0, 1:7], rest[1, 3:9]]), state=back).out
        torch.testing.assert_close(again, torch.stack([whole[0, 1:7], whole[1, 3:9]]), **EQUAL)
        with pytest.raises(ValueError, match="n must be at most 4, the tokens since record_past"):
            drafts.crop(5)
        with pytest.raises(ValueError, match="n must be at most 0, the tokens since record_past"):
            state.crop(1)
        assert state.crop(0) is state
        # save and load, detach
        torch.save(state.tensors(), tmp_path / "state.pt")
        loaded = NeuralMemoryLayerState.from_tensors(torch.load(tmp_path / "state.pt"))
        assert torch.equal(layer(rest, state=loaded).out, whole)
    history = layer(hidden[:, :6]).state
    assert history.inputs.requires_grad and history.memory.packed_weights.requires_grad
    assert not any(t.requires_grad for t in history.detach().tensors().values())


def test_read_sees_the_weights_before_the_open_chunk():
    """And has a convolution of its own, which goes on from call to call."""
    layer, hidden = make_layer(), make_hidden(T=10)
    other = make_hidden(T=10, seed=5)
    state = layer(hidden[:, :9]).state
    out, after = layer.read(other, state)
    query = layer.q_conv(F.pad(layer.q_proj(other), (0, 0, 3, 0)), 10)
    query = F.normalize(F.silu(query).unflatten(-1, (2, 4)).transpose(1, 2), dim=-1)
    expected = memory_forward(state.memory.weights, query, False, False)[0]
    expected = layer.norm(expected).transpose(1, 2).flatten(2)
    expected = layer.o_proj(expected * layer.gate_proj(other).sigmoid())
    torch.testing.assert_close(out, expected, **EQUAL)
    first, between = layer.read(other[:, :4], state)
    second, last = layer.read(other[:, 4:], between)
    torch.testing.assert_close(torch.cat([first, second], 1), out, **EQUAL)
    torch.testing.assert_close(last.read_inputs, after.read_inputs, **EQUAL)
    # padding; and writing leaves it alone
    padded = F.pad(other, (0, 0, 2, 1), value=torch.nan)
    inner, again = layer.read(padded, state, seq_start=int32(2, 2), seq_end=int32(12, 12))
    torch.testing.assert_close(inner[:, 2:12], out, **EQUAL)
    torch.testing.assert_close(again.read_inputs, after.read_inputs, **EQUAL)
    assert layer(hidden[:, 9:], state=again).state.read_inputs is again.read_inputs


def test_rates_and_what_is_written():
    """A new layer has the rates it was asked for; keys and values may come from elsewhere."""
    layer = NeuralMemory(8, 2, lr=0.02, max_lr=0.5, momentum=0.6, decay=0.01)
    hidden, other = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    rates = layer.rate_proj(hidden).sigmoid().unflatten(-1, (3, 2))
    for rate, wanted in zip(rates.unbind(2), (0.04, 0.6, 0.01), strict=True):
        torch.testing.assert_close(rate, torch.full_like(rate, wanted))
    seen = layer(hidden, kv_states=other)
    torch.testing.assert_close(seen.surprise, layer(other).surprise)
    assert not torch.allclose(seen.out, layer(other).out)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(hidden)
    assert (
        half.out.dtype == torch.bfloat16 and half.state.memory.packed_weights.dtype == torch.float32
    )
    assert layer.bfloat16()(hidden.bfloat16()).out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(hidden_size=7, head_dim=None), "hidden_size must be divisible by num_heads=2, got 7"),
        (dict(depth=0), "depth must be at least 1, got 0"),
        (dict(depth=5), "depth must be at most 4, got 5"),
        (dict(chunk_size=0), "chunk_size must be at least 1, got 0"),
        (dict(conv_size=0), "conv_size must be at least 1, got 0"),
        (dict(num_persistent_tokens=-1), "num_persistent_tokens must be at least 0, got -1"),
        (dict(lr=2.0), "lr must be between 0 and max_lr=1.0, got 2.0"),
        (dict(momentum=1.0), "momentum must be between 0 and 1, got 1.0"),
        (dict(decay=0.0), "decay must be between 0 and 1, got 0.0"),
    ],
)
def test_names_the_wrong_argument(options, message):
    with pytest.raises(ValueError, match=message):
        make_layer(**options)


def test_a_state_beside_documents_or_of_another_layer_is_refused():
    layer, hidden = make_layer(), make_hidden(B=1)
    state = layer(hidden).state
    with pytest.raises(ValueError, match="state must be None with cu_seqlens"):
        layer(hidden, state=state, cu_seqlens=int32(0, 13))
    with pytest.raises(ValueError, match=r"kv_states must have shape \[B=1, T=13, E=6\]"):
        layer(hidden, kv_states=hidden[:, :5])
    with pytest.raises(ValueError, match="state must be of chunks of chunk_size=8, got 4"):
        make_layer(chunk_size=8)(hidden, state=state)
