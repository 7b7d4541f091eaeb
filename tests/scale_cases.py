"""Small decoders of every kind, sharded over four processes, and what they send.

``python scale_cases.py FOLDER`` forks the processes; each leaves what it counted in
``FOLDER/<rank>.pt``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forked_processes import fork
from torch.distributed.tensor import DTensor

from memattn.models import MemAttnConfig, MemAttnForCausalLM
from memattn.train.config import TrainingConfig
from memattn.train.distributed import _shard

WORLD = 4
SIZES: dict[str, Any] = dict(
    vocab_size=37, hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=40
)
SYSTEMS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "segmented": dict(segment_len=None, window_size=5, num_persistent_tokens=2),
    "future": dict(future_dim=4, source="relative"),
    "memory_transformer": dict(num_memory_tokens=24, num_chapters=8, top_k_chapters=2),
    "titans": dict(variant="mag", window_size=6, chunk_size=4),
    "shiftable": dict(num_specialists=3, rank=2),
}
# names of the same collectives in several versions of PyTorch
GATHERS = ("all_gather_single", "all_gather_into_tensor")
REDUCTIONS = ("reduce_scatter_single", "reduce_scatter_tensor")


def make_config(system: str) -> MemAttnConfig:
    return getattr(MemAttnConfig, system)(**SYSTEMS[system], **SIZES)


def work(rank: int, folder: Path) -> None:
    """Train a step of every system, in one process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WORLD)
    counts = {"gathered": 0, "reduced": 0}

    def counted(real: Callable, what: str, place: int) -> Callable:
        def call(*tensors: Any, **named: Any) -> Any:
            whole = "output_tensor" if what == "gathered" else "input"
            tensor = named[whole] if whole in named else tensors[place]
            counts[what] += tensor.nbytes
            return real(*tensors, **named)

        return call

    for names, what, place in ((GATHERS, "gathered", 0), (REDUCTIONS, "reduced", 1)):
        for name in names:
            if hasattr(dist, name):
                setattr(dist, name, counted(getattr(dist, name), what, place))
    found = {}
    for system in SYSTEMS:
        torch.manual_seed(0)
        model = MemAttnForCausalLM(make_config(system)).train()
        _shard(model, TrainingConfig(mixed_precision="bf16"))
        tokens = torch.randint(3, 37, (2, 13))
        counts |= {"gathered": 0, "reduced": 0}
        loss: Any = model(tokens, labels=tokens).loss
        loss.backward()
        shards = [p.to_local() for p in model.parameters() if isinstance(p, DTensor)]
        found[system] = {**counts, "kept": sum(shard.nbytes for shard in shards)}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    fork(work, WORLD)
