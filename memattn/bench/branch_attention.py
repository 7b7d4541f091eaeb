"""Cases of branch attention: branches chosen by token or sample, operator or layer, peers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from memattn.bench.bars import Bar, CostBar, PeakBar, SpeedBar, bfloat16_bars
from memattn.bench.case import Forward, Peer, TokenCase
from memattn.bench.limits import FEW_ROWS_OF_A_BRANCH
from memattn.bench.roofline import Work
from memattn.nn import ShiftableMultiheadAttention
from memattn.ops import branch_attention

K_BRANCHES = "memattn, as many branches"  # K branches in all; every token is in all of them
CALL_PER_BRANCH = "a call of sdpa for each branch"
TRAINING = "forward+backward"


@dataclass(frozen=True, kw_only=True)
class BranchCase(TokenCase):
    """One shape of causal branch attention with F branches; each token is in K of them.

    The layer kinds add projections of queries, keys, values and outputs, and the base as one more
    branch that every token is in. Only the specialists' weights have gradients.
    """

    operator: ClassVar[str] = "branch_attention"
    kinds: ClassVar[dict[str, str]] = {
        "token": "every token chooses branches",
        "sample": "every sequence chooses branches",
        "layer-token": "a layer with a base; every token chooses specialists",
        "layer-sample": "a layer with a base; every sequence chooses specialists",
    }
    quick_kinds: ClassVar[tuple[str, ...]] = ("token", "sample")
    cuda_sizes: ClassVar[dict[str, int]] = {"H": 16}

    B: int = 4
    F: int = 50  # branches, or specialists
    K: int = 2

    @property
    def is_layer(self) -> bool:
        return self.kind.startswith("layer")

    @property
    def width(self) -> int:
        """Features of a layer."""
        return self.H * self.D

    def _draw(self, part: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(3 * self.seed + part)

    def chosen(self) -> Tensor:
        """The branches of every token, int32 ``[B, T, K]``."""
        rows = self.T if self.kind.endswith("token") else 1
        drawn = torch.rand(self.B, rows, self.F, generator=self._draw(0), device=self.device)
        return drawn.argsort(-1)[..., : self.K].int().expand(self.B, self.T, self.K)

    def gates(self) -> Tensor:
        """Gates of a layer: half for the base, half shared by the chosen specialists."""
        shares = torch.zeros(self.B, self.T, 1 + self.F, device=self.device)
        shares[..., 0] = 0.5
        return shares.scatter(2, 1 + self.chosen().long(), 0.5 / self.K)

    def inputs(self) -> dict[str, Tensor]:
        generator = self._draw(1)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = scale * torch.randn(*shape, generator=generator, device=self.device)
            return drawn.to(torch.bfloat16).to(self.dtype)  # exact in every dtype

        if not self.is_layer:
            keys = (self.B, self.F, self.key_heads, self.T, self.D)
            gates = torch.rand(self.B, self.T, self.K, generator=generator, device=self.device)
            return {
                "query": draw(self.B, self.K, self.H, self.T, self.D),
                "key": draw(*keys),
                "value": draw(*keys),
                "gates": (gates + 0.125).to(torch.bfloat16).float(),
            }
        E = self.width
        weights = {
            f"specialists.specialist_{n}.{name}_weight": draw(E, E, scale=E**-0.5)
            for n in range(self.F)
            for name in ("q", "k", "v", "out")
        }
        return {"hidden": draw(self.B, self.T, E)} | weights

    def base(self, dtype: torch.dtype) -> nn.MultiheadAttention:
        """The frozen attention of a layer."""
        base = nn.MultiheadAttention(self.width, self.H, bias=False, batch_first=True)
        generator = torch.Generator().manual_seed(self.seed)
        for weight in base.parameters():
            drawn = torch.randn(weight.shape, generator=generator) * self.width**-0.5
            weight.data = drawn.to(torch.bfloat16).to(self.device, dtype)
        return base.requires_grad_(False)

    def subject(self, backend: str) -> Forward:
        if self.is_layer:
            return self._layer(self.F, self.gates(), backend)
        attention: Any = partial(branch_attention, branch_indices=self.chosen(), backend=backend)
        return lambda inputs: attention(**inputs).out.flatten(1, 2)

    def _layer(self, n_specialists: int, gates: Tensor, backend: str) -> Forward:
        with torch.device("meta"):  # the weights are inputs
            base = nn.MultiheadAttention(self.width, self.H, bias=False, batch_first=True)
            module = ShiftableMultiheadAttention(
                self.width, self.H, base, n_specialists, backend=backend
            )
        module.base = self.base(self.dtype)
        names = {n for n, _ in module.named_parameters()}
        mask = nn.Transformer.generate_square_subsequent_mask(self.T).to(self.device)
        masks = {"attn_mask": mask, "is_causal": True, "need_weights": False}

        def forward(inputs: dict[str, Tensor]) -> Tensor:
            weights = {n: x for n, x in inputs.items() if n in names}
            options = {**masks, "domain_weights": gates}
            return functional_call(module, weights, (inputs["hidden"],) * 3, options)[0][:, None]

        return forward

    def definition(self, rows: slice) -> Forward:
        chosen = self.chosen()[:, rows]
        if self.is_layer:
            return self._branch_by_branch(rows)

        def forward(inputs: dict[str, Tensor]) -> Tensor:
            # the definition scores all branches, so it is called for one branch at a time
            found = [
                branch_attention(
                    inputs["query"][:, :, :, rows],
                    inputs["key"][:, f : f + 1],
                    inputs["value"][:, f : f + 1],
                    inputs["gates"][:, rows],
                    torch.where(chosen == f, 0, -1),
                    query_offset=rows.start,
                    backend="reference",
                ).out
                for f in chosen.unique().tolist()
            ]
            return torch.stack(found).sum(0).flatten(1, 2)

        return forward

    def _branch_by_branch(self, rows: slice | None = None) -> Forward:
        """A layer as one call of PyTorch's attention per branch, also for unused branches."""
        gates, base = self.gates(), self.base(self.dtype)
        at = slice(0, self.T) if rows is None else rows
        # the timed peer uses is_causal; the definition (rows given) skips unused branches
        mask, branches = None, range(1 + self.F)
        if rows is not None:
            mask = torch.ones(at.stop, at.stop, dtype=torch.bool, device=self.device).tril()[at]
            branches = [0, *(1 + self.chosen()).unique().tolist()]

        def forward(inputs: dict[str, Tensor]) -> Tensor:
            hidden = inputs["hidden"]
            shares = gates.to(hidden)
            seen = hidden[:, : at.stop]
            heads = lambda x, w: F.linear(x, w).unflatten(-1, (self.H, -1)).transpose(1, 2)
            total = torch.zeros_like(hidden[:, at])
            for n in branches:
                name = f"specialists.specialist_{n - 1}."
                q, k, v, out = (
                    [*base.in_proj_weight.to(hidden).chunk(3), base.out_proj.weight.to(hidden)]
                    if n == 0
                    else [inputs[f"{name}{x}_weight"] for x in ("q", "k", "v", "out")]
                )
                attended = F.scaled_dot_product_attention(
                    *(heads(hidden[:, at], q), heads(seen, k), heads(seen, v)),
                    attn_mask=mask,
                    is_causal=mask is None,
                )
                part = F.linear(attended.transpose(1, 2).flatten(2), out)
                total = total + shares[:, at, n, None] * part
            return total[:, None]

        return forward

    def _call_per_branch(self) -> Forward:
        """All branches for all tokens, one call per branch."""
        if self.is_layer:
            return self._branch_by_branch()
        grouped = self.key_heads != self.H
        chosen = self.chosen().transpose(1, 2)[:, :, None, :, None]  # [B, K, 1, T, 1]

        def forward(inputs: dict[str, Tensor]) -> Tensor:
            query, key, value = (inputs[name] for name in ("query", "key", "value"))
            gates = inputs["gates"].transpose(1, 2)[:, :, None, :, None]
            total = torch.zeros_like(query)
            for f in range(self.F):
                own = chosen == f
                asked = torch.where(own, query, 0.0).sum(1)
                out = F.scaled_dot_product_attention(
                    *(asked, key[:, f], value[:, f]),
                    is_causal=True,
                    enable_gqa=grouped,
                )
                total = total + torch.where(own, gates * out[:, None], 0.0).to(total.dtype)
            return total.flatten(1, 2)

        return forward

    def _k_branches(self) -> Forward:
        """Only K branches; every token is in all of them."""
        if not self.is_layer:
            # its own keys and values, so that their gradients have this size
            few = [replace(self, F=self.K).inputs()[n].requires_grad_() for n in ("key", "value")]
            return lambda inputs: branch_attention(
                inputs["query"], *few, gates=inputs["gates"]
            ).out.flatten(1, 2)
        return self._layer(self.K, replace(self, F=self.K).gates(), "auto")

    def rows_are_independent(self) -> bool:
        """False: float64 gradients of all branches would take minutes for a long case."""
        return False

    def label(self, T: str | None = None) -> str:
        length = f"T={self.T}" if T is None else T
        return f"{self.kind} {length} F={self.F} K={self.K} D={self.D}{self.dtype_label}"

    def work(self) -> dict[str, Work]:
        slots = self.B * self.H * (self.K + self.is_layer)
        used = self.F if self.kind.endswith("token") else self.K
        keys = self.B * self.key_heads * (used + self.is_layer) * self.T
        pairs = slots * self.T * (self.T + 1) // 2
        work = self.softmax_work(pairs, keys, slots * self.T)
        if not self.is_layer:
            return work
        # projections: queries and outputs per slot, keys and values per branch
        tokens = self.B * self.T * (2 * (self.K + 1) + 2 * (used + 1))
        products = 2 * tokens * self.width**2
        size = self.dtype.itemsize * 4 * (1 + self.F) * self.width**2
        return {
            "forward": work["forward"] + Work(products, 0, size),
            "backward": work["backward"] + Work(2 * products, 0, 2 * size),
        }

    def peers(self) -> dict[str, Peer]:
        scores = self.score_bytes(self.T * self.K * self.F)
        return {
            CALL_PER_BRANCH: Peer(self._call_per_branch, slow=self.F > 8),
            K_BRANCHES: Peer(self._k_branches, yardstick=self.work()),
            "naive": Peer(partial(self.subject, "reference"), scores),
        }

    @classmethod
    def bars(cls, suite: str) -> Sequence[Bar]:
        return _cpu_bars() if suite == "cpu-bars" else _gpu_bars()


def _cpu_bars() -> list[Bar]:
    layer = BranchCase(kind="layer-sample", T=1024)
    token = replace(layer, kind="token")
    return [
        CostBar(case=layer, direction=TRAINING, target=1.3, against=K_BRANCHES),
        SpeedBar(case=layer, direction=TRAINING, target=8.0, against=(CALL_PER_BRANCH,)),
        CostBar(
            case=token,
            direction=TRAINING,
            target=2.0,
            against=K_BRANCHES,
            limited_by=FEW_ROWS_OF_A_BRANCH,
        ),
        PeakBar(case=layer, base=replace(layer, F=layer.K), direction=TRAINING, target=1.5),
        *bfloat16_bars(token),
        # few branches, so that none is unused: gradients of unused branches are zeros to write
        *bfloat16_bars(replace(token, kind="sample", F=8)),
    ]


def _gpu_bars() -> list[Bar]:
    case = BranchCase(kind="sample", T=2048, H=16, device="cuda", dtype=torch.bfloat16)
    token = replace(case, kind="token")
    return [
        SpeedBar(case=case, direction=TRAINING, target=8.0, against=(CALL_PER_BRANCH,)),
        CostBar(case=token, direction=TRAINING, target=2.0, against=K_BRANCHES),
    ]


CASE = BranchCase
