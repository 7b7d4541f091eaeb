"""What every operator must show on every backend; ``operator_specs.py`` says for which inputs."""

import pytest
import torch
from operator_contract import (
    COMPILED,
    CUDA,
    DEVICE,
    DOCUMENTS,
    DTYPES,
    EVERY,
    INTERPRETED,
    assert_near,
    assert_same,
    check,
    int32,
    needs_triton,
    over,
    queries,
    reference_params,
)
from operator_specs import SPECS, having
from torch.nn import functional as F

pytestmark = pytest.mark.operator
every_operator = pytest.mark.parametrize("spec", SPECS, ids=str)
every_backend = pytest.mark.parametrize("backend", EVERY)
compiled_backends = pytest.mark.parametrize("backend", COMPILED)
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


# ------------------------------------------------------------ against the definition in float64


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("spec", "backend", "dtype", "case", "options"), reference_params(SPECS))
def test_matches_reference(spec, backend, dtype, case, options):
    """Values and every gradient, those through ``lse`` too; memory that is not written is NaN."""
    tensors, own = spec.make(case, backend, dtype)
    spec.check(tensors, {**own, **options})


@over(SPECS, "gradcheck")
def test_reference_gradcheck(spec, case):
    tensors, options = spec.make(case, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in tensors.values()]
    for variant in spec.variants.values():
        if variant.get("detach_target"):
            continue  # no gradient of what it computes

        def function(*args, variant=variant):
            results = spec.run(dict(zip(tensors, args, strict=True)), {**options, **variant})
            return tuple(r for r in results if r.isfinite().all())

        torch.autograd.gradcheck(function, leaves)


@pytest.mark.usefixtures("poisoned_memory")
@every_backend
@over(SPECS, "empty")
def test_empty_inputs(spec, case, backend):
    """Nothing to see gives zeros, and ``lse = -inf``."""
    tensors, options = spec.make(case, backend)
    for variant in spec.each_variant(backend):
        results = spec.check(tensors, {**options, **variant})
        if not any(t.numel() for name, t in tensors.items() if name not in spec.batched):
            for name, result in results.items():
                assert not result.nan_to_num(neginf=0.0).any(), name


LARGE = {torch.float32: 5e3, torch.bfloat16: 5e3, torch.float16: 60.0}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_backend
@every_operator
def test_large_scores(spec, backend, dtype):
    """Unscaled products beyond float16, scores at which float32 resolves no integers."""
    tensors, options = spec.make(spec.large, backend, dtype)
    tensors = {
        name: tensor if name.endswith("value") else tensor * LARGE[dtype]
        for name, tensor in tensors.items()
    }
    names = [*spec.rows, *(f"d_{name}" for name in tensors if name.endswith("value"))]
    for variant in spec.each_variant(backend):
        # parts of the future below what float16 holds: the definition, which rounds them, has no
        # gradient of their cosine
        is_known = dtype != torch.float16 or variant.get("loss_type") != "cosine"
        known = names if is_known else spec.rows
        actual = check(spec.operator, tensors, {**options, **variant}, known)
        if is_known or backend == "cpp":  # which rounds none of them
            assert all(result.isfinite().all() for result in actual.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_backend
@every_operator
def test_large_equal_scores(spec, backend, dtype):
    """Keys that are all alike: the weights are equal, and ``lse`` is known."""
    size = 40.0 if dtype == torch.float16 else 133120.0
    step = torch.finfo(dtype).eps
    tensors, options = spec.make(spec.large, backend, dtype)
    plain = {
        name: tensor if name.endswith("value") else torch.zeros_like(tensor)
        for name, tensor in tensors.items()
    }
    large = {
        name: tensor if name.endswith("value") else torch.full_like(tensor, size)
        for name, tensor in tensors.items()
    }
    expected, actual = (spec.gradients(inputs, options) for inputs in (plain, large))
    for name, result in actual.items():
        assert result.isfinite().all(), name
    torch.testing.assert_close(
        actual["lse"].double(), expected["lse"].double() + size**2 * 8, rtol=max(1e-6, step), atol=0
    )
    for name in (*spec.rows, *(f"d_{name}" for name in tensors if name.endswith("value"))):
        if name != "lse":
            # in half precision lse is rounded too, to float32
            near = {} if dtype == torch.float32 else dict(rtol=4 * step, atol=step)
            torch.testing.assert_close(actual[name], expected[name], **near, msg=name)


# ------------------------------------------------------------ what holds without a reference


@every_backend
@over(SPECS, "causal")
def test_a_later_token_changes_nothing_before_it(spec, case, backend):
    tensors, options = spec.make(case, backend)
    before = spec.run(tensors, options)._asdict()
    for t in (1, 20, 36):
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        for name in spec.tokens:
            changed[name][..., t:, :] += 1.0
        after = spec.run(changed, options)._asdict()
        for name in spec.rows:
            assert torch.equal(queries(name, before, 0, t), queries(name, after, 0, t)), name
        assert not torch.equal(before["out"][..., t:, :], after["out"][..., t:, :])


@every_backend
@over(SPECS, "padded")
def test_padding_does_not_matter(spec, case, backend):
    """NaN on the left, on the right and on both sides; rows of padding are empty."""
    tensors, options = spec.make(case, backend)
    alone = spec.run(tensors, options)._asdict()
    for left, right in ((5, 0), (0, 5), (3, 2)):
        padded = {
            name: F.pad(tensor, (0, 0, left, right), value=torch.nan)
            if name in spec.tokens
            else tensor
            for name, tensor in tensors.items()
        }
        padded, more = spec.pad(padded, options, left, right)
        bounds = {
            "seq_start": int32(left, device=DEVICE[backend]),
            "seq_end": int32(left + 21, device=DEVICE[backend]),
        }
        for given in (bounds, {n: t for n, t in bounds.items() if left or n == "seq_end"}):
            results = spec.run(padded, {**more, **given})._asdict()
            for name in spec.rows:
                inner = queries(name, results, left, left + 21)
                torch.testing.assert_close(inner, alone[name], msg=name)
                sides = [(0, left), (left + 21, left + 21 + right)]
                pad = torch.cat([queries(name, results, *side).flatten() for side in sides])
                empty = torch.full_like(pad, -torch.inf if name == "lse" else 0.0)
                assert torch.equal(pad, empty), name
            for name in spec.means:
                torch.testing.assert_close(results[name], alone[name])


@every_backend
@over(SPECS, "packed")
def test_packed_documents_are_separate(spec, case, backend):
    tensors, options = spec.make(case, backend)
    bounds = {"cu_seqlens": int32(*DOCUMENTS, device=DEVICE[backend])}
    packed = spec.run(tensors, {**options, **bounds})._asdict()
    sums = dict.fromkeys(spec.means, 0.0)
    counts = dict.fromkeys(spec.means, 0)
    for d, (a, b) in enumerate(zip(DOCUMENTS, DOCUMENTS[1:], strict=False)):
        own = {n: t[..., a:b, :] if n in spec.tokens else t for n, t in tensors.items()}
        alone = spec.run(*spec.document(own, options, d, a, b))._asdict()
        for name in spec.rows:
            torch.testing.assert_close(queries(name, packed, a, b), alone[name], msg=name)
        for name, count in spec.means.items():
            sums[name] += alone[name] * count(b - a)
            counts[name] += count(b - a)
    for name in spec.means:
        torch.testing.assert_close(packed[name], sums[name] / counts[name])


@every_backend
@over(SPECS, "unseen")
def test_what_no_query_sees_may_be_anything(spec, case, backend):
    """NaN and infinity in keys of no query, and in queries without keys, in the tile of others."""
    tensors, options = spec.make(case, backend)
    for variant in spec.each_variant(backend):
        if variant.get("detach_target"):
            continue  # then a gradient of 0 does not mean that nobody looks
        expected = spec.check(tensors, {**options, **variant})
        unseen = {}
        for name, tensor in tensors.items():
            if name.endswith("query"):
                rows = expected["lse"].isneginf()
            else:  # a value that a query sees has a weight above 0
                rows = (expected[f"d_{name.replace('key', 'value')}"] == 0).all(-1)
            unseen[name] = rows[..., None].expand_as(tensor)
            assert not expected[f"d_{name}"][unseen[name]].any(), name
        assert any(rows.any() for rows in unseen.values())
        for anything in (torch.nan, torch.inf):
            dirty = {n: t.masked_fill(unseen[n], anything) for n, t in tensors.items()}
            assert_same(spec.gradients(dirty, {**options, **variant}), expected)


STRIDES = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "heads last": lambda t: t.movedim(-3, -2).contiguous().movedim(-2, -3),
    "gaps": lambda t: F.pad(t, (3, 5))[..., 3:-5],
    "every second": lambda t: torch.stack([t, t], -1)[..., 0],
}


@every_backend
@every_operator
def test_strides_do_not_matter(spec, backend):
    """Each form in all inputs, and the forms mixed; in the interpreter mixed in two ways."""
    tensors, options = spec.make(spec.small, backend)
    expected = spec.gradients(tensors, options)
    forms = list(STRIDES.values())
    mixed = {n: forms[i % len(forms)](t) for i, (n, t) in enumerate(tensors.items())}
    views = [{n: form(t) for n, t in tensors.items()} for form in forms]
    if backend == "triton" and INTERPRETED:
        views = [{n: forms[-1 - i % len(forms)](t) for i, (n, t) in enumerate(tensors.items())}]
    # torch's products add in an order that depends on strides
    same = assert_near if backend == "reference" else assert_same
    for inputs in (*views, mixed):
        assert not inputs["query"].is_contiguous()
        same(spec.gradients(inputs, options), expected)


@every_backend
@every_operator
def test_expanded_inputs(spec, backend):
    """A batch of views of one sequence gives what the sequence gives, in gradients too."""
    tensors, options = spec.make(spec.small, backend, B=1)
    if "task_id" in options:
        options["task_id"] = 0
    alone = spec.run(tensors, options)._asdict()
    batch, options = (
        {n: t.expand(3, *t.shape[1:]) if n in spec.batched else t for n, t in named.items()}
        for named in (tensors, options)
    )
    wide = spec.run(batch, options)._asdict()
    for name in spec.rows:
        torch.testing.assert_close(wide[name], alone[name].expand_as(wide[name]), msg=name)
    for name in spec.means:
        torch.testing.assert_close(wide[name], alone[name])
    plain = {name: tensor.contiguous() for name, tensor in batch.items()}
    same = assert_near if backend == "reference" else assert_same
    same(spec.gradients(batch, options), spec.gradients(plain, options))


@needs_triton
@pytest.mark.parametrize("spec", having("triton"), ids=str)
def test_output_of_triton_has_the_memory_order_of_the_query(spec):
    tensors, options = spec.make(spec.small, "triton")
    tensors["query"] = tensors["query"].transpose(1, 2).contiguous().transpose(1, 2)
    out = spec.run(tensors, options).out
    assert out.transpose(1, 2).is_contiguous() and not out.is_contiguous()


@every_backend
@every_operator
def test_backward_repeats_bit_for_bit(spec, backend):
    tensors, options = spec.make(spec.repeated, backend)
    for variant in spec.each_variant(backend):
        first, *others = (spec.gradients(tensors, {**options, **variant}) for _ in range(3))
        for again in others:
            assert_same(again, first)


@every_backend
@every_operator
def test_autocast(spec, backend):
    tensors, options = spec.make(spec.small, backend)
    with torch.autocast(DEVICE[backend], torch.bfloat16):
        actual = spec.run(tensors, options)
    assert actual.out.dtype == torch.bfloat16
    low = {
        name: tensor if name in spec.float32 else tensor.bfloat16()
        for name, tensor in tensors.items()
    }
    for result, expected in zip(actual, spec.run(low, options), strict=True):
        assert torch.equal(result, expected)
