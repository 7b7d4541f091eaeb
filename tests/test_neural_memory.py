"""The neural memory: its definition against loops, identities, gradients, and what it refuses."""

import importlib
import math
from dataclasses import replace

import pytest
import torch
from neural_memory_factories import call, cut, floating, make_inputs, run
from operator_contract import DOCUMENTS, int32
from torch.nn import functional as F

from memattn import NeuralMemoryState
from memattn.reference.neural_memory import memory_sizes, pack
from memattn.reference.neural_memory import neural_memory as by_chunks
from memattn.reference.neural_memory_loops import neural_memory_loops

HIDDEN = [(), (6,), (5, 3), (4, 3, 5)]  # depth 1 to 4
OPTIONS = {
    "plain": dict(),
    "chunk-read": dict(read="chunk"),
    "residual": dict(activation="silu", residual=True),
    "huber": dict(loss="huber", huber_delta=0.3),
    "hard": dict(max_norm=0.5),
    "soft": dict(max_norm=0.5, clamp="soft"),
}
EQUAL = dict(rtol=1e-11, atol=1e-12)  # float64, another order of sums


def arguments(monkeypatch, tensors, **options):
    """What the reference is called with."""
    seen = []
    monkeypatch.setattr(
        "memattn.reference.neural_memory.neural_memory",
        lambda args: seen.append(args) or by_chunks(args),
    )
    call(tensors, **options)
    monkeypatch.undo()
    return seen[0]


def in_steps(tensors, bounds, **options):
    """The outputs of calls that hand on their state, beside each other, and the last state."""
    outs, state = [], None
    for first, last in zip(bounds, bounds[1:], strict=False):
        found = call(cut(tensors, first, last), state=state, **options)
        outs.append(found.out)
        state = found.state
    return torch.cat(outs, 2), state


def assert_same_state(actual, expected, **near):
    """The same numbers; the operator has zeros in rows that hold no token."""
    assert torch.equal(actual.count, expected.count)
    assert torch.equal(actual.skipped, expected.skipped)
    for name, tensor in floating(expected).items():
        torch.testing.assert_close(getattr(actual, name), tensor, **near, msg=name)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("hidden", HIDDEN, ids=lambda h: f"depth{len(h) + 1}")
def test_chunked_form_is_the_double_loop(monkeypatch, hidden, option):
    """Values and every gradient, after a state with tokens in its open chunk."""
    kinds = {1: {}, 2: {"momentum": False}, 3: {}, 64: {"decay": False}}
    for b in (3, *{0: (1, 2), 1: (1, 64), 2: (2,), 3: (64,)}[len(hidden)]):
        inputs = make_inputs(B=1, H=1, T=7, hidden=hidden, **kinds[b])
        options = dict(chunk_size=b, **OPTIONS[option])
        state = call(cut(inputs, 0, 2), **options).state
        args = arguments(monkeypatch, cut(inputs, 2, 7), state=state, **options)
        leaves = {n: x.clone().requires_grad_() for n, x in args._asdict().items()
                  if isinstance(x, torch.Tensor) and x.is_floating_point()}  # fmt: skip
        args = args._replace(**leaves)
        found, loops = by_chunks(args), neural_memory_loops(args)
        chunked = dict(zip(("out", "surprise", "chunk_weights"), found[:3], strict=True))
        after = NeuralMemoryState(
            *found[2:], initial=args.start_weights[0], sizes=tuple(memory_sizes(args))
        )
        after = replace(after, packed_momentum=None) if args.momentum is None else after
        weights, momentum = after.current()
        chunked |= {"weights": pack(weights), "count": after.count}
        if momentum is not None:
            chunked |= {"chunk_momentum": after.packed_momentum, "momentum": pack(momentum)}
        for name, result in chunked.items():
            torch.testing.assert_close(result, getattr(loops, name), **EQUAL, msg=name)
        names = ["out", "weights", "chunk_weights"]
        names += [] if momentum is None else ["momentum", "chunk_momentum"]
        generator = torch.Generator().manual_seed(2)
        draws = [torch.randn(chunked[n].shape, generator=generator).double() for n in names]
        grads = [
            torch.autograd.grad(results, list(leaves.values()), draws, allow_unused=True)
            for results in ([chunked[n] for n in names], [getattr(loops, n) for n in names])
        ]
        for name, actual, expected in zip(leaves, *grads, strict=True):
            assert (actual is None) == (expected is None) or not actual.any(), name
            if expected is not None:
                torch.testing.assert_close(actual, expected, **EQUAL, msg=f"d_{name}")


def test_chunk_size_1_is_the_recurrence_of_the_paper():
    """Equations 11 to 14, with the gradient at the newest weights, written for one head."""
    inputs = make_inputs(B=1, H=1, T=6)
    found = call(inputs, chunk_size=1)
    layers = [inputs["weights_1"][0], inputs["weights_2"][0]]
    surprise = [torch.zeros_like(layer) for layer in layers]
    network = lambda layers, x: layers[1] @ F.gelu(layers[0] @ x)
    for t in range(6):
        q, k, v, lr, eta, alpha = (
            inputs[n][0, 0, t] for n in ("query", "key", "value", "lr", "momentum", "decay")
        )
        at = [layer.detach().requires_grad_() for layer in layers]
        loss = (network(at, k) - v).square().sum() / 2
        gradient = torch.autograd.grad(loss, at)
        surprise = [eta * s - lr * u for s, u in zip(surprise, gradient, strict=True)]
        layers = [(1 - alpha) * m + s for m, s in zip(layers, surprise, strict=True)]
        torch.testing.assert_close(found.out[0, 0, t], network(layers, q), **EQUAL)
        norm = sum(u.square().sum() for u in gradient).sqrt()
        torch.testing.assert_close(found.surprise[0, 0, t], norm, **EQUAL)
    assert not found.state.count.any()
    for actual, expected in zip(found.state.weights, layers, strict=True):
        torch.testing.assert_close(actual[0, 0], expected, **EQUAL)


def test_linear_memory_of_chunk_size_1_is_the_gated_delta_rule():
    """With lr = beta g, value / g and g = 1 - decay; not so for larger chunks."""
    inputs = make_inputs(hidden=(), momentum=False)
    gate, beta = 1 - inputs["decay"], inputs["lr"]
    mapped = inputs | {"lr": beta * gate, "value": inputs["value"] / gate[..., None]}
    memory = inputs["weights_1"].expand(2, -1, -1, -1)
    outs = []
    for t in range(13):
        q, k, v = (inputs[n][:, :, t] for n in ("query", "key", "value"))
        memory = gate[:, :, t, None, None] * memory
        error = v - torch.einsum("bhij,bhj->bhi", memory, k)
        memory = memory + beta[:, :, t, None, None] * error[..., None] * k[:, :, None]
        outs.append(torch.einsum("bhij,bhj->bhi", memory, q))
    expected = torch.stack(outs, 2)
    found = call(mapped, chunk_size=1)
    torch.testing.assert_close(found.out, expected, **EQUAL)
    torch.testing.assert_close(found.state.weights[0], memory, **EQUAL)
    assert (call(mapped, chunk_size=2).out - expected).abs().max() > 1e-3


def test_without_a_learning_rate_it_only_decays():
    inputs = make_inputs()
    inputs["lr"] = torch.zeros_like(inputs["lr"])
    weights, momentum = call(inputs, chunk_size=4).state.current()
    kept = (1 - inputs["decay"]).prod(-1)[..., None, None]
    for n, layer in enumerate(weights):
        torch.testing.assert_close(layer, kept * inputs[f"weights_{n + 1}"], **EQUAL)
        assert not momentum[n].any()


@pytest.mark.parametrize("hidden", HIDDEN[:2], ids=["depth1", "depth2"])
def test_total_decay_and_no_momentum_have_gradients(hidden):
    """Rows where ratios of products would be 0 / 0: all results are finite and continuous."""
    inputs = make_inputs(hidden=hidden)
    inputs["decay"][:, :, [0, 4, 5]] = 1.0
    inputs["momentum"][:, :, [1, 4, 6]] = 0.0
    exact = run(inputs, dict(chunk_size=5))
    near = inputs | {n: inputs[n] * (1 - 1e-9) + 1e-10 for n in ("decay", "momentum")}
    for name, result in run(near, dict(chunk_size=5)).items():
        torch.testing.assert_close(exact[name], result, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("option", ["plain", "chunk-read", "soft"])
def test_a_sequence_may_be_cut_anywhere(option):
    """Two parts, or token by token: outputs, states and gradients are those of one call."""
    inputs = make_inputs(T=11)
    options = dict(chunk_size=4, **OPTIONS[option])
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    whole = call(leaves, **options)
    cotangent = torch.randn(whole.out.shape, generator=torch.Generator().manual_seed(3)).double()

    def gradients(out, state):
        results = [out, *(layer for layers in state.current() for layer in layers)]
        draws = [cotangent, *(torch.ones_like(r) for r in results[1:])]
        return torch.autograd.grad(results, list(leaves.values()), draws)

    expected = gradients(whole.out, whole.state)
    for bounds in ([0, 5, 11], [0, 4, 4, 11], list(range(12))):
        out, state = in_steps(leaves, bounds, **options)
        torch.testing.assert_close(out, whole.out, **EQUAL)
        assert_same_state(state, whole.state, **EQUAL)
        for name, *grads in zip(leaves, gradients(out, state), expected, strict=True):
            torch.testing.assert_close(*grads, **EQUAL, msg=name)


@pytest.mark.parametrize("sides", [(5, 0), (0, 5), (3, 2)], ids=str)
def test_absent_tokens_change_nothing(sides):
    """Padding of NaN around momentum that is not zero; the next part goes on where it stopped."""
    left, right = sides
    inputs = make_inputs(T=15)
    options = dict(chunk_size=4, max_norm=0.7)
    expected, state = in_steps(inputs, [0, 6, 15], **options)

    def padded(first, last):
        tokens = cut(inputs, first, last)
        padded = {
            n: F.pad(t, (0, 0) * (t.dim() - 3) + (left, right), value=torch.nan)
            for n, t in tokens.items()
            if not n.startswith("weights_")
        }
        bounds = dict(seq_start=int32(left, left), seq_end=int32(*[left + last - first] * 2))
        return {**tokens, **padded}, bounds

    before, bounds = padded(0, 6)
    first = call(before, **bounds, **options)
    assert first.state.packed_momentum.any() and first.state.pending_delta.any()
    after, bounds = padded(6, 15)
    second = call(after, state=first.state, **bounds, **options)
    out = torch.cat([x.out[:, :, left : x.out.shape[2] - right] for x in (first, second)], 2)
    torch.testing.assert_close(out, expected, **EQUAL)
    assert_same_state(second.state, state, **EQUAL)
    for x in (second.out, second.surprise):
        assert not x[:, :, :left].any() and not x[:, :, x.shape[2] - right :].any()
    # an empty part passes everything on, and gradients of absent tokens are 0
    nothing = call(after, state=first.state, seq_start=int32(3, 3), seq_end=int32(3, 3), **options)
    assert_same_state(nothing.state, first.state, rtol=0, atol=0)
    results = run(after, dict(state=first.state, **bounds, **options))
    for name, tensor in after.items():
        assert results[f"d_{name}"].isfinite().all()
        if not name.startswith("weights_"):
            assert not results[f"d_{name}"][tensor.isnan()].any()


def test_rows_of_a_batch_do_not_know_of_each_other():
    """Rows of unlike lengths and places in their chunks: permuted, alone and together."""
    inputs = make_inputs(B=3, T=10)
    options = dict(chunk_size=4)
    first = dict(seq_start=int32(4, 0, 2), seq_end=int32(10, 10, 9))
    state = call(inputs, **first, **options).state
    assert state.count.tolist() == [2, 2, 3]
    bounds = dict(seq_start=int32(0, 3, 1), seq_end=int32(9, 10, 4))
    found = call(inputs, state=state, **bounds, **options)
    order = torch.tensor([2, 0, 1])
    permuted = {n: t if n.startswith("weights_") else t[order] for n, t in inputs.items()}
    moved = {n: t[order] for n, t in bounds.items()}
    other = call(permuted, state=state.select(order), **moved, **options)
    torch.testing.assert_close(other.out, found.out[order], **EQUAL)
    assert_same_state(other.state, found.state.select(order), **EQUAL)
    for r in range(3):
        a, b = bounds["seq_start"][r], bounds["seq_end"][r]
        own = {n: t if n.startswith("weights_") else t[r : r + 1] for n, t in inputs.items()}
        alone = call(cut(own, a, b), state=state.select(torch.tensor([r])), **options)
        torch.testing.assert_close(found.out[r, :, a:b], alone.out[0], **EQUAL)
        assert_same_state(found.state.select(torch.tensor([r])), alone.state, **EQUAL)


def test_packed_documents_are_separate():
    inputs = make_inputs(B=1, T=37)
    options = dict(chunk_size=4)
    packed = call(inputs, cu_seqlens=int32(*DOCUMENTS), **options)
    for d, (a, b) in enumerate(zip(DOCUMENTS, DOCUMENTS[1:], strict=False)):
        alone = call(cut(inputs, a, b), **options)
        torch.testing.assert_close(packed.out[:, :, a:b], alone.out, **EQUAL)
        torch.testing.assert_close(packed.surprise[:, :, a:b], alone.surprise, **EQUAL)
        assert_same_state(packed.state.select(torch.tensor([d])), alone.state, **EQUAL)


@pytest.mark.parametrize("clamp", ["hard", "soft"])
def test_the_clamp_enlarges_nothing_and_is_finite_at_0(clamp):
    """Against the most used implementation: small norms stay, no NaN where the gradient is 0."""
    inputs = make_inputs(B=1, H=1, T=1)
    options = dict(max_norm=0.5, clamp=clamp, chunk_size=2)
    for size in (0.0, 1e-9, 1e-3, 1.0, 1e3):
        given = inputs | {n: size * inputs[n] for n in ("key", "value")}
        results = run(given, options)
        assert all(r.isfinite().all() for r in results.values()), size
        n = float(results["surprise"])
        update = float(pack(call(given, **options).state.current()[1]).norm() / inputs["lr"])
        assert (n > 100) == (size > 100) and (n == 0) == (size == 0)
        assert update <= min(n, 0.5) * (1 + 1e-12)
        wanted = min(n, 0.5) if clamp == "hard" else 0.5 * math.tanh(n / 0.5)
        assert update == pytest.approx(wanted, rel=1e-11)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e200])
def test_updates_that_are_not_finite_are_skipped_and_counted(bad):
    inputs = make_inputs(T=9)
    harmless = {n: t.clone() for n, t in inputs.items()}
    inputs["key"][1, 0, 3] = bad
    inputs["value"][0, 1, 6, 2] = bad
    for row in ((1, 0, 3), (0, 1, 6)):
        harmless["lr"][row] = 0.0
    if bad == 1e200:  # in float32 only what overflows
        inputs, harmless = ({n: t.float() for n, t in x.items()} for x in (inputs, harmless))
    options = dict(chunk_size=4, skip_nonfinite=True, max_norm=1.0)
    results, expected = run(inputs, options), run(harmless, options)
    assert results.pop("skipped").tolist() == [1, 1] and not expected.pop("skipped").any()
    assert (~results.pop("surprise").isfinite()).sum() == 2
    kept = call(inputs, chunk_size=4)
    assert not kept.out.isfinite().all() and not kept.state.skipped.any()
    for name, result in results.items():
        assert result.isfinite().all(), name
        if name.startswith("d_weights_") or name in ("out", "packed_weights", "d_query"):
            torch.testing.assert_close(result, expected[name], msg=name)


@pytest.mark.parametrize("option", OPTIONS)
def test_gradcheck(option):
    """Of all inputs, the layers, and the state, with and without one; depth 1 to 3."""
    T, hidden = {"residual": (2, (2, 3)), "huber": (2, ()), "soft": (2, ())}.get(option, (3, (2,)))
    inputs = make_inputs(B=1, H=1, T=T + 2, D=2, hidden=hidden)
    options = dict(chunk_size=3, **OPTIONS[option])  # the state has two tokens already
    state = call(cut(inputs, 0, 2), **options).state
    for given in (None, state):
        tensors = cut(inputs, 2, T + 2)
        if given is not None:
            tensors |= {f"state_{n}": t for n, t in floating(given).items()}
        tensors = {n: t.clone().requires_grad_() for n, t in tensors.items()}

        def function(*values, given=given, names=tuple(tensors)):
            found = call(dict(zip(names, values, strict=True)), state=given, **options)
            return (found.out, *floating(found.state).values())

        torch.autograd.gradcheck(function, list(tensors.values()), fast_mode=option != "plain")


def test_nothing_sees_a_later_token():
    inputs = make_inputs(T=10)
    for options in (dict(chunk_size=4), dict(chunk_size=4, read="chunk")):
        before = call(inputs, **options)
        for t in (1, 5, 9):
            tokens = {n: x for n, x in inputs.items() if not n.startswith("weights_")}
            changed = {n: torch.cat([x[:, :, :t], x[:, :, t:] / 2], 2) for n, x in tokens.items()}
            after = call(inputs | changed, **options)
            assert torch.equal(before.out[:, :, :t], after.out[:, :, :t])
            assert not torch.equal(before.out[:, :, t:], after.out[:, :, t:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_summed_in_float32(dtype):
    """Results are those of float32 inputs with the same values, rounded once; also by autocast."""
    inputs = make_inputs(dtype=torch.float32)
    tokens = ("query", "key", "value")
    half = inputs | {n: inputs[n].to(dtype) for n in tokens}
    wide = inputs | {n: half[n].float() for n in tokens}
    expected = call(wide, chunk_size=4)
    found = call(half, chunk_size=4)
    assert found.out.dtype == dtype and found.surprise.dtype == torch.float32
    assert torch.equal(found.out, expected.out.to(dtype))
    assert_same_state(found.state, expected.state, rtol=0, atol=0)
    with torch.autocast("cpu", dtype):
        assert torch.equal(call(wide, chunk_size=4).out, found.out)


@pytest.mark.usefixtures("new_programs")
def test_second_derivatives_and_compilation():
    inputs = make_inputs(B=1, H=1, T=3, hidden=(3,))
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch._dynamo.reset()
    state = None
    for _ in range(2):
        found = compiled(inputs, chunk_size=2, state=state)
        expected = call(inputs, chunk_size=2, state=state)
        torch.testing.assert_close(found.out, expected.out, **EQUAL)
        assert_same_state(found.state, expected.state, **EQUAL)
        state = found.state
    key = inputs["key"].requires_grad_()
    (first,) = torch.autograd.grad(
        call(inputs, chunk_size=2).out.square().sum(), key, create_graph=True
    )
    (second,) = torch.autograd.grad(first.square().sum(), key)
    assert second.abs().max() > 0


def test_auto_leaves_out_kernels_that_no_gpu_has_checked(monkeypatch):
    module = importlib.import_module("memattn.ops.neural_memory")
    monkeypatch.setattr(module, "resolve_backend", lambda *_: "triton")
    choose = module._choose
    query = torch.empty(1)
    assert (choose("auto", query), choose("triton", query)) == ("reference", "triton")
