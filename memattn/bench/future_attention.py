"""Cases of future attention: past and future band, with and without the fused loss; peers."""

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from memattn.bench.bars import Bar, CostBar, LinearMemoryBar, SpeedBar, bfloat16_bars
from memattn.bench.case import Forward, Peer, TokenCase
from memattn.bench.inputs import make_future_inputs
from memattn.bench.peers import flex, sdpa, sdpa_backends
from memattn.bench.roofline import Work
from memattn.ops import future_attention, future_attention_loss, segmented_attention

OUR_PAST = "memattn, past only"
_LOSSES: dict[str, dict[str, Any]] = {
    "mse": {"loss_type": "mse"},
    "cosine": {"loss_type": "cosine"},
    "through": {"loss_type": "mse", "detach_target": False},
}
_CHUNK = 256  # rows that the definition computes at once
_LONGEST_LOSS = 4096  # above it the definition of the loss takes minutes, because it needs all rows


@dataclass(frozen=True, kw_only=True)
class FutureCase(TokenCase):
    """One shape of future attention; the whole batch shares one future table.

    For kinds with a loss, the output is ``out + loss``, so that one cotangent reaches both.
    """

    operator: ClassVar[str] = "future_attention"
    kinds: ClassVar[dict[str, str]] = {
        "future": "past and future band, without a loss",
        "mse": "with the mean squared error",
        "cosine": "with the cosine loss",
        "through": "with the mean squared error; the gradient also flows through the target",
    }
    quick_kinds: ClassVar[tuple[str, ...]] = ("future", "mse")
    cuda_sizes: ClassVar[dict[str, int]] = {"B": 4, "H": 32, "D": 128}

    future_dim: int = 64

    @property
    def rows(self) -> int:
        """Rows of the future table."""
        return max(self.T - 1, self.future_dim)

    def options(self) -> dict[str, Any]:
        """All options of the operator."""
        return {"future_dim": self.future_dim, **_LOSSES.get(self.kind, {})}

    def inputs(self) -> dict[str, Tensor]:
        return self.draw(make_future_inputs, rows=self.rows)

    def subject(self, backend: str) -> Forward:
        options = self.options()
        if self.kind == "future":
            return lambda inputs: future_attention(**inputs, **options, backend=backend).out

        def forward(inputs: dict[str, Tensor]) -> Tensor:
            out, loss, _ = future_attention_loss(**inputs, **options, backend=backend)
            return out + loss.to(out.dtype)

        return forward

    def checked(self, backend: str) -> Forward:
        """The subject; for a very long sequence with a loss, its output without the loss."""
        if self._loss_is_checked():
            return self.subject(backend)
        options = self.options()
        return lambda inputs: future_attention_loss(**inputs, **options, backend=backend).out

    def _loss_is_checked(self) -> bool:
        return self.kind == "future" or self.T <= _LONGEST_LOSS

    def rows_are_independent(self) -> bool:
        return self.kind == "future"

    def definition(self, rows: slice) -> Forward:
        if (rows.start, rows.stop) == (0, self.T):
            return self.subject("reference")
        options = {"future_dim": self.future_dim, "backend": "reference"}

        def forward(inputs: dict[str, Tensor]) -> Tensor:
            part = inputs | {"query": inputs["query"][:, :, rows]}
            out = future_attention(**part, **options, query_offset=rows.start).out
            if self.kind == "future" or not self._loss_is_checked():
                return out
            return out + _loss(self, out.dtype).to(out.dtype)

        return forward

    def label(self, T: str | None = None) -> str:
        length = f"T={self.T}" if T is None else T
        return f"{self.kind} {length} F={self.future_dim} D={self.D}{self.dtype_label}"

    def pairs(self) -> tuple[int, int]:
        """Pairs of the past and of the future band, over all query heads and sequences."""
        i = torch.arange(self.T)
        band = (self.rows - i).clamp(0, self.future_dim).sum()
        heads = self.B * self.H
        return heads * self.T * (self.T + 1) // 2, heads * int(band)

    def work(self) -> dict[str, Work]:
        past, band = self.pairs()
        # the target of the loss is a second band of scores; its gradient, if any, a second band too
        forward = past + band * (1 if self.kind == "future" else 2)
        backward = past + band * (2 if self.kind == "through" else 1)
        keys = self.B * self.key_heads * self.T + self.H * self.rows
        work = {
            direction: self.softmax_work(pairs, keys)[direction]
            for direction, pairs in (("forward", forward), ("backward", backward))
        }
        # out_future and the target are kept for the backward
        kept = self.dtype.itemsize * self.B * self.H * self.T * self.D
        more = Work(0, 0, kept * (1 if self.kind == "future" else 2))
        return {direction: own + more for direction, own in work.items()}

    def peers(self) -> dict[str, Peer]:
        past = self.softmax_work(self.pairs()[0], self.B * self.key_heads * self.T)
        peers = {
            f"sdpa {name}, past only": Peer(
                partial(self._sdpa, backend),
                self.score_bytes(self.T) if name == "math" else 0,
                yardstick=past,
            )
            for name, backend in sdpa_backends(self.device).items()
        }
        peers[OUR_PAST] = Peer(self._past, yardstick=past)
        if self.kind == "future":
            # the CPU builds the block mask from a dense one
            stored = 0 if "cuda" in self.device else 8 * self.T * (self.T + self.rows)
            peers["flex"] = Peer(self._flex, stored, compiled=True)
        per_row = self.T + self.rows + (0 if self.kind == "future" else self.T)
        peers["naive"] = Peer(partial(self.subject, "reference"), self.score_bytes(per_row))
        return peers

    def _sdpa(self, backend: Any) -> Forward:
        attention = sdpa(backend, is_causal=True)
        return lambda inputs: attention(inputs["query"], inputs["key"], inputs["value"])

    def _past(self) -> Forward:
        return lambda inputs: (
            segmented_attention(inputs["query"], inputs["key"], inputs["value"]).out
        )

    def _flex(self) -> Forward:
        """FlexAttention over the concatenation of keys and future table."""
        T, F = self.T, self.future_dim

        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) | ((j - T >= i) & (j - T < i + F))

        attention = flex(mask, T, T + self.rows, self.device)
        groups = self.H // self.key_heads

        def forward(inputs: dict[str, Tensor]) -> Tensor:
            key, value = (
                torch.cat(
                    [
                        inputs[name].repeat_interleave(groups, 1),
                        inputs[f"future_{name}"].expand(self.B, -1, -1, -1),
                    ],
                    dim=2,
                )
                for name in ("key", "value")
            )
            return attention(inputs["query"], key, value)

        return forward

    @classmethod
    def bars(cls, suite: str) -> list[Bar]:
        return {"cpu-bars": _cpu_bars, "gpu-bars": _gpu_bars}[suite]()


@cache
@torch.no_grad()
def _loss(case: FutureCase, dtype: torch.dtype) -> Tensor:
    """The loss of all rows by the definition in ``dtype``, computed in chunks of rows."""
    inputs = {name: x.to(dtype) for name, x in case.inputs().items()}
    options: dict[str, Any] = case.options() | {"backend": "reference"}
    total, count = inputs["query"].new_zeros((), dtype=torch.float64), 0
    whole = min(case.T - 1, case.rows) if case.rows < case.T else 0  # rows that count
    for start in range(0, whole, _CHUNK):
        stop = min(start + _CHUNK, whole)
        # no query of this chunk sees keys or table rows beyond its band
        part = {name: x[..., : stop + case.future_dim, :] for name, x in inputs.items()}
        part["query"] = part["query"][:, :, start:stop]
        loss = future_attention_loss(**part, **options, query_offset=start).loss
        total, count = total + loss * (stop - start), count + stop - start
    return total / max(count, 1)


def _cost_bars(case: FutureCase) -> list[Bar]:
    """Limits on the time per pair, relative to our causal attention."""
    return [
        CostBar(
            case=replace(case, kind=kind),
            direction="forward+backward",
            target=cost,
            against=OUR_PAST,
            priced=replace(case, kind="future"),
        )
        for kind, cost in (("future", 1.15), ("mse", 1.3), ("cosine", 1.3))
    ]


def _naive_bars(case: FutureCase) -> list[Bar]:
    """Speed over the naive module, which stores score matrices."""
    both = "forward+backward"
    return [
        SpeedBar(case=replace(case, kind=kind), direction=both, target=5.0, against=("naive",))
        for kind in ("future", "mse")
    ]


def _cpu_bars() -> list[Bar]:
    case = FutureCase(kind="future", T=2048)
    memory = LinearMemoryBar(
        case=replace(case, kind="mse"),
        direction="forward+backward",
        target=1.1,
        lengths=(512, 1024, 2048, 4096, 8192, 16384),
    )
    half = [bar for kind in ("future", "mse") for bar in bfloat16_bars(replace(case, kind=kind))]
    return [*_cost_bars(case), *_naive_bars(case), memory, *half]


def _gpu_bars() -> list[Bar]:
    on_gpu = partial(FutureCase, kind="future", T=4096, device="cuda", dtype=torch.bfloat16)
    bars: list[Bar] = []
    for D in (64, 128):
        for future_dim in (64, 256):
            case = on_gpu(B=4, H=32, D=D, future_dim=future_dim)
            bars += _cost_bars(case)
            # at least 70 % of the rate of cuDNN's causal attention
            bars.append(
                CostBar(
                    case=replace(case, kind="mse"),
                    direction="forward",
                    target=1 / 0.7,
                    against="sdpa cudnn, past only",
                )
            )
        bars += _naive_bars(on_gpu(B=1, H=8, D=D))
    return bars


CASE = FutureCase
