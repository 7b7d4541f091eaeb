"""Kernels refuse second derivatives, which they do not have; the reference has them."""

import pytest
import torch
from segmented_factories import BACKENDS, DEVICE
from task_mask_factories import make_mask

from memattn import (
    future_attention,
    future_attention_loss,
    segmented_attention,
    task_masked_attention,
)
from memattn.testing import make_future_inputs, make_segmented_inputs

pytestmark = pytest.mark.operator


def inputs(operator, device):
    if operator in (future_attention, future_attention_loss):
        return make_future_inputs(B=1, H=1, Hkv=1, T=9, D=16, device=device), dict(future_dim=3)
    tensors = make_segmented_inputs(B=1, H=1, Hkv=1, T=9, D=16, device=device)
    if operator is segmented_attention:
        return tensors, {}
    return tensors, dict(task_mask=make_mask(form="graph", n=1, T=9, S=9).to(device), task_id=0)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize(
    "operator",
    [segmented_attention, future_attention, future_attention_loss, task_masked_attention],
)
def test_second_derivatives(operator, backend):
    tensors, options = inputs(operator, DEVICE[backend])
    query = tensors["query"].requires_grad_()
    out = operator(**tensors, **options, backend=backend).out
    (first,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    if backend == "reference":
        (second,) = torch.autograd.grad(first.square().sum(), query)
        assert second.abs().max() > 0
        return
    with pytest.raises(RuntimeError, match="differentiable once; backend='reference'"):
        first.square().sum().backward()
