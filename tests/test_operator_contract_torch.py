"""Every operator beside PyTorch's own machinery; ``operator_specs.py`` says for which inputs."""

import pytest
import torch
import torch._dynamo.testing
from operator_contract import (
    COMPILED,
    CUDA,
    EVERY,
    Recorder,
    assert_near,
    assert_same,
    over,
)
from operator_specs import SPECS, having
from torch.utils.checkpoint import checkpoint

from memattn.testing import run_with_gradients

pytestmark = pytest.mark.operator
every_operator = pytest.mark.parametrize("spec", SPECS, ids=str)
every_backend = pytest.mark.parametrize("backend", EVERY)
compiled_backends = pytest.mark.parametrize("backend", COMPILED)
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


@compiled_backends
@over(SPECS, "opcheck")
def test_opcheck(spec, case, backend):
    """Of the registered operators that the operator calls, with the arguments that they get."""
    tensors, options = spec.make(case, backend)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    for variant in spec.each_variant(backend):
        with Recorder() as recorder:
            spec.run(leaves, {**options, **variant})
        assert recorder.calls
        for operator, args, kwargs in recorder.calls:
            assert any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)
            # an operator may hand on views of its inputs, which are no leaves
            args = [
                arg.detach().requires_grad_(arg.requires_grad)
                if isinstance(arg, torch.Tensor)
                else arg
                for arg in args
            ]
            torch.library.opcheck(operator, args, kwargs)


@every_backend
@over(SPECS, "compiled")
def test_compiles_once_for_all_lengths(spec, case, backend):
    """Values and gradients as without compilation, in one graph, at the first call and later."""
    compiled = torch.compile(spec.operator, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for T in (9, 18):  # odd and even, within a tile and over it
            tensors, options = spec.make(case(T), backend)
            actual = run_with_gradients(compiled, tensors, options)
            # torch's products may be traced into others
            same = assert_near if backend == "reference" else assert_same
            same(actual, spec.gradients(tensors, options))


@compiled_backends
@over(SPECS, "compiled")
def test_compiles_at_a_second_length(spec, case, backend):
    """As torch does it when nothing is said: for one length, then for all others."""
    counter = torch._dynamo.testing.CompileCounter()  # the other test compiles further
    compiled = torch.compile(spec.operator, fullgraph=True, backend=counter)
    torch._dynamo.reset()
    for T in (9, 14, 18):
        tensors, options = spec.make(case(T), backend)
        for actual, expected in zip(
            compiled(**tensors, **options), spec.run(tensors, options), strict=True
        ):
            torch.testing.assert_close(actual, expected)
    assert counter.frame_count <= 2


@every_backend
@every_operator
def test_second_derivatives(spec, backend):
    """Kernels refuse them, which they do not have; the reference has them."""
    tensors, options = spec.make(spec.small, backend)
    query = tensors["query"].requires_grad_()
    for variant in spec.each_variant(backend):
        out = spec.run(tensors, {**options, **variant}).out
        (first,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
        if backend == "reference":
            (second,) = torch.autograd.grad(first.square().sum(), query)
            assert second.abs().max() > 0
            continue
        with pytest.raises(RuntimeError, match="differentiable once; backend='reference'"):
            first.square().sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["plain", "reentrant"])
@every_backend
@every_operator
def test_activation_checkpointing(spec, backend, use_reentrant):
    """Computing again changes no bit, of results or gradients."""
    tensors, options = spec.make(spec.small, backend)

    def gradients(function):
        leaves = [t.detach().clone().requires_grad_() for t in tensors.values()]
        outputs = function(*leaves)
        # reentrant checkpoints know no torch.autograd.grad
        sum(out.float().square().sum() for out in outputs).backward()
        return [*outputs, *(leaf.grad for leaf in leaves)]

    for variant in spec.each_variant(backend):

        def call(*inputs, variant=variant):
            return tuple(spec.run(dict(zip(tensors, inputs, strict=True)), {**options, **variant}))

        def recomputed(*inputs, call=call):
            return checkpoint(call, *inputs, use_reentrant=use_reentrant)

        for actual, expected in zip(gradients(recomputed), gradients(call), strict=True):
            assert (actual is None) == (expected is None)
            assert actual is None or torch.equal(actual, expected)


# ------------------------------------------------------------ on CUDA


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@over(having("triton"), "gpu_large")
def test_gradients_repeat_bit_for_bit(spec, case, dtype):
    tensors, options = spec.make(case, "triton", dtype)
    for variant in spec.each_variant("triton", few=True):
        first = spec.gradients(tensors, {**options, **variant})
        for _ in range(100):
            assert_same(spec.gradients(tensors, {**options, **variant}), first)
