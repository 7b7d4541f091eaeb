"""Task masks and inputs for tests."""

from typing import Any

import torch
from torch import Tensor

from memattn import TaskMask
from memattn.bench.inputs import make_segmented_inputs


def make_mask(
    *, form: str, n: int, T: int, S: int, H: int = 1, nodes: int = 4, seed: int = 0
) -> TaskMask:
    """A random mask of ``n`` tasks; of ``H`` heads where that is not 1."""
    generator = torch.Generator().manual_seed(seed)
    heads = () if H == 1 else (H,)
    if form == "graph":
        edges = torch.rand(n, *heads, nodes, nodes, generator=generator) < 0.3
        query_node, key_node = (
            torch.randint(nodes, (length,), generator=generator).sort().values for length in (T, S)
        )
        return TaskMask.from_graph(edges, query_node, key_node)
    if form == "halves":  # the second of two nodes does not see itself
        edges = torch.tensor([[True, True], [True, False]]).expand(n, *heads, 2, 2)
        return TaskMask.from_graph(edges, *((torch.arange(x) >= 2 * x // 3).int() for x in (T, S)))
    pairs = make_pairs("dense" if form == "graph-holes" else form, n, T, S, heads, generator)
    if form == "graph-holes":  # each place a node of its own
        return TaskMask.from_graph(pairs, torch.arange(T), torch.arange(S))
    return TaskMask.from_dense(pairs)


def make_pairs(form: str, n: int, T: int, S: int, heads: tuple, generator) -> torch.Tensor:
    """Allowed pairs, bool ``[n, *heads, T, S]``."""
    shape = (n, *heads, T, S)
    if form == "full":
        return torch.ones(shape, dtype=torch.bool)
    if form == "nothing":
        return torch.zeros(shape, dtype=torch.bool)
    mask = torch.rand(shape, generator=generator) < 0.2
    if form == "some":  # each query sees at least its own place
        return mask | torch.eye(T, S, dtype=torch.bool)
    mask[..., T // 3, :] = False  # a query without keys
    mask[..., S // 2] = False  # a key without queries
    if form == "blocks":  # empty, full and partial tiles
        mask[..., :128, :128] = True
        mask[..., 128:256, :128] = False
        mask[..., :128, 128:256] = False
        mask[..., 256:, 128:] = True
    return mask


def make_task_masked_inputs(
    *,
    form: str,
    T: int,
    B: int = 2,
    H: int = 2,
    Hkv: int = 1,
    S: int | None = None,
    heads: bool = False,
    nodes: int = 4,
    n_tasks: int = 3,
    device: str = "cpu",
    **sizes: Any,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inputs ``query, key, value`` and options, the mask and a task for each sequence."""
    S = T if S is None else S
    tensors = make_segmented_inputs(B=B, H=H, Hkv=Hkv, T=T, S=S, device=device, **sizes)
    mask = make_mask(form=form, n=n_tasks, T=T, S=S, H=H if heads else 1, nodes=nodes)
    task_id = torch.arange(B, device=device).flip(0) % n_tasks
    return tensors, dict(task_mask=mask.to(device), task_id=task_id)


def pad_task_mask(
    tensors: dict[str, Tensor], options: dict[str, Any], left: int, right: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The mask with more rows and columns, all of them allowed: what counts is the bounds."""
    mask, more = options["task_mask"], left + right
    pairs = torch.stack([mask.dense(task) for task in range(mask.n_tasks)])
    pairs = torch.nn.functional.pad(pairs, (0, more, 0, more), value=True)
    if mask.tensors.query_node is not None:  # keep the form
        nodes = torch.arange(pairs.shape[-1])
        mask = TaskMask.from_graph(pairs.cpu(), nodes, nodes)
    else:
        mask = TaskMask.from_dense(pairs.cpu())
    return tensors, options | dict(task_mask=mask.to(tensors["query"].device))
