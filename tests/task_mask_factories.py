"""Task masks and inputs for tests."""

import torch

from memattn import TaskMask
from memattn.testing import make_segmented_inputs

# name: (sizes, mask form, options, index tensors); a mask has n tasks, over T queries and S keys
CASES = {
    "one": (dict(B=1, T=1), dict(form="graph", nodes=1), {}, {}),
    "small": (dict(T=20), dict(form="dense"), {}, {}),
    "graph": (dict(T=135), dict(form="graph", nodes=5), {}, {}),
    "graph-causal": (dict(T=135), dict(form="graph", nodes=40), dict(is_causal=True), {}),
    "heads": (dict(T=40, heads=True), dict(form="dense"), {}, {}),
    "graph-heads": (dict(T=40, heads=True), dict(form="graph", nodes=7), dict(scale=0.2), {}),
    "blocks": (dict(T=270, B=1), dict(form="blocks"), {}, {}),
    "blocks-causal": (dict(T=270, B=1, H=1), dict(form="blocks"), dict(is_causal=True), {}),
    "cross": (dict(T=33, S=140), dict(form="dense"), {}, {}),
    "cross-graph": (dict(T=140, S=33, D=13, Dv=7), dict(form="graph", nodes=9), {}, {}),
    "multi-query": (dict(T=60, H=4, Hkv=1), dict(form="graph", nodes=33), {}, {}),
    "full": (dict(T=130), dict(form="full"), {}, {}),
    "nothing": (dict(T=33), dict(form="nothing"), {}, {}),
    "padded-left": (
        dict(T=135),
        dict(form="graph", nodes=6),
        {},
        dict(seq_start=[5, 134]),
    ),
    "padded": (
        dict(T=135),
        dict(form="dense"),
        dict(is_causal=True),
        dict(seq_start=[3, 0], seq_end=[134, 0]),
    ),
}


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
    return TaskMask.from_dense(make_pairs(form, n, T, S, heads, generator))


def make_pairs(form: str, n: int, T: int, S: int, heads: tuple, generator) -> torch.Tensor:
    """Allowed pairs, bool ``[n, *heads, T, S]``."""
    shape = (n, *heads, T, S)
    if form == "full":
        return torch.ones(shape, dtype=torch.bool)
    if form == "nothing":
        return torch.zeros(shape, dtype=torch.bool)
    mask = torch.rand(shape, generator=generator) < 0.2
    mask[..., T // 3, :] = False  # a query without keys
    mask[..., S // 2] = False  # a key without queries
    if form == "blocks":  # empty, full and partial tiles
        mask[..., :128, :128] = True
        mask[..., 128:256, :128] = False
        mask[..., :128, 128:256] = False
        mask[..., 256:, 128:] = True
    return mask


def make_case(name: str, *, dtype=torch.float32, device="cpu", n_tasks: int = 3) -> tuple:
    """Inputs ``query, key, value`` and options of a named case, the mask and tasks among them."""
    sizes, mask, options, bounds = CASES[name]
    sizes = {"B": 2, "H": 2, "Hkv": 1, **sizes}
    heads = sizes.pop("heads", False)
    T, B = sizes["T"], sizes["B"]
    tensors = make_segmented_inputs(**sizes, dtype=dtype, device=device)
    mask = make_mask(**mask, n=n_tasks, T=T, S=sizes.get("S", T), H=sizes["H"] if heads else 1).to(
        device
    )
    task_id = torch.arange(B, device=device).flip(0) % n_tasks
    bounds = {k: torch.tensor(v, dtype=torch.int32, device=device) for k, v in bounds.items()}
    return tensors, dict(task_mask=mask, task_id=task_id, **options, **bounds)
