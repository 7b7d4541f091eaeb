"""Cases of the neural memory: reads by token and by chunk, decoding; peers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from memattn.bench.bars import Bar, CostBar, LinearMemoryBar, PeerPeakBar, RoofBar, SpeedBar
from memattn.bench.case import Case, Forward, Peer
from memattn.bench.limits import MORE_THAN_THE_STATE
from memattn.bench.neural_memory_peers import by_chunks, by_tokens, titans_pytorch
from memattn.bench.roofline import Work
from memattn.ops import neural_memory

TITANS = "titans-pytorch"  # gradients at the start of each chunk, as ours
TITANS_DEFAULT = "titans-pytorch, default"  # all gradients at the first weights
PER_SAMPLE = "vmap(grad)"
LOOP = "loop over tokens"
STATE_READ = "sum over the state"
TRAINING = "forward+backward"


@dataclass(frozen=True, kw_only=True)
class MemoryCase(Case):
    """One shape of the neural memory: ``depth`` layers a head, the inner ones ``expansion`` D."""

    operator: ClassVar[str] = "neural_memory"
    kinds: ClassVar[dict[str, str]] = {
        "token": "a token reads the weights updated by it",
        "chunk": "a token reads the weights before its chunk",
        "step": "decoding, one token per call",
    }
    quick_kinds: ClassVar[tuple[str, ...]] = ("token", "step")
    cuda_sizes: ClassVar[dict[str, int]] = {"B": 4, "H": 16}

    B: int = 2
    H: int = 4
    D: int = 64
    depth: int = 2
    expansion: int = 4
    chunk_size: int = 64

    @property
    def widths(self) -> list[int]:
        """``d_0 ... d_N``."""
        return [self.D, *[self.expansion * self.D] * (self.depth - 1), self.D]

    @property
    def weight_count(self) -> int:
        """Weights of one head."""
        return sum(m * n for m, n in zip(self.widths[1:], self.widths, strict=False))

    def inputs(self) -> dict[str, Tensor]:
        """Queries and keys of length 1, rates at which learning converges; exact in bfloat16."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        shape = (self.B, self.H, self.T)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator, device=self.device)

        def rate(scale: float) -> Tensor:
            drawn = torch.rand(shape, generator=generator, device=self.device)
            return (scale * drawn).to(torch.bfloat16).float()

        unit = lambda: F.normalize(draw(*shape, self.D), dim=-1)
        tokens = {"query": unit(), "key": unit(), "value": draw(*shape, self.D)}
        tensors = {n: x.to(torch.bfloat16).to(self.dtype) for n, x in tokens.items()}
        tensors |= {"lr": rate(0.02), "momentum": rate(0.9), "decay": rate(0.01)}
        for n, (before, after) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
            layer = draw(self.H, after, before) * before**-0.5
            tensors[f"weights_{n + 1}"] = layer.to(torch.bfloat16).float()
        return tensors

    def subject(self, backend: str) -> Forward:
        read = "chunk" if self.kind == "chunk" else "token"
        call = partial(_call, chunk_size=self.chunk_size, read=read, backend=backend)
        if self.kind != "step":
            return lambda inputs: call(inputs, return_state=False).out

        def decode(inputs: dict[str, Tensor]) -> Tensor:
            state, outs = call(_cut(inputs, 0, 0)).state, []
            layers = [x for name, x in inputs.items() if name.startswith("weights_")]
            tokens = {n: x.split(1, 2) for n, x in inputs.items() if not n.startswith("weights_")}
            options = {**call.keywords, "weights": layers}
            for token in zip(*tokens.values(), strict=True):
                own = dict(zip(tokens, token, strict=True))
                out, state, _ = neural_memory(**own, state=state, **options)
                outs.append(out)
            return torch.cat(outs, 2)

        return decode

    def definition(self, rows: slice) -> Forward:
        read = "chunk" if self.kind == "chunk" else "token"
        call = partial(_call, chunk_size=self.chunk_size, read=read, backend="reference")
        # later tokens are not seen
        return lambda inputs: call(_cut(inputs, 0, rows.stop)).out[:, :, rows.start :]

    def has(self, direction: str) -> bool:
        """Decoding is measured without gradients."""
        return direction == "forward" or self.kind != "step"

    def rows_are_independent(self) -> bool:
        """False: gradients by the definition would take minutes for a long case."""
        return False

    def peers(self) -> dict[str, Peer]:
        yardstick = self.work()
        memories = self.B * self.H * self.weight_count * 4
        chunks = -(-self.T // self.chunk_size)
        naive = Peer(partial(self.subject, "reference"), 8 * chunks * memories)
        if self.kind == "step":
            return {STATE_READ: Peer(self._read_state, yardstick=yardstick), "naive": naive}
        peers = {"naive": naive}
        if self.kind == "chunk":
            return peers
        # with score_bytes set, each is timed apart with our operator
        for name, every_chunk in ((TITANS, True), (TITANS_DEFAULT, False)):
            build = partial(titans_pytorch, self, every_chunk=every_chunk)
            peers[name] = Peer(build, 8 * chunks * memories, yardstick=yardstick)
        size = 4 * self.chunk_size * memories
        peers[PER_SAMPLE] = Peer(partial(by_chunks, self.chunk_size), size)
        peers[LOOP] = Peer(partial(by_tokens, self.chunk_size), size)
        return peers

    def _read_state(self) -> Forward:
        """Read all weights and momenta once per token."""
        shape = (2, self.B, self.H, self.weight_count)
        state = torch.zeros(shape, device=self.device)
        return lambda inputs: torch.stack([state.sum() for _ in range(self.T)])

    def work(self) -> dict[str, Work]:
        """Products of the chunked form; the backward is 2.5 forwards plus a recomputed one."""
        tokens, P = self.B * self.H * self.T, self.weight_count
        sums = sum(m + n for m, n in zip(self.widths[1:], self.widths, strict=False))
        inner = sum(self.widths[1:-1])
        element = torch.empty(0, dtype=self.dtype).element_size()
        moved = tokens * (4 * self.D * element + 16)
        if self.kind == "step":  # the state is read for each token; pairs of half a chunk
            flops = 2 * P + 2 * (P - self.widths[0] * self.widths[1]) + 4 * P
            read = self.T * self.B * self.H * P * 8
            flops += (self.chunk_size - 1) * sums + 4 * P
            return {"forward": Work(tokens * flops, 2 * tokens * inner, read + moved)}
        flops = 2 * P + 2 * (P - self.widths[0] * self.widths[1]) + 4 * P
        if self.kind == "chunk":
            flops += 2 * P
        else:
            flops += 4 * P + (min(self.chunk_size, self.T) + 1) * sums
        forward = Work(tokens * flops, 2 * tokens * inner, moved)
        backward = Work(forward.flops * 7 // 2, 2 * forward.exps, 2 * moved)
        return {"forward": forward, "backward": backward}

    def label(self, T: str | None = None) -> str:
        length = f"T={self.T}" if T is None else T
        return f"{self.kind} B={self.B} {length} D={self.D} depth={self.depth} b={self.chunk_size}"

    def tokens(self) -> int:
        return self.B * self.T

    @classmethod
    def bars(cls, suite: str) -> Sequence[Bar]:
        return _cpu_bars() if suite == "cpu-bars" else _gpu_bars()


def _call(inputs: dict[str, Tensor], **options: Any) -> Any:
    """The operator on inputs that hold its weights by name."""
    layers = [x for name, x in inputs.items() if name.startswith("weights_")]
    named = {name: x for name, x in inputs.items() if not name.startswith("weights_")}
    return neural_memory(**named, weights=layers, **options)


def _cut(inputs: dict[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    """The inputs of tokens ``first`` to ``last - 1``."""
    return {n: x if n.startswith("weights_") else x[:, :, first:last] for n, x in inputs.items()}


def _cpu_bars() -> list[Bar]:
    case = MemoryCase(kind="token", T=2048)
    steps = MemoryCase(kind="step", T=4 * case.chunk_size)
    on = partial(SpeedBar, case=case, direction=TRAINING)
    peak = partial(PeerPeakBar, case=case, direction=TRAINING, target=0.2)
    return [
        RoofBar(case=case, direction=TRAINING, target=60.0),
        on(against=(TITANS,), target=5.0, must=1.0),
        on(against=(TITANS_DEFAULT,), target=1.0),
        on(against=(PER_SAMPLE,), target=8.0, must=1.0),
        peak(against=TITANS),
        peak(against=PER_SAMPLE),
        LinearMemoryBar(case=case, direction=TRAINING, target=1.1, lengths=(1024, 4096, 16384)),
        CostBar(
            case=steps,
            direction="forward",
            target=2.0,
            against=STATE_READ,
            limited_by=MORE_THAN_THE_STATE,
        ),
    ]


def _gpu_bars() -> list[Bar]:
    case = MemoryCase(kind="token", T=8192, device="cuda", dtype=torch.bfloat16, B=4, H=16)
    on = partial(SpeedBar, case=case, direction=TRAINING, target=10.0, must=1.0)
    return [on(against=(TITANS,)), on(against=(PER_SAMPLE,))]


CASE = MemoryCase
