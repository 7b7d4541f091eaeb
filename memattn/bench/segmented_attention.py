"""Cases of segmented attention: useful pairs, and peers with the same mask."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from memattn.bench.bars import (
    BackwardBar,
    Bar,
    FlatTimeBar,
    LinearMemoryBar,
    RateBar,
    RoofBar,
    SpeedBar,
    bfloat16_bars,
)
from memattn.bench.case import Forward, Peer, TokenCase
from memattn.bench.inputs import make_segmented_inputs
from memattn.bench.limits import NEAR_THE_ROOF
from memattn.bench.peers import Attention, MaskMod, flex, sdpa, sdpa_backends
from memattn.bench.roofline import Work
from memattn.ops import segmented_attention

_SEGMENTED = ("segment", "blocks", "mac", "union")
_WINDOWED = ("window", "union")


def segmented_pairs(
    T: int,
    *,
    S: int | None = None,
    segment_len: int | None = None,
    window_size: int | None = None,
    is_causal: bool = True,
    num_persistent: int = 0,
    num_memory: int = 0,
    memory_is_causal: bool = False,
    query_offset: int = 0,
) -> int:
    """Exact number of allowed (query, key) pairs of one head and sequence, in O(T).

    Args:
        T: Number of queries; the first is at position ``query_offset``.
        S: Number of token keys; ``query_offset + T`` by default.
        segment_len: Tokens of a segment; it and the rest as in ``ops.segmented_attention``.
        window_size: Keys in the window.
        is_causal: Whether later keys are hidden.
        num_persistent: Persistent keys.
        num_memory: Memory keys of a segment.
        memory_is_causal: Whether a query sees memory rows only up to its index in the segment.
        query_offset: Position of the first query.
    """
    S = query_offset + T if S is None else S
    i = torch.arange(query_offset, query_offset + T)
    # segment and window both hold position i, so their union is one range of keys
    if segment_len is None and window_size is None:
        first, end = torch.zeros_like(i), torch.full_like(i, S)
    else:
        first, end = i + 1, i
        if segment_len is not None:
            start = i - i % segment_len
            first, end = torch.minimum(first, start), torch.maximum(end, start + segment_len)
        if window_size is not None:
            first = torch.minimum(first, i - window_size + 1)
            end = torch.maximum(end, i + window_size)
    if is_causal:
        end = torch.minimum(end, i + 1)
    tokens = (end.clamp(max=S) - first.clamp(min=0)).clamp(min=0)
    memory = torch.full_like(i, num_memory)
    if memory_is_causal and segment_len is not None:
        memory = i % segment_len + 1
    return int((tokens + memory).sum()) + num_persistent * T


@dataclass(frozen=True, kw_only=True)
class SegmentedCase(TokenCase):
    """One shape of segmented attention."""

    operator: ClassVar[str] = "segmented_attention"
    kinds: ClassVar[dict[str, str]] = {
        "dense": "every key",
        "causal": "every earlier key",
        "window": "the last window_size keys",
        "segment": "earlier keys of the segment",
        "blocks": "every key of the segment",
        "mac": "segment, persistent and memory keys: memory as context",
        "union": "segment or window, persistent and memory keys",
        "packed": "causal, within each of several documents",
    }
    quick_kinds: ClassVar[tuple[str, ...]] = ("causal", "window", "mac")
    cuda_sizes: ClassVar[dict[str, int]] = {
        "B": 2,
        "H": 32,
        "D": 128,
        "window_size": 1024,
        "segment_len": 512,
    }

    window_size: int = 256
    segment_len: int = 256
    P: int = 16
    M: int = 16
    documents: int = 8

    @property
    def batch(self) -> int:
        return 1 if self.kind == "packed" else self.B

    @property
    def has_context(self) -> bool:
        """Whether there are persistent and memory keys."""
        return self.kind in ("mac", "union")

    def lengths(self) -> list[int]:
        """Lengths of the documents: drawn at random, none longer than twice the mean."""
        if self.kind != "packed":
            return [self.T]
        generator = torch.Generator().manual_seed(self.seed)
        shares = 0.5 + 1.5 * torch.rand(min(self.documents, self.T), generator=generator)
        bounds = (shares.cumsum(0) / shares.sum() * self.T).round().int().tolist()
        bounds[-1] = self.T
        return [b - a for a, b in zip([0, *bounds], bounds, strict=False)]

    def mask_options(self) -> dict[str, Any]:
        """Arguments of the operator that define the mask."""
        return {
            "is_causal": self.kind not in ("dense", "blocks"),
            "segment_len": self.segment_len if self.kind in _SEGMENTED else None,
            "window_size": self.window_size if self.kind in _WINDOWED else None,
        }

    def options(self) -> dict[str, Any]:
        """All options of the operator."""
        if self.kind != "packed":
            return self.mask_options()
        bounds = torch.tensor([0, *self.lengths()], device=self.device).cumsum(0)
        return self.mask_options() | {"cu_seqlens": bounds.int()}

    def inputs(self) -> dict[str, Tensor]:
        P, M = (self.P, self.M) if self.has_context else (0, 0)
        return self.draw(make_segmented_inputs, P=P, M=M, segment_len=self.segment_len)

    def subject(self, backend: str) -> Forward:
        options = self.options()
        return lambda inputs: segmented_attention(**inputs, **options, backend=backend).out

    def definition(self, rows: slice) -> Forward:
        options = self.options() | {"query_offset": rows.start, "backend": "reference"}

        def forward(inputs: dict[str, Tensor]) -> Tensor:
            parts = {"query": inputs["query"][:, :, rows]}
            if options["is_causal"] and "cu_seqlens" not in options:
                # drop later keys, which no row sees
                parts |= {name: inputs[name][:, :, : rows.stop] for name in ("key", "value")}
            return segmented_attention(**(inputs | parts), **options).out

        return forward

    def label(self, T: str | None = None) -> str:
        sizes = [] if self.B == 1 else [f"B={self.B}"]
        sizes.append(f"T={self.T}" if T is None else T)
        if self.kind in _WINDOWED:
            sizes.append(f"W={self.window_size}")
        if self.kind in _SEGMENTED:
            sizes.append(f"L={self.segment_len}")
        if self.has_context:
            sizes.append(f"P={self.P} M={self.M}")
        sizes.append(f"D={self.D}")
        return " ".join([self.kind, *sizes]) + self.dtype_label

    def pairs(self) -> int:
        """Allowed pairs of one head, summed over the batch."""
        P, M = (self.P, self.M) if self.has_context else (0, 0)
        pairs = sum(
            segmented_pairs(length, num_persistent=P, num_memory=M, **self.mask_options())
            for length in self.lengths()
        )
        return pairs * self.batch

    def work(self) -> dict[str, Work]:
        keys = self.batch * self.T
        if self.has_context:
            keys += self.batch * self.M * -(-self.T // self.segment_len) + self.P
        return self.softmax_work(self.H * self.pairs(), self.key_heads * keys)

    def peers(self) -> dict[str, Peer]:
        S = self.num_keys()
        scores = self.score_bytes(S)
        peers = {}
        for name, backend in sdpa_backends(self.device).items():
            peers[f"sdpa {name}"] = Peer(
                partial(self._sdpa, backend),
                # the math backend stores scores, the others at most the mask in the input's dtype
                scores if name == "math" else self._dense_mask_bytes(S),
            )
            if self.kind in ("segment", "blocks") and self.T % self.segment_len == 0:
                folded = partial(sdpa, backend, is_causal=self.kind == "segment")
                stored = scores * self.segment_len // self.T if name == "math" else 0
                peers[f"sdpa {name}, folded"] = Peer(partial(self._folded, folded), stored)
        # the CPU builds the block mask from a dense one
        stored = 0 if "cuda" in self.device else 8 * self.T * S
        peers["flex"] = Peer(self._flex, stored, compiled=True)
        peers["naive"] = Peer(partial(self.subject, "reference"), scores)
        return peers

    def num_keys(self) -> int:
        """Keys of all sources of one sequence."""
        if not self.has_context:
            return self.T
        return self.P + self.M * -(-self.T // self.segment_len) + self.T

    def _dense_mask_bytes(self, S: int) -> int:
        return 0 if self.kind in ("dense", "causal") else self.T * S * (1 + self.dtype.itemsize)

    def _sdpa(self, backend: Any) -> Forward:
        if self.kind in ("dense", "causal"):
            return self._joined(sdpa(backend, is_causal=self.kind == "causal"))
        i = torch.arange(self.T, device=self.device)[:, None]
        j = torch.arange(self.num_keys(), device=self.device)[None, :]
        return self._joined(sdpa(backend, mask=self.mask_mod()(i, i, i, j)))

    def _flex(self) -> Forward:
        mask_mod = None if self.kind == "dense" else self.mask_mod()
        return self._joined(flex(mask_mod, self.T, self.num_keys(), self.device))

    def _folded(self, attention: Any) -> Forward:
        """Segments as rows of the batch; possible if the mask has nothing but segments."""
        inner: Attention = attention()

        def fold(x: Tensor) -> Tensor:
            x = x.unflatten(2, (-1, self.segment_len)).transpose(1, 2)
            return x.flatten(0, 1)  # [B * n_segments, H, L, D]

        def forward(inputs: dict[str, Tensor]) -> Tensor:
            out = inner(*(fold(inputs[name]) for name in ("query", "key", "value")))
            return out.unflatten(0, (self.B, -1)).transpose(1, 2).flatten(2, 3)

        return forward

    def _joined(self, attention: Attention) -> Forward:
        """One attention call over the concatenated keys of all sources."""

        def forward(inputs: dict[str, Tensor]) -> Tensor:
            key, value = inputs["key"], inputs["value"]
            if self.has_context:
                batch = [self.B, -1, -1, -1]
                key, value = (
                    torch.cat(
                        [
                            inputs[f"persistent_{name}"].expand(batch),
                            inputs[f"memory_{name}"].flatten(2, 3),
                            inputs[name],
                        ],
                        dim=2,
                    )
                    for name in ("key", "value")
                )
            return attention(inputs["query"], key, value)

        return forward

    def mask_mod(self) -> MaskMod:
        """The mask over the concatenated keys of all sources, as a FlexAttention ``mask_mod``."""
        options = self.mask_options()
        L, W, is_causal = options["segment_len"], options["window_size"], options["is_causal"]
        lengths = torch.tensor(self.lengths(), device=self.device)
        documents = torch.arange(lengths.numel(), device=self.device).repeat_interleave(lengths)
        P, M = (self.P, self.M) if self.has_context else (0, 0)
        first_token = self.num_keys() - self.T

        def token_mask(i: Tensor, j: Tensor) -> Tensor:
            allowed = documents[i] == documents[j] if len(lengths) > 1 else j >= 0
            if is_causal:
                allowed = allowed & (j <= i)
            if L is not None and W is not None:
                return allowed & ((i // L == j // L) | (j > i - W))
            if L is not None:
                return allowed & (i // L == j // L)
            return allowed if W is None else allowed & (j > i - W)

        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if not first_token:
                return token_mask(i, j)
            memory = (j >= P) & (j < first_token) & ((j - P) // M == i // L)
            return (j < P) | memory | ((j >= first_token) & token_mask(i, j - first_token))

        return mask

    @classmethod
    def bars(cls, suite: str) -> list[Bar]:
        return {"cpu-bars": _cpu_bars, "gpu-bars": _gpu_bars}[suite]()


def _cpu_bars() -> list[Bar]:
    bars: list[Bar] = []
    window = SegmentedCase(kind="window", T=4096, window_size=256)
    for direction in ("forward", "backward"):
        # AVX512 helps our kernels more than PyTorch's
        wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
        for kind, target in (("causal", 1.5), ("dense", 1.3 if wide else 1.2)):
            case = SegmentedCase(kind=kind, T=2048)
            on: Any = dict(case=case, direction=direction, against=("sdpa flash",))
            bars.append(SpeedBar(**on, target=target, must=1.2, limited_by=NEAR_THE_ROOF))
        # PyTorch's flash gets a dense mask here; its math backend is slower still
        dense = ("sdpa flash",)
        bars.append(SpeedBar(case=window, direction=direction, target=10.0, against=dense))
    on = dict(case=window, direction="forward", against=("flex",))
    bars.append(SpeedBar(**on, target=4.0, must=2.0, limited_by=NEAR_THE_ROOF))
    lengths = (2048, 4096, 8192, 16384, 32768)
    for direction in ("forward", "backward"):
        # the first rows see less than a full window: 6 % less work at T=2048
        bars.append(FlatTimeBar(case=window, direction=direction, target=1.15, lengths=lengths))
    many = replace(window, B=4)
    for direction in ("forward", "forward+backward"):
        # four sequences: with one, the granularity of the system's counter would show
        bars.append(LinearMemoryBar(case=many, direction=direction, target=1.1, lengths=lengths))
    for kind in ("dense", "causal"):
        bars += bfloat16_bars(SegmentedCase(kind=kind, T=2048), against="sdpa flash")
    return bars + bfloat16_bars(window)


def _gpu_bars() -> list[Bar]:
    on_gpu = partial(SegmentedCase, device="cuda", dtype=torch.bfloat16, H=32)
    bars: list[Bar] = []
    rates = {128: ((520, 450), (380, 300)), 64: ((430, 370), (330, 270))}
    for D, (forward, backward) in rates.items():
        for kind in ("dense", "causal"):
            case = on_gpu(kind=kind, T=8192, B=4, D=D)
            bars += [
                RateBar(case=case, direction="forward", target=forward[0], must=forward[1]),
                RateBar(case=case, direction="backward", target=backward[0], must=backward[1]),
                SpeedBar(case=case, direction="forward", target=1.0, against=("flex",)),
                SpeedBar(case=case, direction="backward", target=1.25, must=1.0, against=("flex",)),
            ]
    for D in (64, 128):
        short = on_gpu(kind="mac", T=8192, D=D, segment_len=512)
        long = short.resized(65536)
        for case in (short, long):
            bars += [
                RoofBar(case=case, direction="forward", target=75),
                RoofBar(case=case, direction="backward", target=55),
                BackwardBar(case=case, target=3.0),
            ]
        lengths = (8192, 16384, 32768, 65536)
        bars += [
            SpeedBar(case=short, direction="forward", target=1.1, against=("flex",)),
            SpeedBar(case=short, direction="backward", target=1.5, must=1.1, against=("flex",)),
            FlatTimeBar(case=short, direction="forward", target=1.1, lengths=lengths),
            FlatTimeBar(case=short, direction="backward", target=1.1, lengths=lengths),
        ]
    window = on_gpu(kind="window", T=16384, D=128, window_size=2048)
    blocks = on_gpu(kind="blocks", T=16384, D=128, segment_len=2048)
    return [
        *bars,
        RateBar(case=window, direction="forward", target=362, must=270),
        RateBar(case=blocks, direction="forward", target=580),
    ]


CASE = SegmentedCase
