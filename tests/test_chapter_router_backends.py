"""The router of chapters: every backend against the definition in float64, and by itself."""

import pytest
import torch
from operator_contract import (
    COMPILED,
    DEVICE,
    DTYPES,
    EVERY,
    INTERPRETED,
    MARKS,
    Recorder,
    assert_same,
)
from router_factories import LOSSES, check, make_inputs, run
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memattn import chapter_router

pytestmark = pytest.mark.operator
every_backend = pytest.mark.parametrize("backend", EVERY)
compiled_backends = pytest.mark.parametrize("backend", COMPILED)
CASES = {
    "one": (dict(B=1, N=1), dict(top_k=2)),
    "small": (dict(), dict(top_k=3, num_shared=2, routed_scale=2.5, temperature=0.7)),
    "all": (dict(bias=False), dict(top_k=6)),
    "odd": (dict(N=19, E=13, C=40), dict(top_k=5, normalisation="sum")),
    "tiles": (dict(B=1, N=35, E=40, C=130), dict(top_k=9, num_shared=1)),
    "single": (dict(B=3, N=4, C=1), dict(top_k=1)),
    "float32-weights": (dict(N=5, weight_dtype=torch.float32), dict(top_k=2)),
}
# interpreted: what differs in kind
FEW = {torch.float32: tuple(CASES), torch.float16: ("small", "float32-weights"),
       torch.bfloat16: ("small",)}  # fmt: skip
MATCHES = [
    pytest.param(backend, dtype, case, marks=MARKS[backend], id=f"{backend}-{dtype}-{case}")
    for backend in ("cpp", "triton")
    for dtype in DTYPES
    for case in (CASES if backend == "cpp" or not INTERPRETED else FEW[dtype])
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("backend", "dtype", "case"), MATCHES)
def test_matches_reference(backend, dtype, case):
    """Values and every gradient; memory that is not written is NaN."""
    sizes, options = CASES[case]
    device, draws = DEVICE[backend], []
    for seed in range(3):
        tensors = make_inputs(**sizes, dtype=dtype, device=device, seed=seed)
        valid = torch.arange(tensors["hidden"].shape[:2].numel()) % 3 != seed
        valid = valid.view(tensors["hidden"].shape[:2]).to(device)
        draws.append((tensors, dict(valid=valid) if seed else {}))
    check(draws, options, backend)


@compiled_backends
@pytest.mark.parametrize("name", ["weights", *LOSSES])
def test_each_gradient_alone(backend, name):
    """A result that nobody uses has no cotangent."""
    draws = [(make_inputs(N=7, C=20, device=DEVICE[backend], seed=seed), {}) for seed in range(2)]
    check(draws, dict(top_k=3, num_shared=1, temperature=1.5), backend, (name,))


# ------------------------------------------------------------ which chapters


def assert_valid_choice(indices, tensors, num_shared=0, temperature=1.0):
    """The choice is one of the float64 logits, up to what float32 may round."""
    x, w = (tensors[name].double().cpu() for name in ("hidden", "weight"))
    b = tensors["bias"].double().cpu() if "bias" in tensors else torch.zeros(len(w)).double()
    logits = (x @ w.T + b) / temperature
    # each product, sum, bias and quotient rounds once
    steps = x.shape[-1] + 3
    bound = steps * torch.finfo(torch.float32).eps / 2 * (x.abs() @ w.abs().T + b.abs())
    bound = 2 * bound.amax(-1, keepdim=True) / temperature
    assert (indices[..., :num_shared].cpu() == torch.arange(num_shared)).all()
    chosen = indices[..., num_shared:].long().cpu() - num_shared
    values = logits.gather(-1, chosen)
    assert (values[..., 1:] <= values[..., :-1] + bound).all()
    others = logits.scatter(-1, chosen, -torch.inf)
    assert (others <= values[..., -1:] + bound).all()
    assert (chosen.sort(-1).values.diff(dim=-1) > 0).all()  # each once


@every_backend
@pytest.mark.parametrize("top_k", [1, 8, 64])
def test_choice_is_that_of_the_logits(backend, top_k):
    C = 300 if backend == "triton" and INTERPRETED else 1500
    tensors = make_inputs(B=1, N=40, E=48, C=C, device=DEVICE[backend])
    options = dict(top_k=top_k, num_shared=1, temperature=0.3)
    found = chapter_router(**tensors, **options, backend=backend)
    assert_valid_choice(found.indices, tensors, 1, 0.3)


@every_backend
@pytest.mark.parametrize("top_k", [1, 7, 64])
def test_large_gaps_and_ties_are_exact(backend, top_k):
    """Integer logits, many of them equal; equal columns of weights anywhere; -0 is 0."""
    device = DEVICE[backend]
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randint(-3, 4, (2, 9, 16), generator=generator).float()
    few = torch.randint(-2, 3, (40, 16), generator=generator).float()
    weight = few[torch.randint(40, (333,), generator=generator)]
    weight[::50] = 0.0
    for values in (weight, weight * 0.5, weight * 0, weight * -0.0):
        found = chapter_router(
            hidden.to(device), values.to(device), top_k=top_k, backend=backend
        ).indices.cpu()
        sign = 0 if not values.any() else 1
        logits = sign * (hidden @ weight.T)
        expected = logits.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
        assert torch.equal(found.long(), expected)


@every_backend
def test_rows_are_alone(backend):
    """Alone, among others and at another place a row has the same chapters and weights."""
    C = 70 if backend == "triton" and INTERPRETED else 700
    tensors = make_inputs(B=1, N=77, E=50, C=C, device=DEVICE[backend])
    call = lambda hidden: chapter_router(
        **{**tensors, "hidden": hidden}, top_k=9, routed_scale=1.3, backend=backend
    )
    whole = call(tensors["hidden"])
    for rows in (slice(0, 1), slice(20, 21), slice(76, 77), slice(5, 38), slice(10, 77)):
        part = call(tensors["hidden"][:, rows])
        if backend == "reference":  # torch's products add in an order that depends on sizes
            torch.testing.assert_close(part.weights, whole.weights[:, rows])
            continue
        assert torch.equal(part.indices, whole.indices[:, rows])
        assert torch.equal(part.weights, whole.weights[:, rows])


@every_backend
def test_chapters_have_no_place(backend):
    """Chapters in another order are the same chapters, to the bit."""
    tensors = make_inputs(N=5, E=50, C=90, device=DEVICE[backend])
    order = torch.randperm(90, generator=torch.Generator().manual_seed(2)).to(DEVICE[backend])
    moved = {n: t if n == "hidden" else t[order] for n, t in tensors.items()}
    call = lambda given: chapter_router(**given, top_k=4, backend=backend)
    first, second = call(tensors), call(moved)
    assert torch.equal(first.indices.long(), order[second.indices.long()])
    if backend != "reference":
        assert torch.equal(first.weights, second.weights)
    torch.testing.assert_close(first.load[order], second.load)


# ------------------------------------------------------------ what rows may hold


@compiled_backends
def test_invalid_rows_may_hold_anything(backend):
    tensors = make_inputs(device=DEVICE[backend])
    valid = torch.ones(2, 9, dtype=torch.bool, device=DEVICE[backend])
    valid[0, 3] = valid[1, 8] = False
    options = dict(top_k=2, num_shared=1, valid=valid)
    expected = run(tensors, options, backend)
    assert (expected["indices"][~valid] == -1).all() and not expected["weights"][~valid].any()
    for anything in (torch.nan, torch.inf):
        dirty = {**tensors, "hidden": tensors["hidden"].masked_fill(~valid[..., None], anything)}
        assert_same(run(dirty, options, backend), expected)
    assert not expected["d_hidden"][~valid].any()


@compiled_backends
def test_nan_stays_in_its_row_and_counts_as_minus_infinity(backend):
    tensors = make_inputs(C=40, device=DEVICE[backend])
    expected = chapter_router(**tensors, top_k=3, backend=backend)
    hidden = tensors["hidden"].clone()
    hidden[0, 3] = torch.nan
    found = chapter_router(**{**tensors, "hidden": hidden}, top_k=3, backend=backend)
    assert found.weights[0, 3].isnan().all() and found.indices[0, 3].tolist() == [0, 1, 2]
    assert found.z_loss.isnan()
    rest = torch.ones(2, 9, dtype=torch.bool)
    rest[0, 3] = False
    assert torch.equal(found.weights[rest], expected.weights[rest])
    assert torch.equal(found.indices[rest], expected.indices[rest])
    # NaN and minus infinity are equal, so the lower chapter is first
    bias = torch.full((40,), -torch.inf, device=hidden.device)
    bias[5], bias[20], bias[30] = torch.nan, 100.0, 200.0
    for k in (2, 6):
        mixed = chapter_router(**{**tensors, "bias": bias}, top_k=k, backend=backend)
        assert (mixed.indices.cpu() == torch.tensor([30, 20, 0, 1, 2, 3])[:k]).all()


@every_backend
def test_closed_chapters(backend):
    """A bias of minus infinity closes a chapter: the others do not see that it is there."""
    tensors = make_inputs(C=9, device=DEVICE[backend])
    more = {n: F.pad(t, (0, 0, 0, 2)) for n, t in tensors.items() if n == "weight"}
    more["bias"] = F.pad(tensors["bias"], (0, 2), value=-torch.inf)
    names = ("weights", "z_loss")
    found = run({**tensors, **more}, dict(top_k=3), backend, names)
    expected = run(tensors, dict(top_k=3), backend, names)
    for name in ("indices", "weights", "z_loss", "entropy", "d_hidden"):
        torch.testing.assert_close(found[name], expected[name], msg=name)
    assert not found["d_weight"][9:].any() and not found["d_bias"][9:].any()


@pytest.mark.usefixtures("poisoned_memory")
@every_backend
@pytest.mark.parametrize("sizes", [dict(B=0), dict(N=0), dict(E=0)], ids=str)
def test_empty_inputs(backend, sizes):
    tensors = make_inputs(**sizes, device=DEVICE[backend])
    check([(tensors, {})], dict(top_k=2, num_shared=1), backend)


@compiled_backends
def test_without_valid_rows(backend):
    tensors = make_inputs(device=DEVICE[backend])
    valid = torch.zeros(2, 9, dtype=torch.bool, device=DEVICE[backend])
    found = run(tensors, dict(top_k=2, valid=valid), backend)
    assert (found.pop("indices") == -1).all()
    assert not any(result.any() for result in found.values())


STRIDES = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "gaps": lambda t: F.pad(t, (3, 5))[..., 3:-5],
    "every second": lambda t: torch.stack([t, t], -1)[..., 0],
}


@every_backend
@pytest.mark.parametrize("form", STRIDES)
def test_strides_do_not_matter(backend, form):
    tensors = make_inputs(N=21, E=24, C=33, device=DEVICE[backend])
    valid = (torch.arange(42) % 5 > 0).view(2, 21).to(DEVICE[backend])
    expected = run(tensors, dict(top_k=4, valid=valid), backend)
    views = {name: STRIDES[form](tensor) for name, tensor in tensors.items()}
    found = run(views, dict(top_k=4, valid=valid.mT.contiguous().mT), backend)
    if backend == "reference":
        for name, result in found.items():
            torch.testing.assert_close(result, expected[name], msg=name)
    else:
        assert_same(found, expected)


@every_backend
def test_autocast_does_not_round_logits(backend):
    tensors = make_inputs(C=40, device=DEVICE[backend])
    with torch.autocast(DEVICE[backend], torch.bfloat16):
        found = chapter_router(**tensors, top_k=3, backend=backend)
    expected = chapter_router(**tensors, top_k=3, backend=backend)
    for name, result in found._asdict().items():
        assert torch.equal(result, getattr(expected, name)), name


# ------------------------------------------------------------ beside PyTorch's own machinery


@compiled_backends
@pytest.mark.parametrize("options", [dict(num_shared=1), dict(temperature=0.5)], ids=str)
def test_opcheck(backend, options):
    device = DEVICE[backend]
    tensors = {n: t.requires_grad_() for n, t in make_inputs(N=4, device=device).items()}
    if "temperature" in options:
        del tensors["bias"]
        options = {**options, "valid": torch.tensor([[True, False, True, True]] * 2, device=device)}
    with Recorder() as recorder:
        chapter_router(**tensors, top_k=2, **options, backend=backend)
    ((operator, args, kwargs),) = recorder.calls
    torch.library.opcheck(operator, args, kwargs)


@every_backend
def test_compiles_once_for_all_lengths(backend):
    def call(hidden, weight, bias):
        found = chapter_router(hidden, weight, bias, top_k=2, num_shared=1, backend=backend)
        return found.indices, found.weights, found.load_balance_loss + found.auxiliary_loss

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for N in (5, 9, 14):
            tensors = make_inputs(N=N, device=DEVICE[backend])
            leaves = [t.requires_grad_() for t in tensors.values()]
            results = []
            for function in (compiled, call):
                indices, weights, loss = function(*leaves)
                grads = torch.autograd.grad(weights.square().sum() + loss, leaves)
                results.append([indices, weights, loss, *grads])
            for actual, expected in zip(*results, strict=True):
                torch.testing.assert_close(actual, expected)


@every_backend
def test_second_derivatives(backend):
    tensors = make_inputs(N=4, device=DEVICE[backend])
    hidden = tensors["hidden"].requires_grad_()
    z_loss = chapter_router(**tensors, top_k=2, backend=backend).z_loss
    (first,) = torch.autograd.grad(z_loss, hidden, create_graph=True)
    if backend == "reference":
        (second,) = torch.autograd.grad(first.square().sum(), hidden)
        assert second.any()
        return
    with pytest.raises(RuntimeError, match="differentiable once; backend='reference'"):
        first.square().sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["plain", "reentrant"])
@every_backend
def test_activation_checkpointing(backend, use_reentrant):
    tensors = make_inputs(N=5, device=DEVICE[backend])

    def call(*inputs):
        found = chapter_router(**dict(zip(tensors, inputs, strict=True)), top_k=2, backend=backend)
        return found.weights, found.load_balance_loss, found.z_loss

    def gradients(function):
        leaves = [t.detach().clone().requires_grad_() for t in tensors.values()]
        outputs = function(*leaves)
        sum(out.square().sum() for out in outputs).backward()
        return [*outputs, *(leaf.grad for leaf in leaves)]

    recomputed = lambda *inputs: checkpoint(call, *inputs, use_reentrant=use_reentrant)
    for actual, expected in zip(gradients(recomputed), gradients(call), strict=True):
        assert torch.equal(actual, expected)


@compiled_backends
def test_backward_repeats_bit_for_bit(backend):
    tensors = make_inputs(B=1, N=35, C=50, device=DEVICE[backend])
    first, *others = (run(tensors, dict(top_k=4), backend) for _ in range(3))
    for again in others:
        assert_same(again, first)
