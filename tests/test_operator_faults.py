"""Faults that operators once had, each as the right value for all operators and backends."""

import math

import pytest
import torch
from model_factories import enable_checkpointing
from operator_contract import DEVICE, EVERY, INSTRUCTION_SETS, needs_cpp
from task_mask_factories import make_mask
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from memattn import (
    MemAttnConfig,
    MemAttnForCausalLM,
    future_attention,
    future_attention_loss,
    segmented_attention,
    task_masked_attention,
)
from memattn.bench.inputs import make_future_inputs, make_segmented_inputs
from memattn.testing import assert_results_within_budget, run_with_gradients

pytestmark = pytest.mark.operator

OPERATORS = {
    "segmented": segmented_attention,
    "future": future_attention,
    "future_loss": future_attention_loss,
    "task_masked": task_masked_attention,
}


def make_inputs(name: str, T: int = 9, device: str = "cpu", **sizes) -> tuple[dict, dict]:
    """Small tensors and options of an operator."""
    sizes = dict(B=1, H=2, Hkv=1, D=16, T=T, device=device) | sizes
    if name.startswith("future"):
        options = dict(future_dim=3)
        if name == "future_loss":
            options["detach_target"] = False
        return make_future_inputs(**sizes), options
    if name == "task_masked":
        mask = make_mask(form="graph", n=1, T=T, S=T).to(device)
        return make_segmented_inputs(**sizes), dict(task_mask=mask, task_id=0)
    sizes = dict(P=2, M=5, segment_len=4) | sizes
    return make_segmented_inputs(**sizes), dict(segment_len=4)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("name", OPERATORS)
def test_activation_checkpointing_changes_nothing(name, backend, use_reentrant):
    tensors, options = make_inputs(name, device=DEVICE[backend])
    options["backend"] = backend
    operator = OPERATORS[name]

    leaves = {name: t.requires_grad_() for name, t in tensors.items()}

    def run(*values):
        return tuple(operator(**dict(zip(leaves, values, strict=True)), **options))

    results = []
    for checkpointing in (False, True):
        inputs = leaves.values()
        outputs = (
            checkpoint(run, *inputs, use_reentrant=use_reentrant) if checkpointing else run(*inputs)
        )
        # not autograd.grad, which reentrant checkpointing refuses
        sum((i + 1) * out.square().sum() for i, out in enumerate(outputs)).backward()
        results.append([*outputs, *(leaf.grad for leaf in inputs)])
        for leaf in inputs:
            leaf.grad = None
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("preset", ["future", "vanilla"])
def test_a_checkpointed_float32_model_has_equal_gradients(preset, use_reentrant):
    # in float32, as models of float64 run on the reference
    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    if preset == "future":
        sizes |= dict(future_dim=4, max_position_embeddings=64)
    tokens = torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(0))
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = MemAttnForCausalLM(getattr(MemAttnConfig, preset)(**sizes)).train()
        if checkpointing:
            enable_checkpointing(model, use_reentrant=use_reentrant)
        model(input_ids=tokens, labels=tokens).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def count_graphs(function, calls, **options) -> int:
    """Graphs of the compiled function after these calls, which must give what it gives eagerly."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, **options)
    for call in calls:
        assert torch.equal(compiled(*call), function(*call))
    return counter.frame_count


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", OPERATORS)
def test_one_graph_serves_every_length(name, backend):
    calls = []
    for T in (12, 17, 20):
        tensors, options = make_inputs(name, T)
        calls.append((tensors, options.pop("task_mask", None)))

    def function(tensors, mask):
        masks = {} if mask is None else dict(task_mask=mask)
        return OPERATORS[name](**tensors, **masks, **options, backend=backend).out

    assert count_graphs(function, calls, dynamic=True) == 1
    assert count_graphs(function, calls) == 2  # the first length as it is, then any


@pytest.mark.parametrize("preset", ["vanilla", "segmented", "future"])
def test_one_graph_of_a_model_serves_every_length(preset):
    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    if preset == "segmented":
        sizes |= dict(segment_len=8, window_size=4)
    if preset == "future":
        sizes |= dict(future_dim=4, max_position_embeddings=64)
    model = MemAttnForCausalLM(getattr(MemAttnConfig, preset)(**sizes)).eval()

    def logits(tokens):
        return model(input_ids=tokens, use_cache=False).logits

    calls = [(torch.randint(50, (2, T)),) for T in (12, 17, 20)]
    with torch.no_grad():
        assert count_graphs(logits, calls) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_reference_holds_products_that_overflow_half(name, autocast, dtype):
    tensors, options = make_inputs(name, D=64)
    for t, tensor in tensors.items():
        if not t.endswith("value"):
            tensor.fill_(40.0)  # a product of 102400, above the 65504 of float16, a score of 12800
    tensors = {t: tensor if autocast else tensor.to(dtype) for t, tensor in tensors.items()}
    options["backend"] = "reference"
    with torch.autocast("cpu", dtype, enabled=autocast):
        results = run_with_gradients(OPERATORS[name], tensors, options)
    number_of_keys = {"segmented": 14, "task_masked": 9}.get(name, 12)
    lse = results["lse"]
    assert ((lse > 12799) & (lse < 12801 + math.log(number_of_keys)) | lse.isinf()).all()
    assert (lse > 0).any()
    for result, value in results.items():
        assert result == "lse" or value.isfinite().all(), result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [30.0, 400.0, 5e3, 1e5, 1e12, 1e18])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("capability", INSTRUCTION_SETS)
@needs_cpp
def test_cpp_keeps_its_precision_at_scores_of_any_size(capability, name, size, dtype):
    if dtype == torch.float16 and size > 5e3:
        pytest.skip("above the range of float16")
    widest = torch.ops.memattn_cpp.cpu_capability()
    try:
        torch.ops.memattn_cpp.set_cpu_capability(capability)
    except RuntimeError:
        pytest.skip(f"this processor has no {capability}")
    try:
        tensors, options = make_inputs(name, T=70, D=64)
        for t, tensor in tensors.items():
            tensors[t] = (tensor if t.endswith("value") else tensor * size).to(dtype)
        actual, low, high = (
            run_with_gradients(OPERATORS[name], tensors, options | dict(backend=b), dtype=d)
            for b, d in (("cpp", None), ("reference", None), ("reference", torch.float64))
        )
    finally:
        torch.ops.memattn_cpp.set_cpu_capability(widest)
    # scores that float16 does not hold are the definition's limit, not the kernel's
    known = [result for result, value in low.items() if not value.isnan().any()]
    assert "lse" in known or dtype == torch.float16
    assert_results_within_budget(actual, low, high, known)
    assert all(not value.isnan().any() for value in actual.values())


@needs_cpp
def test_cpp_log_sum_exp_of_one_large_score():
    query = torch.full((1, 1, 1, 64), 133120.0)
    value = torch.randn(1, 1, 1, 64, requires_grad=True)
    out, lse = segmented_attention(query, query.clone(), value, backend="cpp")
    out.sum().backward()
    assert lse.item() == pytest.approx(64 * 133120**2 / 8)
    assert value.grad is not None and torch.equal(value.grad, torch.ones_like(value))
