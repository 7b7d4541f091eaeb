"""Cases of the chapter router; the peer is composed of PyTorch's operators."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from memattn.bench.bars import (
    Bar,
    PeerPeakBar,
    RoofBar,
    SpeedBar,
    bfloat16_bars,
)
from memattn.bench.case import Case, Forward, Peer
from memattn.bench.limits import NEAR_THE_ROOF
from memattn.bench.roofline import Work
from memattn.ops import chapter_router

COMPOSITION = "naive"


@dataclass(frozen=True, kw_only=True)
class RouterCase(Case):
    """One shape of the router: ``T`` rows a sequence, ``C`` chapters, weights and three losses."""

    operator: ClassVar[str] = "chapter_router"
    kinds: ClassVar[dict[str, str]] = {"router": "top-k, weights and all losses"}
    quick_kinds: ClassVar[tuple[str, ...]] = ("router",)
    cuda_sizes: ClassVar[dict[str, int]] = {"B": 4, "E": 768, "C": 4096, "K": 64}

    B: int = 1
    E: int = 64
    C: int = 1024
    K: int = 8

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator(self.device).manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            values = torch.randn(*shape, generator=generator, device=self.device)
            return values.to(torch.bfloat16).to(self.dtype)

        return {
            "hidden": draw(self.B, self.T, self.E),
            # logits of about 1
            "weight": (draw(self.C, self.E) * self.E**-0.5).to(torch.bfloat16).to(self.dtype),
            "bias": draw(self.C),
        }

    def subject(self, backend: str) -> Forward:
        def forward(inputs: dict[str, Tensor]) -> Tensor:
            hidden, weight, bias = (inputs[name] for name in ("hidden", "weight", "bias"))
            found = chapter_router(hidden, weight, bias, top_k=self.K, backend=backend)
            return _in_columns(
                found.weights, found.load_balance_loss, found.auxiliary_loss, found.z_loss
            )

        return forward

    def definition(self, rows: slice) -> Forward:
        whole = self.subject("reference")
        return lambda inputs: whole(inputs)[:, :, rows]

    def rows_are_independent(self) -> bool:
        """Losses are means over all rows."""
        return False

    def peers(self) -> dict[str, Peer]:
        size = 4 * self.B * self.T * self.C
        return {
            COMPOSITION: Peer(lambda: self._composition, score_bytes=size),
            "compiled": Peer(
                lambda: torch.compile(self._composition), score_bytes=size, compiled=True
            ),
        }

    def _composition(self, inputs: dict[str, Tensor]) -> Tensor:
        """The router in plain PyTorch; the order of tied logits is not defined."""
        hidden, weight, bias = (inputs[name] for name in ("hidden", "weight", "bias"))
        wide = torch.promote_types(torch.float32, hidden.dtype)
        logits = torch.nn.functional.linear(hidden.to(wide), weight.to(wide), bias.to(wide))
        values, indices = logits.topk(self.K, -1)
        load = torch.zeros(self.C, dtype=wide, device=hidden.device)
        ones = torch.ones_like(indices, dtype=wide).flatten()
        load = load.scatter_add(0, indices.flatten(), ones) / (self.B * self.T)
        importance = logits.softmax(-1).mean((0, 1))
        balance = self.C / self.K * (load * importance).sum()
        auxiliary = self.C * (importance - 1 / self.C).square().sum()
        z = logits.logsumexp(-1).square().mean()
        return _in_columns(values.softmax(-1), balance, auxiliary, z)

    def work(self) -> dict[str, Work]:
        """One product in the forward, three in the backward; inputs and results move once."""
        rows, size = self.B * self.T, torch.empty(0, dtype=self.dtype).element_size()
        inputs = size * (rows * self.E + self.C * self.E)
        pairs = rows * self.C
        forward = Work(2 * pairs * self.E, pairs, inputs + 8 * rows * self.K)
        return {
            "forward": forward,
            "backward": Work(6 * pairs * self.E, pairs, 2 * inputs + 8 * rows * self.K),
        }

    def label(self, T: str | None = None) -> str:
        length = T or f"T={self.T}"
        sizes = f"E={self.E} C={self.C} K={self.K}"
        return f"{self.kind} B={self.B} {length} {sizes}{self.dtype_label}"

    def tokens(self) -> int:
        return self.B * self.T

    @classmethod
    def bars(cls, suite: str) -> Sequence[Any]:
        return _cpu_bars() if suite == "cpu-bars" else _gpu_bars()


def _in_columns(weights: Tensor, *losses: Tensor) -> Tensor:
    """Weights and losses as columns, ``[B, 1, T, K + 3]``, so that each has its own cotangent."""
    columns = torch.stack(losses).to(weights.dtype).expand(*weights.shape[:2], -1)
    return torch.cat([weights, columns], -1)[:, None]


def _cpu_bars() -> list[Bar]:
    small, wide = (RouterCase(kind="router", T=8192, E=E) for E in (64, 512))
    against = (COMPOSITION,)
    return [
        SpeedBar(case=small, direction="forward", target=3.0, against=against),
        SpeedBar(
            case=small,
            direction="backward",
            target=3.0,
            against=against,
            limited_by=NEAR_THE_ROOF,
        ),
        SpeedBar(case=wide, direction="forward", target=1.5, against=against),
        *(
            PeerPeakBar(case=case, direction="forward+backward", target=0.25, against=COMPOSITION)
            for case in (small, wide)
        ),
        # only the logits are bfloat16 products; gradients are computed in float32
        *(bar for case in (small, wide) for bar in bfloat16_bars(case, directions=("forward",))),
    ]


def _gpu_bars() -> list[Bar]:
    case = RouterCase(
        kind="router", T=8192, device="cuda", dtype=torch.bfloat16, **RouterCase.cuda_sizes
    )
    both = "forward+backward"
    return [
        SpeedBar(case=case, direction=both, target=3.0, against=(COMPOSITION,)),
        SpeedBar(case=case, direction=both, target=1.0, against=("compiled",)),
        RoofBar(case=case, direction=both, target=70.0),
    ]


CASE = RouterCase
