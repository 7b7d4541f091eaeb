"""Cases of chapter attention: routing by token, block, sequence, beside the whole bank."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from memattn.bench.bars import Bar, CostBar, SpeedBar
from memattn.bench.case import Case, Forward, Peer
from memattn.bench.peers import sdpa, sdpa_backends
from memattn.bench.roofline import Work, attention_work
from memattn.ops import chapter_attention, segmented_attention

BLOCK = 64  # tokens of a routing block
OUR_BANK = "memattn, whole bank"


@dataclass(frozen=True, kw_only=True)
class ChapterCase(Case):
    """One shape of chapter attention; each routing row selects K chapters at random."""

    operator: ClassVar[str] = "chapter_attention"
    kinds: ClassVar[dict[str, str]] = {
        "token": "every token selects chapters",
        "block": f"blocks of {BLOCK} tokens do",
        "sequence": "a sequence does",
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
        return {"token": 1, "block": BLOCK, "sequence": max(self.T, 1)}[self.kind]

    def _draw(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed + seed)

    def inputs(self) -> dict[str, Tensor]:
        generator = self._draw(0)
        draw = lambda *shape: (
            torch.randn(*shape, generator=generator, device=self.device)
            .to(torch.bfloat16)
            .to(self.dtype)
        )
        bank = (self.C, self.key_heads, self.M, self.D)
        rows = (self.B, -(-self.T // self.block), self.K)
        weights = torch.rand(rows, generator=generator, device=self.device) + 0.125
        return {
            "query": draw(self.B, self.H, self.T, self.D),
            "chapter_key": draw(*bank),
            "chapter_value": draw(*bank),
            "chapter_weights": weights.to(torch.bfloat16).float(),
        }

    def indices(self) -> Tensor:
        """The chapters of each routing row, int32 ``[B, N, K]``."""
        rows = (self.B, -(-self.T // self.block), self.C)
        order = torch.rand(rows, generator=self._draw(1), device=self.device).argsort(-1)
        return order[..., : self.K].int()

    def subject(self, backend: str) -> Forward:
        call = partial(
            chapter_attention,
            chapter_indices=self.indices(),
            routing_block=self.block,
            backend=backend,
        )
        return lambda inputs: call(**inputs).out

    def definition(self, rows: slice) -> Forward:
        row_of = torch.arange(self.T, device=self.device)[rows] // self.block
        indices = self.indices()[:, row_of]

        def forward(inputs: dict[str, Tensor]) -> Tensor:
            part = {
                "query": inputs["query"][:, :, rows],
                "chapter_weights": inputs["chapter_weights"][:, row_of],
            }
            return chapter_attention(
                **inputs | part, chapter_indices=indices, backend="reference"
            ).out

        return forward

    def label(self, T: str | None = None) -> str:
        length = f"T={self.T}" if T is None else T
        return f"{self.kind} {length} C={self.C} M={self.M} K={self.K} D={self.D}"

    def tokens(self) -> int:
        return self.T * self.B

    def work(self) -> dict[str, Work]:
        return self._work(self.K)

    def _work(self, chapters: int) -> dict[str, Work]:
        rows = self.B * self.H * self.T
        return attention_work(
            pairs=rows * chapters * self.M,
            rows=rows,
            keys=self.C * self.key_heads * self.M,
            head_dim=self.D,
            value_dim=self.D,
            element_size=self.dtype.itemsize,
        )

    def peers(self) -> dict[str, Peer]:
        scores = self.B * self.T * self.C * self.M * self.dtype.itemsize
        whole = self._work(self.C)
        peers: dict[str, Peer] = {}
        for name, backend in sdpa_backends(self.device).items():
            size = self.H * scores if name == "math" else 0
            build = partial(self._bank, sdpa(backend))
            peers[f"sdpa {name}, whole bank"] = Peer(build, size, yardstick=whole)
        peers["sdpa, weights as a mask"] = Peer(self._masked, scores)
        peers[OUR_BANK] = Peer(partial(self._bank, _dense), yardstick=whole)
        peers["naive"] = Peer(partial(self.subject, "reference"), self.H * scores)
        return peers

    def _bank(self, attention: Any) -> Forward:
        """Attention of every query to all chapters."""

        def forward(inputs: dict[str, Tensor]) -> Tensor:
            key, value = (self._flat(inputs[f"chapter_{name}"]) for name in ("key", "value"))
            return attention(inputs["query"], key, value)

        return forward

    def _flat(self, bank: Tensor) -> Tensor:
        return bank.transpose(0, 1).flatten(1, 2).expand(self.B, -1, -1, -1)

    def _masked(self) -> Forward:
        """PyTorch's attention to the bank with the logarithms of the weights as its mask."""
        indices = self.indices().long()
        row_of = torch.arange(self.T, device=self.device) // self.block

        def forward(inputs: dict[str, Tensor]) -> Tensor:
            weights = inputs["chapter_weights"]
            none = weights.new_full((*indices.shape[:2], self.C), -torch.inf)
            mask = none.scatter(2, indices, weights.log())[:, row_of]
            mask = mask.repeat_interleave(self.M, -1)[:, None].to(self.dtype)
            key, value = (self._flat(inputs[f"chapter_{name}"]) for name in ("key", "value"))
            return torch.nn.functional.scaled_dot_product_attention(
                inputs["query"], key, value, attn_mask=mask, enable_gqa=self.key_heads != self.H
            )

        return forward

    @classmethod
    def bars(cls, suite: str) -> Sequence[Bar]:
        if suite != "cpu-bars":
            return ()
        case = cls(kind="token", T=2048)
        bars: list[Bar] = []
        for direction in ("forward", "backward"):
            faster = partial(SpeedBar, case=case, direction=direction)
            bars += [
                faster(target=5.0, against=("sdpa flash, whole bank",)),
                # at least 75 % of the rate of our attention to the whole bank
                CostBar(case=case, direction=direction, target=1 / 0.75, against=OUR_BANK),
            ]
        return bars


def _dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return segmented_attention(query, key, value, is_causal=False).out


CASE = ChapterCase
