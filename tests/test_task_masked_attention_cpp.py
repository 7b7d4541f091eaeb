"""task_masked_attention of the C++ extension: lengths around its tiles, sparse masks, threads."""

import pytest
import torch
from task_mask_factories import make_mask

from memattn import TaskMask, task_masked_attention
from memattn.bench.inputs import make_segmented_inputs
from memattn.ops._dispatch import cpp_is_built
from memattn.testing import assert_results_within_budget, run_with_gradients

pytestmark = [
    pytest.mark.operator,
    pytest.mark.skipif(not cpp_is_built(), reason="the C++ extension is not built"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def gradients(tensors, mask, backend="cpp", dtype=None, task_id=0, **options):
    options = dict(task_mask=mask, task_id=task_id, backend=backend, **options)
    return run_with_gradients(task_masked_attention, tensors, options, dtype=dtype)


def check(tensors, mask, **options):
    """Assert the error rule for outputs and all gradients."""
    assert_results_within_budget(
        gradients(tensors, mask, **options),
        gradients(tensors, mask, "reference", **options),
        gradients(tensors, mask, "reference", torch.float64, **options),
    )


def random_pairs(*shape, density, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < density


# lengths around the sizes of panels, tiles, blocks and tiles of the mask


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize(("H", "Hkv"), [(12, 3), (8, 1), (4, 4)])
@pytest.mark.parametrize("T", [5, 32, 33, 70])
def test_groups_of_heads_that_share_keys(T, H, Hkv, heads):
    """They share a tile of queries where they are short and see the same keys."""
    tensors = make_segmented_inputs(H=H, Hkv=Hkv, T=T, S=40)
    for form in ("dense", "graph"):
        mask = make_mask(form=form, n=2, T=T, S=40, H=H if heads else 1)
        check(tensors, mask, task_id=torch.tensor([1, 0]))


@pytest.mark.parametrize("density", [0.01, 0.05, 0.5, 0.99])
@pytest.mark.parametrize("only", ["pairs", "keys"])
def test_densities(density, only):
    """Sparse ones copy the keys that a tile sees; in many a query sees few keys among others."""
    tensors = make_segmented_inputs(B=1, H=2, Hkv=1, T=290, D=64)
    pairs = random_pairs(1, 290, 290, density=density)
    if only == "keys":
        pairs = pairs[:, :1].expand(-1, 290, -1)
    check(tensors, TaskMask.from_dense(pairs))


@pytest.mark.parametrize(
    "node",
    [
        torch.arange(150),
        torch.arange(150) // 40,
        torch.arange(150) % 40,
        torch.arange(150).flip(0),
        torch.randint(70, (150,), generator=torch.Generator().manual_seed(0)),
    ],
    ids=["each", "runs", "rising", "falling", "mixed"],
)
def test_orders_of_nodes(node):
    """The graph form gives the bits of the dense form, and so do its results."""
    G = int(node.max()) + 1
    graph = TaskMask.from_graph(random_pairs(1, G, G, density=0.4), node, node)
    tensors = make_segmented_inputs(B=1, H=2, Hkv=1, T=150)
    expected = gradients(tensors, TaskMask.from_dense(graph.dense(0)))
    for name, result in gradients(tensors, graph).items():
        assert torch.equal(result, expected[name]), name


def test_nan_that_nobody_sees_stays_away():
    """Keys between others in a tile, whole tiles, rows outside the sequence, blocked queries."""
    T = 300
    pairs = random_pairs(1, T, T, density=0.5)
    pairs[:, :, 40:50] = pairs[:, :, 128:256] = pairs[:, 260] = pairs[:, 64:128] = False
    for bounds in ({}, dict(seq_start=int32(20), seq_end=int32(290))):
        first = 20 if bounds else 0
        unseen_keys = torch.zeros(T, dtype=torch.bool)
        unseen_keys[first + 40 : first + 50] = unseen_keys[first + 128 : first + 256] = True
        blind = torch.zeros(T, dtype=torch.bool)
        blind[first + 64 : first + 128] = blind[first + 260] = True
        if bounds:
            for rows in (unseen_keys, blind):
                rows[:20] = rows[290:] = True
        tensors = make_segmented_inputs(B=1, T=T)
        expected = gradients(tensors, TaskMask.from_dense(pairs), **bounds)
        for name, rows in (("query", blind), ("key", unseen_keys), ("value", unseen_keys)):
            tensors[name] = tensors[name].masked_fill(rows[:, None], torch.nan)
        for name, result in gradients(tensors, TaskMask.from_dense(pairs), **bounds).items():
            assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_neither_threads_nor_the_batch_matter(threads):
    """One key head leaves threads idle, so its queries are split: as often alone as in a batch."""
    mask = make_mask(form="graph", n=2, T=800, S=800, nodes=12)
    tensors = make_segmented_inputs(B=3, H=2, Hkv=1, T=800)
    task_id = torch.tensor([1, 0, 1])
    options = dict(seq_start=int32(0, 3, 700), is_causal=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check(tensors, mask, task_id=task_id, **options)
        first, again = (gradients(tensors, mask, task_id=task_id, **options) for _ in range(2))
        assert all(torch.equal(first[name], again[name]) for name in first)
        d_out = torch.randn(3, 2, 800, 16, generator=torch.Generator().manual_seed(0))

        def backward(part):
            leaves = {n: t[part].detach().requires_grad_() for n, t in tensors.items()}
            out, _ = task_masked_attention(**leaves, task_mask=mask, task_id=task_id[part])
            return out, *torch.autograd.grad(out, list(leaves.values()), d_out[part])

        together = backward(slice(0, 3))
        for b in range(3):
            for whole, alone in zip(together, backward(slice(b, b + 1)), strict=True):
                assert torch.equal(whole[b : b + 1], alone)
    finally:
        torch.set_num_threads(before)


def raw_arguments(mask, **changes):
    """Arguments of ``torch.ops.memattn_cpp.task_masked_attention``, in its order."""
    named = make_segmented_inputs(T=mask.n_queries, S=mask.n_keys)
    named |= dict(task_id=int32(0, 1))
    named |= mask.tensors._asdict()
    named |= dict(seq_start=None, seq_end=None, is_causal=False, scale=0.25)
    return tuple((named | changes).values())


WRONG = {
    "value must have shape": dict(value=torch.zeros(2, 2, 8, 16)),
    "heads of key must divide": dict(key=torch.zeros(2, 3, 8, 16)),
    "task_id must have values from 0 to 1, got 2": dict(task_id=int32(0, 2)),
    "task_id must have dtype int32": dict(task_id=torch.zeros(2, dtype=torch.long)),
    "task_id must have shape": dict(task_id=int32(0)),
    "seq_start must be at least 0": dict(seq_start=int32(0, -1)),
    "seq_end must have dtype int32": dict(seq_end=torch.zeros(2, dtype=torch.long)),
    "query_tiles must have 4 axes": dict(query_tiles=int32(0)),
    "query_tiles must have one head": dict(query_tiles=int32(0).expand(2, 3, 1, 1)),
    "query_tiles must have shape": dict(query_tiles=int32(0).expand(2, 1, 1, 2)),
    "query_tiles must have values": dict(query_tiles=int32(1).expand(2, 1, 1, 1)),
    "query_counts must have shape": dict(query_counts=int32(0, 1)),
    "query_counts must add up to at most 1": dict(query_counts=int32(1, 1).expand(2, 1, 1, 2)),
}
WRONG_BITS = {
    "slots must have shape": dict(slots=int32(0)),
    "slots must have values from 0 to 1, got 2": dict(slots=int32(2).expand(2, 1, 1, 1)),
    "slots or both nodes must be given": dict(slots=None),
    "bits must have shape": dict(bits=int32(0).expand(256, 3)),
    "bits must have 2 axes": dict(bits=int32(0)),
}
WRONG_GRAPH = {
    "query_node must have shape": dict(query_node=int32(0)),
    "key_node must have values from 0 to 3, got 4": dict(key_node=int32(4).expand(9)),
    "bits must have shape": dict(bits=int32(0).expand(8, 2)),
}


@pytest.mark.parametrize(
    ("form", "message"),
    [
        *[(form, message) for form in ("dense", "graph") for message in WRONG],
        *[("dense", message) for message in WRONG_BITS],
        *[("graph", message) for message in WRONG_GRAPH],
    ],
)
def test_the_extension_refuses_what_it_would_read_outside(form, message):
    """The operator checks first; a caller of the raw operator must not crash either."""
    change = {"dense": WRONG | WRONG_BITS, "graph": WRONG | WRONG_GRAPH}[form][message]
    arguments = raw_arguments(make_mask(form=form, n=2, T=9, S=9), **change)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.memattn_cpp.task_masked_attention(*arguments)


def test_the_extension_refuses_a_tile_twice():
    mask = make_mask(form="blocks", n=2, T=9, S=200)
    arguments = raw_arguments(
        mask,
        query_tiles=int32(0, 0).expand(2, 1, 1, 2),
        query_counts=int32(1, 1).expand(2, 1, 1, 2),
    )
    with pytest.raises(RuntimeError, match="query_tiles must list a tile once, got 0 twice"):
        torch.ops.memattn_cpp.task_masked_attention(*arguments)
