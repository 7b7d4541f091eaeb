"""task_masked_attention: what holds without a reference, and what bad input is told."""

import re

import pytest
import torch
from operator_contract import DEVICE, EVERY
from specs_task_masked_attention import TASK_MASKED
from task_mask_factories import make_mask
from torch.nn import functional as F

from memattn import TaskMask, segmented_attention, task_masked_attention
from memattn.bench.inputs import make_segmented_inputs

pytestmark = pytest.mark.operator


@pytest.mark.parametrize("is_causal", [False, True])
def test_reference_is_the_explicit_mask(is_causal):
    tensors = make_segmented_inputs(B=4, H=4, Hkv=2, T=40, dtype=torch.float64)
    mask = make_mask(form="dense", n=3, T=40, S=40, H=4)
    task_id = torch.tensor([2, 0, 1, 0])
    out, lse = task_masked_attention(
        **tensors, task_mask=mask, task_id=task_id, is_causal=is_causal
    )
    for b, task in enumerate(task_id.tolist()):
        pairs = mask.dense(task)
        pairs = pairs & torch.ones(40, 40, dtype=torch.bool).tril() if is_causal else pairs
        q, k, v = (t[b : b + 1] for t in tensors.values())
        some = pairs.any(-1)
        expected = F.scaled_dot_product_attention(
            q, k, v, attn_mask=pairs | ~some[..., None], enable_gqa=True
        )
        torch.testing.assert_close(out[b][some], expected[0][some])
        assert torch.equal(out[b][~some], torch.zeros_like(out[b][~some]))
        assert torch.equal(lse[b].isinf(), ~some)


def case_without_backend(name, backend):
    """Inputs of a case on the device of the backend, and the other options."""
    tensors, options = TASK_MASKED.make(TASK_MASKED.cases[name], backend)
    return tensors, {n: option for n, option in options.items() if n != "backend"}


def with_gradients(backend, tensors, d_out, options):
    """Outputs and gradients of one call."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    out, lse = task_masked_attention(**leaves, **options, backend=backend)
    d_lse = torch.where(lse.isfinite(), 0.5, 0.0)
    return out, lse, *torch.autograd.grad((out, lse), tuple(leaves.values()), (d_out, d_lse))


@pytest.mark.parametrize("backend", EVERY)
class TestProperties:
    """What must hold without a reference."""

    def run(self, backend, tensors, **options):
        return task_masked_attention(**tensors, **options, backend=backend)

    @pytest.mark.parametrize("name", ["graph-heads", "blocks-causal"])
    def test_a_batch_of_tasks_equals_one_call_for_each(self, backend, name):
        """Bit for bit, gradients too."""
        tensors, options = case_without_backend(name, backend)
        tensors = {n: torch.cat([t, t.flip(0) + 1])[:3] for n, t in tensors.items()}
        options["task_id"] = torch.arange(len(tensors["query"]), device=DEVICE[backend]).flip(0)
        query, value = tensors["query"], tensors["value"]
        d_out = torch.randn_like(query[..., :1].expand(*query.shape[:3], value.shape[-1]))
        mixed = with_gradients(backend, tensors, d_out, options)
        for b in range(len(query)):
            own = {n: t[b : b + 1] for n, t in tensors.items()}
            options["task_id"] = len(query) - 1 - b
            alone = with_gradients(backend, own, d_out[b : b + 1], options)
            for part, expected in zip(mixed, alone, strict=True):
                assert torch.equal(part[b : b + 1], expected)

    def test_disjoint_blocks_are_separate_attentions(self, backend):
        tensors = make_segmented_inputs(B=1, T=70, device=DEVICE[backend])
        node = (torch.arange(70) >= 30).int()
        mask = TaskMask.from_graph(torch.eye(2, dtype=torch.bool)[None], node, node)
        together = self.run(backend, tensors, task_mask=mask.to(DEVICE[backend]), task_id=0)
        for part in (slice(0, 30), slice(30, 70)):
            own = {n: t[:, :, part] for n, t in tensors.items()}
            alone = segmented_attention(**own, is_causal=False, backend=backend)
            for a, b in zip(together, alone, strict=True):
                torch.testing.assert_close(a[:, :, part], b)

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_full_mask_is_attention(self, backend, is_causal):
        tensors = make_segmented_inputs(T=150, device=DEVICE[backend])
        mask = make_mask(form="full", n=1, T=150, S=150).to(DEVICE[backend])
        options = dict(is_causal=is_causal)
        ours = self.run(backend, tensors, task_mask=mask, task_id=0, **options)
        plain = segmented_attention(**tensors, **options, backend=backend)
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b)

    def test_blocked_rows_are_zero_with_finite_gradients(self, backend):
        tensors, options = case_without_backend("small", backend)
        blocked = ~options["task_mask"].dense(0)[0].any(-1)
        assert blocked.any() and not blocked.all()
        options["task_id"] = 0
        tensors = {n: t.requires_grad_() for n, t in tensors.items()}
        out, lse = self.run(backend, tensors, **options)
        assert torch.equal(out[:, :, blocked], torch.zeros_like(out[:, :, blocked]))
        assert lse[:, :, blocked].isneginf().all() and lse[:, :, ~blocked].isfinite().all()
        grads = torch.autograd.grad((out + lse.exp()[..., None]).sum(), list(tensors.values()))
        assert all(g.isfinite().all() for g in grads)
        assert not grads[0][:, :, blocked].any() and grads[0][:, :, ~blocked].any()


MASK = make_mask(form="dense", n=2, T=8, S=8, H=2)
ONE_HEAD = make_mask(form="dense", n=2, T=8, S=8)
TOO_LONG = make_mask(form="dense", n=2, T=9, S=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(task_id=2), "task_id must be from 0 to n_tasks - 1 = 1, got 2"),
        (dict(task_id=-1), "task_id must be from 0 to n_tasks - 1 = 1, got -1"),
        (dict(task_id=torch.tensor([0, 2])), "task_id must be from 0 to n_tasks - 1 = 1, got 2"),
        (
            dict(task_id=torch.tensor([0])),
            "task_id must be an integer or have shape [B=2], got [1]",
        ),
        (
            dict(task_id=torch.tensor([0.0, 1])),
            "task_id must have dtype torch.int32 or torch.int64",
        ),
        (dict(task_mask=TOO_LONG), "task_mask must be for T=8 queries and S=8 keys, got 9 and 8"),
        (
            dict(task_mask=MASK, query=torch.zeros(2, 4, 8, 4)),
            "task_mask must have one head or H=4",
        ),
        (
            dict(task_mask=MASK.to("meta")),
            "task_mask must be on the device of query, cpu, got meta",
        ),
        (dict(key=torch.zeros(2, 3, 8, 4)), "key must have a number of heads that divides"),
        (dict(value=torch.zeros(2, 2, 9, 4)), "value must have shape [B=2, Hkv=2, S=8, Dv]"),
        (dict(seq_start=torch.tensor([0, -1], dtype=torch.int32)), "seq_start must be at least 0"),
        (dict(seq_end=torch.tensor([0, 1])), "seq_end must have dtype torch.int32"),
        (dict(scale=0.0), "scale must be positive and finite, got 0.0"),
        (dict(backend="cuda"), "backend must be one of"),
    ],
)
def test_bad_input_is_told(change, message):
    tensors = dict.fromkeys(("query", "key", "value"), torch.zeros(2, 2, 8, 4))
    with pytest.raises(ValueError, match=re.escape(message)):
        task_masked_attention(**{**tensors, "task_mask": ONE_HEAD, "task_id": 0, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(task_mask=torch.ones(1, 8, 8)), "task_mask must be a TaskMask, got Tensor"),
        (dict(task_id=True), "task_id must be an integer or a tensor, got bool"),
        (dict(task_id="0"), "task_id must be an integer or a tensor, got str"),
        (dict(is_causal=1), "is_causal must be True or False, got int"),
    ],
)
def test_wrong_types_are_told(change, message):
    tensors = dict.fromkeys(("query", "key", "value"), torch.zeros(2, 2, 8, 4))
    with pytest.raises(TypeError, match=re.escape(message)):
        task_masked_attention(**{**tensors, "task_mask": ONE_HEAD, "task_id": 0, **change})
