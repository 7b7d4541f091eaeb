"""Cases of task-masked attention: masks of a given density, batches of mixed tasks, peers."""

import math
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from memattn.bench.bars import Bar, CostBar, LinearMemoryBar, SpeedBar, bfloat16_bars
from memattn.bench.case import Forward, Peer, TokenCase
from memattn.bench.inputs import make_segmented_inputs
from memattn.bench.peers import MaskMod, flex, sdpa, sdpa_backends
from memattn.bench.roofline import Work
from memattn.ops import TaskMask, task_masked_attention
from memattn.ops.task_mask import TILE

FULL_MASK = "memattn, full mask"
BY_TASK = "one call a task"


@dataclass(frozen=True, kw_only=True)
class TaskMaskedCase(TokenCase):
    """One shape of task-masked attention; sequence ``b`` has task ``b % n_tasks``."""

    operator: ClassVar[str] = "task_masked_attention"
    kinds: ClassVar[dict[str, str]] = {
        "blocks": "a graph whose nodes are tiles: density percent of the tiles are full",
        "graph": "a graph whose nodes lie across tiles: most tiles are partial",
        "tokens": "density percent of all pairs, at random: every tile is partial",
    }
    quick_kinds: ClassVar[tuple[str, ...]] = ("blocks", "tokens")
    cuda_sizes: ClassVar[dict[str, int]] = {"B": 8, "H": 16, "D": 128, "n_tasks": 8}

    B: int = 2
    n_tasks: int = 2
    density: int = 25  # percent

    def inputs(self) -> dict[str, Tensor]:
        return self.draw(make_segmented_inputs)

    def task_id(self) -> Tensor:
        """The task of each sequence."""
        return torch.arange(self.B, device=self.device) % self.n_tasks

    def subject(self, backend: str) -> Forward:
        return self._attention(_mask_of(self._mask_key()), self.task_id(), backend)

    def _attention(self, mask: TaskMask, task_id: Tensor | int, backend: str) -> Forward:
        mask = mask.to(self.device)

        def forward(inputs: dict[str, Tensor]) -> Tensor:
            query, key, value = (inputs[name] for name in ("query", "key", "value"))
            return task_masked_attention(query, key, value, mask, task_id, backend=backend).out

        return forward

    def _mask_key(self) -> "TaskMaskedCase":
        """This case with the fields that the mask does not depend on set to fixed values."""
        return replace(self, B=1, H=1, Hkv=None, D=1, dtype=torch.float32, device="cpu")

    def definition(self, rows: slice) -> Forward:
        mask = _mask_of(self._mask_key())
        part = TaskMask.from_dense(
            torch.stack([mask.dense(task)[:, rows] for task in range(self.n_tasks)])
        )
        attention = self._attention(part, self.task_id(), "reference")
        return lambda inputs: attention(inputs | {"query": inputs["query"][:, :, rows]})

    def label(self, T: str | None = None) -> str:
        length = f"T={self.T}" if T is None else T
        tasks = "1 task" if self.n_tasks == 1 else f"{self.n_tasks} tasks"
        return f"{self.kind} {self.density} % {length} {tasks} D={self.D}{self.dtype_label}"

    def pairs(self) -> int:
        """Allowed pairs of one head, summed over the batch."""
        pairs = _pairs_of(self._mask_key())
        return sum(pairs[task] for task in self.task_id().tolist())

    def work(self) -> dict[str, Work]:
        return self._work(self.pairs())

    def _work(self, pairs: int) -> dict[str, Work]:
        return self.softmax_work(self.H * pairs, self.B * self.key_heads * self.T)

    def peers(self) -> dict[str, Peer]:
        mask_bytes = self.B * self.T**2
        scores = self.score_bytes(self.T)
        peers = {
            f"sdpa {name}": Peer(
                partial(self._sdpa, backend), scores if name == "math" else mask_bytes
            )
            for name, backend in sdpa_backends(self.device).items()
        }
        # the CPU builds the block mask from a dense one
        stored = 0 if "cuda" in self.device else 8 * mask_bytes
        peers["flex"] = Peer(self._flex, stored, compiled=True)
        peers[BY_TASK] = Peer(self._by_task)
        peers[FULL_MASK] = Peer(self._full, yardstick=self._work(self.B * self.T**2))
        peers["naive"] = Peer(partial(self.subject, "reference"), scores)
        return peers

    def _sdpa(self, backend: Any) -> Forward:
        mask = _mask_of(self._mask_key())
        pairs = torch.stack([mask.dense(task) for task in range(self.n_tasks)])
        attention = sdpa(backend, mask=pairs.to(self.device)[self.task_id()])
        return lambda inputs: attention(inputs["query"], inputs["key"], inputs["value"])

    def _flex(self) -> Forward:
        mask = _mask_of(self._mask_key()).to(self.device)
        attention = flex(_mask_mod(mask, self.task_id()), self.T, self.T, self.device, batch=self.B)
        return lambda inputs: attention(inputs["query"], inputs["key"], inputs["value"])

    def _by_task(self) -> Forward:
        """One call per task: gather each task's sequences, attend, and scatter the outputs back."""
        mask, task_id = _mask_of(self._mask_key()), self.task_id()
        own = [(task_id == task).nonzero()[:, 0] for task in task_id.unique().tolist()]
        calls = [self._attention(mask, task, "auto") for task in task_id.unique().tolist()]
        back = torch.cat(own).argsort()

        def forward(inputs: dict[str, Tensor]) -> Tensor:
            parts = [
                call({name: x[rows] for name, x in inputs.items()})
                for call, rows in zip(calls, own, strict=True)
            ]
            return torch.cat(parts)[back]

        return forward

    def _full(self) -> Forward:
        node = torch.zeros(self.T, dtype=torch.int32)
        full = TaskMask.from_graph(torch.ones(1, 1, 1, dtype=torch.bool), node, node)
        return self._attention(full, 0, "auto")

    @classmethod
    def bars(cls, suite: str) -> list[Bar]:
        return {"cpu-bars": _cpu_bars, "gpu-bars": _gpu_bars}[suite]()


@cache
def _mask_of(case: TaskMaskedCase) -> TaskMask:
    """The mask of a case, on the CPU."""
    generator = torch.Generator().manual_seed(case.seed)
    N, T = case.n_tasks, case.T
    if case.kind == "tokens":
        return TaskMask.from_dense(torch.rand(N, T, T, generator=generator) < case.density / 100)
    G = math.ceil(T / TILE)
    # every node sees the same number of nodes, so that the density is exact
    chosen = max(1, round(G * case.density / 100))
    edges = torch.rand(N, G, G, generator=generator).argsort(-1) < chosen
    node = torch.arange(T) // TILE
    if case.kind == "graph":  # bounds of nodes in the middle of tiles
        node = (torch.arange(T) + TILE // 2) // TILE % G
    return TaskMask.from_graph(edges, node, node)


@cache
def _pairs_of(case: TaskMaskedCase) -> list[int]:
    """Allowed pairs of each task."""
    mask = _mask_of(case)
    t = mask.tensors
    if mask.edges is None or t.query_node is None or t.key_node is None:
        return [int(mask.dense(task).sum()) for task in range(mask.n_tasks)]
    edges = mask.edges[:, 0].double()
    queries, keys = (
        torch.bincount(node, minlength=edges.shape[-1]).double()
        for node in (t.query_node, t.key_node)
    )
    return [int(n) for n in (edges @ keys) @ queries]


def _mask_mod(mask: TaskMask, task_id: Tensor) -> MaskMod:
    """The mask as a FlexAttention ``mask_mod``."""
    t = mask.tensors
    if mask.edges is None or t.query_node is None or t.key_node is None:
        pairs = torch.cat([mask.dense(task) for task in range(mask.n_tasks)])
        return lambda b, h, i, j: pairs[task_id[b], i, j]
    edges, query_node, key_node = mask.edges[:, 0], t.query_node, t.key_node
    return lambda b, h, i, j: edges[task_id[b], query_node[i], key_node[j]]


def _cpu_bars() -> list[Bar]:
    case = TaskMaskedCase(kind="blocks", T=4096, density=25)
    bars: list[Bar] = []
    for direction in ("forward", "backward"):
        for against in (FULL_MASK, "sdpa flash"):  # PyTorch's flash computes all pairs
            bars.append(SpeedBar(case=case, direction=direction, target=3.0, against=(against,)))
    one = replace(case, B=1, n_tasks=1)
    lengths = (2048, 4096, 8192, 16384)
    return [
        *bars,
        LinearMemoryBar(case=one, direction="forward+backward", target=1.1, lengths=lengths),
        *bfloat16_bars(case, against="sdpa flash"),
    ]


def _gpu_bars() -> list[Bar]:
    bars: list[Bar] = []
    for density in (25, 50):
        case = TaskMaskedCase(
            kind="blocks",
            T=8192,
            density=density,
            device="cuda",
            dtype=torch.bfloat16,
            **TaskMaskedCase.cuda_sizes,
        )
        for direction, faster in (("forward", 1.05), ("backward", 1.4)):
            on = partial(SpeedBar, case=case, direction=direction)
            bars += [
                # at least 80 % of the rate of the full mask
                CostBar(case=case, direction=direction, target=1 / 0.8, against=FULL_MASK),
                on(target=faster, must=1.05, against=("flex",)),
                on(target=3.0, against=("sdpa efficient", "sdpa cudnn")),
            ]
    # every tile is partial: at most 15 % slower than the full mask
    tokens = TaskMaskedCase(
        kind="tokens",
        T=8192,
        density=50,
        device="cuda",
        dtype=torch.bfloat16,
        **TaskMaskedCase.cuda_sizes | {"n_tasks": 1},
    )
    for direction in ("forward", "backward"):
        bars.append(
            SpeedBar(case=tokens, direction=direction, target=1 / 1.15, against=(FULL_MASK,))
        )
    return bars


CASE = TaskMaskedCase
