"""Cases of chapter attention: routing by token, block and sequence, an int8 bank, their peers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memattn.bench.bars import (
    Bar,
    BarInputs,
    BytesBar,
    CostBar,
    PeakBar,
    RateBar,
    SpeedBar,
    TimeBar,
    bfloat16_bars,
)
from memattn.bench.case import Case, Forward, Peer
from memattn.bench.limits import GATHERED_ROWS
from memattn.bench.peers import flex, sdpa, sdpa_backends
from memattn.bench.roofline import Work, attention_work
from memattn.ops import chapter_attention, segmented_attention
from memattn.reference.chapter_quantization import quantize_rows

ROUTING_BLOCK_LEN = 64  # tokens of a routing block
WHOLE_BANK = "memattn, whole bank"
SAME_KEYS = "memattn, as many keys"  # every sequence uses the first K chapters: no selection
JOINT = "memattn, joint"
FLASH = "sdpa flash, whole bank"
FLOAT_BANK = "memattn, float bank"
GATHERED = "gather + sdpa"  # the backward gathers again; gathered keys would take gigabytes
GATHERED_BYTES = 1 << 27  # bytes of keys and values gathered at a time
GATHERED_BYTES_ON_CUDA = 1 << 32


@dataclass(frozen=True, kw_only=True)
class ChapterCase(Case):
    """One shape of chapter attention; each routing row selects K chapters at random."""

    operator: ClassVar[str] = "chapter_attention"
    kinds: ClassVar[dict[str, str]] = {
        "token": "every token selects chapters",
        "block": f"every block of {ROUTING_BLOCK_LEN} tokens selects chapters",
        "sequence": "every sequence selects chapters",
        "int8": "every token selects chapters of an int8 bank",
        "independent": "every token selects chapters, each with a softmax of its own",
    }
    quick_kinds: ClassVar[tuple[str, ...]] = ("token", "sequence")
    cuda_sizes: ClassVar[dict[str, int]] = {"B": 4, "H": 16}

    B: int = 1
    H: int = 8
    Hkv: int | None = None  # None: as many as H
    D: int = 64
    C: int = 64
    M: int = 64
    K: int = 8

    @property
    def key_heads(self) -> int:
        return self.H if self.Hkv is None else self.Hkv

    @property
    def block(self) -> int:
        """Tokens that share a routing row."""
        return {"block": ROUTING_BLOCK_LEN, "sequence": self.T}.get(self.kind, 1)

    @property
    def n_rows(self) -> int:
        """Routing rows of a sequence."""
        return -(-self.T // self.block)

    @property
    def combine(self) -> str:
        return "independent" if self.kind == "independent" else "joint"

    def _draw(self, part: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(3 * self.seed + part)

    def _normal(self, generator: torch.Generator, *shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, device=self.device)
        return drawn.to(torch.bfloat16).to(self.dtype)  # exact in every dtype

    def float_bank(self) -> dict[str, Tensor]:
        """Keys and values of the bank in the dtype of the case."""
        generator, shape = self._draw(0), (self.C, self.key_heads, self.M, self.D)
        names = ("chapter_key", "chapter_value")
        return {name: self._normal(generator, *shape) for name in names}

    def bank(self) -> dict[str, Tensor]:
        """Keys and values in the operator's form, with scales for an int8 bank."""
        bank = self.float_bank()
        if self.kind != "int8":
            return bank
        key, key_scale = quantize_rows(bank["chapter_key"], 8)
        value, value_scale = quantize_rows(bank["chapter_value"], 8)
        return {
            "chapter_key": key,
            "chapter_value": value,
            "key_scale": key_scale,
            "value_scale": value_scale,
        }

    def inputs(self) -> dict[str, Tensor]:
        """Query, weights and the bank; an int8 bank has no gradient and is left out."""
        generator = self._draw(1)
        query = self._normal(generator, self.B, self.H, self.T, self.D)
        rows = (self.B, self.n_rows, self.K)
        weights = torch.rand(rows, generator=generator, device=self.device) + 0.125
        inputs = {"query": query, "chapter_weights": weights.to(torch.bfloat16).float()}
        return inputs if self.kind == "int8" else inputs | self.float_bank()

    def indices(self) -> Tensor:
        """The chapters of each routing row, int32 ``[B, N, K]``."""
        rows = (self.B, self.n_rows, self.C)
        order = torch.rand(rows, generator=self._draw(2), device=self.device).argsort(-1)
        return order[..., : self.K].int()

    def subject(self, backend: str) -> Forward:
        attention: Any = partial(
            chapter_attention,
            chapter_indices=self.indices(),
            routing_block=self.block,
            combine=self.combine,
            backend=backend,
        )
        bank = self.bank() if self.kind == "int8" else {}
        return lambda inputs: attention(**inputs, **bank).out

    def definition(self, rows: slice) -> Forward:
        row_of = torch.arange(self.T, device=self.device)[rows] // self.block
        bank = self.bank() if self.kind == "int8" else {}
        attention: Any = partial(
            chapter_attention,
            chapter_indices=self.indices()[:, row_of],
            combine=self.combine,
            backend="reference",
        )

        def forward(inputs: dict[str, Tensor]) -> Tensor:
            query, weights = inputs["query"][:, :, rows], inputs["chapter_weights"][:, row_of]
            return attention(**inputs | bank | {"query": query, "chapter_weights": weights}).out

        return forward

    def label(self, T: str | None = None) -> str:
        length = f"T={self.T}" if T is None else T
        sizes = f"C={self.C} M={self.M} K={self.K} D={self.D}"
        return f"{self.kind} {length} {sizes}{self.dtype_label}"

    def tokens(self) -> int:
        return self.T * self.B

    def work(self) -> dict[str, Work]:
        return self._work(self.K)

    def _work(self, chapters: int) -> dict[str, Work]:
        rows, size = self.B * self.H * self.T, self.dtype.itemsize
        keys = {"forward": self.C * self.key_heads * self.M}
        keys["backward"] = keys["forward"]
        if self.kind == "int8":  # codes and one scale per row; they have no gradient
            keys["forward"] = keys["forward"] * (self.D + 4) // (self.D * size)
            keys["backward"] = keys["forward"] // 2
        return {
            direction: attention_work(
                pairs=rows * chapters * self.M,
                rows=rows,
                keys=number,
                head_dim=self.D,
                value_dim=self.D,
                element_size=size,
            )[direction]
            for direction, number in keys.items()
        }

    def peers(self) -> dict[str, Peer]:
        scores = self.B * self.H * self.T * self.C * self.M * self.dtype.itemsize
        peers = {"naive": Peer(partial(self.subject, "reference"), scores)}
        if self.kind == "int8":
            return {FLOAT_BANK: Peer(self._of_float_bank, yardstick=self.work())} | peers
        if self.kind == "independent":
            joint = replace(self, kind="token")
            return {JOINT: Peer(partial(joint.subject, "auto"), yardstick=self.work())} | peers
        whole = self._work(self.C)
        for name, backend in sdpa_backends(self.device).items():
            build = partial(self._whole, sdpa(backend))
            size = scores if name == "math" else 0
            peers[f"sdpa {name}, whole bank"] = Peer(build, size, yardstick=whole)
        peers["sdpa, weights as a mask"] = Peer(self._masked, scores)
        peers[GATHERED] = Peer(self._gathered, self._gathered_bytes)
        # the CPU builds the block mask from a dense one
        stored = 0 if "cuda" in self.device else 8 * self.B * self.T * self.C * self.M
        peers["flex"] = Peer(self._flex, stored, compiled=True)
        peers[WHOLE_BANK] = Peer(partial(self._whole, _dense), yardstick=whole)
        own = partial(self._whole, _dense, self.K)
        peers[SAME_KEYS] = Peer(own, yardstick=self.work())
        return peers

    @property
    def _gathered_bytes(self) -> int:
        return GATHERED_BYTES_ON_CUDA if "cuda" in self.device else GATHERED_BYTES

    def _of_float_bank(self) -> Forward:
        forward, bank = replace(self, kind="token").subject("auto"), self.float_bank()
        return lambda inputs: forward(inputs | bank)

    def _whole(self, attention: Any, chapters: int | None = None) -> Forward:
        """Attention of every query to all chapters, or to the first ``chapters``."""

        def forward(inputs: dict[str, Tensor]) -> Tensor:
            return attention(inputs["query"], *self._flat(inputs, chapters))

        return forward

    def _flat(
        self, inputs: dict[str, Tensor], chapters: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the bank for every sequence, ``[B, Hkv, C * M, D]``."""
        flat = lambda x: x[:chapters].transpose(0, 1).flatten(1, 2).expand(self.B, -1, -1, -1)
        return flat(inputs["chapter_key"]), flat(inputs["chapter_value"])

    def _flex(self) -> Forward:
        """FlexAttention to the bank with a block mask of the selection; weights as a score_mod."""
        indices, block, M = self.indices().long(), self.block, self.M
        none = torch.zeros(*indices.shape[:2], self.C, device=self.device)
        is_selected = none.bool().scatter(2, indices, True)
        attention = flex(
            lambda b, h, i, j: is_selected[b, i // block, j // M],
            self.T,
            self.C * M,
            self.device,
            batch=self.B,
            score_mod=lambda score, b, h, i, j, bias: score + bias[b, i // block, j // M],
        )

        def forward(inputs: dict[str, Tensor]) -> Tensor:
            bias = none.scatter(2, indices, inputs["chapter_weights"].log())
            return attention(inputs["query"], *self._flat(inputs), bias)

        return forward

    def _masked(self) -> Forward:
        """PyTorch's attention to the bank with the logarithms of the weights as the mask."""
        indices = self.indices().long()
        row_of = torch.arange(self.T, device=self.device) // self.block

        def forward(inputs: dict[str, Tensor]) -> Tensor:
            weights = inputs["chapter_weights"]
            none = weights.new_full((*indices.shape[:2], self.C), -torch.inf)
            mask = none.scatter(2, indices, weights.log())[:, row_of]
            mask = mask.repeat_interleave(self.M, -1)[:, None].to(self.dtype)
            return _sdpa(inputs["query"], *self._flat(inputs), mask)

        return forward

    def _gathered(self) -> Forward:
        """PyTorch's attention to the gathered keys of each routing row, a few rows at a time."""
        indices, block = self.indices().long(), self.block
        row_bytes = 2 * self.B * self.key_heads * self.K * self.M * self.D * self.dtype.itemsize
        step = max(1, self._gathered_bytes // row_bytes)

        def part(query: Tensor, key: Tensor, value: Tensor, weights: Tensor, n: int) -> Tensor:
            chosen = indices[:, n : n + step]
            # [B, rows, K, Hkv, M, D] to [B * rows, Hkv, K * M, D]
            gather = lambda bank: bank[chosen].transpose(2, 3).flatten(3, 4).flatten(0, 1)
            R, T = chosen.shape[1], query.shape[2]
            query = F.pad(query, (0, 0, 0, R * block - T)).unflatten(2, (R, block))
            mask = weights.log().repeat_interleave(self.M, -1).flatten(0, 1)[:, None, None]
            mask = mask.to(self.dtype).expand(-1, -1, block, -1)
            out = _sdpa(query.transpose(1, 2).flatten(0, 1), gather(key), gather(value), mask)
            return out.unflatten(0, (self.B, R)).transpose(1, 2).flatten(2, 3)[:, :, :T]

        def forward(inputs: dict[str, Tensor]) -> Tensor:
            names = ("query", "chapter_key", "chapter_value", "chapter_weights")
            query, key, value, weights = (inputs[name] for name in names)
            if step >= self.n_rows:  # all rows fit: nothing is gathered twice
                return part(query, key, value, weights, 0)
            parts: list[Any] = [
                checkpoint(
                    part,
                    query[:, :, n * block : (n + step) * block],
                    key,
                    value,
                    weights[:, n : n + step],
                    n,
                    use_reentrant=False,
                )
                for n in range(0, self.n_rows, step)
            ]
            return torch.cat(parts, 2)

        return forward

    @classmethod
    def bars(cls, suite: str) -> Sequence[Bar]:
        return _cpu_bars() if suite == "cpu-bars" else _gpu_bars()


def _cpu_bars() -> list[Bar]:
    case = ChapterCase(kind="token", T=2048)
    int8 = replace(case, kind="int8")
    bars: list[Bar] = []
    for direction in ("forward", "backward"):
        faster = partial(SpeedBar, case=case, direction=direction)
        bars += [
            faster(target=5.0, against=(FLASH,)),
            faster(target=6.0, against=(GATHERED,)),
            # at least 75 % of the rate of our attention to the whole bank
            CostBar(
                case=case,
                direction=direction,
                target=1 / 0.75,
                against=WHOLE_BANK,
                limited_by=GATHERED_ROWS,
            ),
            SpeedBar(case=int8, direction=direction, target=1 / 1.1, against=(FLOAT_BANK,)),
        ]
    few, many = replace(case, K=2), replace(case, K=32)
    for direction in ("forward", "forward+backward"):
        bars.append(PeakBar(case=many, base=few, direction=direction, target=1.1))
    for kind in ("token", "sequence"):
        bars += bfloat16_bars(replace(case, kind=kind))
    return [*bars, BankBytesBar(case=int8, base=case, direction="forward", target=0.3)]


def _gpu_bars() -> list[Bar]:
    on = partial(ChapterCase, device="cuda", dtype=torch.bfloat16)
    sequence = on(kind="sequence", T=8192, B=4, H=12, C=4096, K=64)
    token = on(kind="token", T=8192, B=32, C=512, M=128)
    grouped = replace(token, H=16, Hkv=1)
    long = on(kind="token", T=65536, H=64, Hkv=4, D=128, C=1024, K=16)
    # goal and minimum: milliseconds for published shapes, TFLOP/s for the long shape
    times = {(token, "forward"): (5.0, 10.0), (token, "backward"): (12.0, 22.0)}
    times |= {(grouped, "forward"): (6.0, 9.0), (grouped, "backward"): (14.0, 22.0)}
    rates = {"forward": (200.0, 110.0), "backward": (250.0, 180.0)}
    bars: list[Bar] = []
    for direction, share in (("forward", 0.85), ("backward", 0.8)):
        bars += [
            CostBar(case=sequence, direction=direction, target=1 / share, against=SAME_KEYS),
            SpeedBar(case=sequence, direction=direction, target=1.5, against=(GATHERED,)),
        ]
        bars += [
            TimeBar(case=case, direction=direction, target=times[case, direction][0],
                    must=times[case, direction][1])
            for case in (token, grouped)
        ]  # fmt: skip
        faster = partial(SpeedBar, direction=direction, target=1.0)
        bars += [faster(case=token, against=(name,)) for name in (FLASH, GATHERED, "flex")]
        goal, least = rates[direction]
        bars.append(RateBar(case=long, direction=direction, target=goal, must=least))
        independent = replace(token, kind="independent")
        bars.append(faster(case=independent, must=1 / 1.2, against=(JOINT,)))
    return bars


@dataclass(frozen=True, kw_only=True)
class BankBytesBar(BytesBar):
    """Bytes of the bank over those of the bank of case ``base``."""

    case: ChapterCase
    base: ChapterCase

    what: ClassVar[str] = "memory of the bank"

    def reached(self, measured: BarInputs) -> float:
        ours, its = (sum(x.nbytes for x in c.bank().values()) for c in (self.case, self.base))
        return ours / its


def _dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return segmented_attention(query, key, value, is_causal=False).out


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)


CASE = ChapterCase
