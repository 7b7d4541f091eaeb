"""Faults that operators once had, each as the right value for all operators and backends."""

import pytest
import torch
from model_factories import enable_checkpointing
from operator_contract import DEVICE, EVERY
from task_mask_factories import make_mask
from torch.utils.checkpoint import checkpoint

from memattn import (
    MemAttnConfig,
    MemAttnForCausalLM,
    future_attention,
    future_attention_loss,
    segmented_attention,
    task_masked_attention,
)
from memattn.testing import make_future_inputs, make_segmented_inputs

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
    sizes = dict(P=2, M=3, segment_len=4) | sizes
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
