"""Models whose weights two processes share, and the program that runs them.

``python tensor_parallel_cases.py FOLDER`` forks two processes; each leaves what it computed in
``FOLDER/<rank>.pt``.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forked_processes import fork
from model_factories import make_model, make_tokens
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig

from memattn.models import MemAttnForCausalLM

WORLD = 2
SYSTEMS: dict[str, dict[str, Any]] = {
    "vanilla": {"tie_word_embeddings": False},
    "both": {},
    "chapters": {},
    "learned": {},
    "titans-mag": {},
}


def make(system: str, **options: Any) -> MemAttnForCausalLM:
    """The model in float64."""
    return make_model(system, **SYSTEMS[system], **options)


def dtype_of(system: str) -> torch.dtype:
    """In which it is compared: a memory makes more of rounding than any bound on that allows."""
    return torch.float64 if "titans" in system else torch.float32


def results(model: MemAttnForCausalLM) -> dict[str, Tensor]:
    """Loss, logits, gradients, and what is generated."""
    tokens = make_tokens()
    model.zero_grad()
    loss = model.train()(tokens, labels=tokens, output_losses=False).lm_loss
    loss.backward()
    found = {f"d_{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {"loss": loss, "logits": model.eval()(tokens, use_cache=False).logits}
    with torch.no_grad():
        cache = model(tokens[:, :19], use_cache=True).past_key_values
        steps = [model(t, past_key_values=cache).logits for t in tokens[:, 19:].split(1, 1)]
        found["decoded"] = torch.cat(steps, 1)
    return {name: _whole(x).detach() for name, x in found.items()}


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _work(rank: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=WORLD)
    found: dict[str, Any] = {}
    shared = DistributedConfig(tp_size=WORLD, tp_plan="auto")
    for system in SYSTEMS:
        model: Any = MemAttnForCausalLM.from_pretrained(
            folder / system, dtype=dtype_of(system), distributed_config=shared
        )
        found[system] = results(model)
        named = model.named_parameters()
        found[system, "shared"] = {name for name, p in named if isinstance(p, DTensor)}
    model.save_pretrained(folder / "again", is_main_process=rank == 0)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for system in SYSTEMS:
        make(system).save_pretrained(folder / system)
    fork(_work, WORLD)
