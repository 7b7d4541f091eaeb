"""Cases of sequence-parallel attention, and the program that runs them in several processes.

``python sequence_parallel_cases.py FOLDER`` forks four processes, which also form groups of two
and of one; each leaves what it computed in ``FOLDER/<rank>.pt``.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forked_processes import fork
from torch import Tensor

from memattn.distributed import sequence_parallel_segmented_attention
from memattn.distributed.shards import SequenceShards

WORLD, T = 4, 37  # shards of 10, 10, 10, 7 or 19, 18
DOCUMENTS = {"cu_seqlens": torch.tensor([0, 3, 14, 14, 36, 37], dtype=torch.int32)}
CASES: dict[str, dict[str, Any]] = {
    "window": {"window_size": 5},
    "window-of-one": {"window_size": 1},
    "window-over-three-shards": {"window_size": 25},
    "window-over-all": {"window_size": 100},
    "segment": {"segment_len": 8},
    "segment-over-all": {"segment_len": 64},
    "both": {"segment_len": 6, "window_size": 9, "persistent": 3},
    "capped": {"segment_len": 6, "window_size": 9, "persistent": 3, "softcap": 1.5},
    "documents-window": {"window_size": 7, **DOCUMENTS},
    "documents-segment": {"segment_len": 4, "persistent": 2, **DOCUMENTS},
    "documents-both": {"segment_len": 5, "window_size": 4, **DOCUMENTS},
    # at the bounds of shards of four processes: nothing is exchanged there
    "documents-apart": {"window_size": 7, "cu_seqlens": torch.tensor([0, 10, 20, 30, 37]).int()},
}
SIZES = {"H": 4, "Hkv": 2, "D": 8, "Dv": 6}


def inputs(name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """Tensors of the whole sequence, cotangents and options of a case."""
    options = dict(CASES[name])
    P = options.pop("persistent", 0)
    B = 1 if "cu_seqlens" in options else 2
    H, Hkv, D, Dv = SIZES.values()
    shapes = {"query": (B, H, T, D), "key": (B, Hkv, T, D), "value": (B, Hkv, T, Dv)}
    if P:
        shapes |= {"persistent_key": (Hkv, P, D), "persistent_value": (Hkv, P, Dv)}
    generator = torch.Generator().manual_seed(len(name))

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = {key: draw(shape) for key, shape in shapes.items()}
    return tensors, {"out": draw((B, H, T, Dv)), "lse": draw((B, H, T))}, options


def outputs_and_gradients(
    function: Any, tensors: dict[str, Tensor], cotangents: dict[str, Tensor], **options: Any
) -> dict[str, Tensor]:
    """What a call returns, and the gradients of its inputs."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    result = function(**leaves, **options)._asdict()
    gradients = torch.autograd.grad(
        list(result.values()), list(leaves.values()), [cotangents[name] for name in result]
    )
    found = {name: tensor.detach() for name, tensor in result.items()}
    return found | {f"d_{name}": d for name, d in zip(leaves, gradients, strict=True)}


def shard(tensors: dict[str, Tensor], shards: SequenceShards, rank: int) -> dict[str, Tensor]:
    """The tokens of a process; persistent tensors are whole."""
    own = slice(*shards.bounds(rank))
    return {n: t if n.startswith("persistent") else t[:, :, own] for n, t in tensors.items()}


class Traffic:
    """Counts what goes through ``batch_isend_irecv``."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self.real = dist.batch_isend_irecv

    def __call__(self, operations: list[dist.P2POp]) -> list[dist.Work]:
        sent, received = (
            sum(o.tensor.nbytes for o in operations if o.op is way)
            for way in (dist.isend, dist.irecv)
        )
        self.calls.append((sent, received))
        return self.real(operations)


def work(rank: int, folder: Path) -> None:
    """Run all cases in all groups, in one process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WORLD)
    groups = {4: dist.group.WORLD}
    for size in (2, 1):
        made = [dist.new_group(list(range(i, i + size))) for i in range(0, WORLD, size)]
        groups[size] = made[rank // size]
    traffic = dist.batch_isend_irecv = Traffic()
    found = {}
    for size, group in groups.items():
        if rank >= size:
            continue
        for dtype in (torch.float32, torch.float64):
            for name in CASES:
                tensors, cotangents, options = inputs(name, dtype)
                shards = SequenceShards(T, size)
                traffic.calls.clear()
                result = outputs_and_gradients(
                    sequence_parallel_segmented_attention,
                    shard(tensors, shards, rank),
                    shard(cotangents, shards, rank),
                    group=group,
                    total_len=T,
                    **options,
                )
                found[size, dtype, name] = result, list(traffic.calls)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    fork(work, WORLD)
