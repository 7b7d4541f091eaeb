"""Chapter memory: tokens attend to learned memory tokens, in chapters that a router selects."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from memattn.nn import (
    ChapterMemory,
    ChapterRouter,
    FactorizedMemoryBank,
    LowRankLinear,
    MemoryBank,
    MemoryBanks,
    MemoryCrossAttention,
    ProjectedChapters,
    QuantizedMemoryBank,
    ReducedDimMemoryBank,
    StandardMemoryBank,
    ZeroLinear,
    make_mlp,
    make_norm,
)
from memattn.parts.base import Cost, PartConfig, PartOutput, Role, Sizes, View, register_part
from memattn.parts.chapter_usage import MEASURES, draw_usage, measure_usage, measures
from memattn.parts.context import PartContext
from memattn.parts.memory_fields import LOSSES, VARIANTS, MemoryFields
from memattn.parts.memory_routing import RoutingRule, call_bounds, check_mode, route_tokens
from memattn.parts.routing_state import RoutingState


@register_part
@dataclass(frozen=True, kw_only=True)
class ChapterMemoryConfig(MemoryFields):
    __doc__ = MemoryFields.__doc__

    kind: ClassVar[str] = "chapter_memory"
    place: ClassVar[str] = "after_attention"
    reports: ClassVar[tuple[str, ...]] = (*LOSSES, *MEASURES)
    views: ClassVar[dict[str, View]] = {"chapters": View(measure_usage, draw_usage)}
    state_type: ClassVar[type[RoutingState]] = RoutingState

    @property
    def resolved_place(self) -> str:
        return VARIANTS[self.memory_block_variant]

    @property
    def keeps_state(self) -> bool:
        return self.use_chapters and self.routing_strategy_inference != "token"

    @property
    def reach(self) -> int:
        if not self.use_chapters or self.vanilla_mode:
            return 0
        strategies = {self.routing_strategy_train, self.routing_strategy_inference} - {"token"}
        window = self.routing_window_size if strategies & {"rolling", "hybrid"} else 0
        return max(self.routing_block_size, window) if strategies else 0

    @property
    def needs_state(self) -> bool:
        return self.use_chapters and self.routing_strategy_inference != "token"

    @property
    def losses(self) -> dict[str, float]:
        if not self.use_chapters or self.vanilla_mode or self.memory_layer_placement == "none":
            return {}
        trained = {
            name: getattr(self, coefficient)
            for name, (switch, coefficient) in LOSSES.items()
            if getattr(self, switch)
        }
        return trained | dict.fromkeys(MEASURES, 0.0)

    def in_layer(self, layer: int, sizes: Sizes) -> PartConfig | None:
        return self if layer in self.layers(sizes.num_layers) else None

    def build_shared(self, sizes: Sizes) -> nn.Module | None:
        n = sizes.num_layers
        numbers = {self.bank_of(layer, n) for layer in self.layers(n)}
        return MemoryBanks([self._build_bank(sizes) for _ in numbers]) if numbers else None

    def _build_bank(self, sizes: Sizes) -> MemoryBank:
        tokens, width = self.num_memory_tokens, self.width(sizes)
        chapters = self.num_chapters if self.use_chapters else 1
        std = self.memory_init_std
        if self.is_reduced:
            bank: MemoryBank = ReducedDimMemoryBank(tokens, width, chapters, std)
        elif self.use_low_rank_memory:
            bank = FactorizedMemoryBank(tokens, width, self.memory_rank, chapters, std)
        else:
            bank = StandardMemoryBank(tokens, width, chapters, std)
        if self.quantize_memory:
            trainable = self.memory_quant_training
            bank = QuantizedMemoryBank(bank, self.memory_quant_bits, trainable=trainable)
        return bank

    def build(self, sizes: Sizes, layer: int) -> ChapterMemory:
        heads, kv_heads, inner = self.heads(sizes)
        router = mlp_norm = mlp = None
        if self.use_chapters:
            router = ChapterRouter(
                sizes.hidden_size,
                self.num_chapters,
                self.top_k_chapters,
                num_shared=self.num_shared_chapters,
                temperature=self.router_temperature,
                routed_scale=self.routed_scaling_factor,
                normalisation=self.load_balance_normalisation,
                backend=self.backend,
            )
        attention = MemoryCrossAttention(
            sizes.hidden_size,
            self.width(sizes),
            heads,
            num_kv_heads=kv_heads,
            inner_size=inner,
            projection_rank=self.projection_rank if self.use_low_rank_projections else None,
            combine=self.combine,
            kv_bits=self.memory_quant_bits if self.quantize_memory else None,
            zero_output=self.wo_init_zero,
            backend=self.backend,
        )
        if self.memory_block_variant == "B":
            wide = sizes.intermediate_size or 4 * sizes.hidden_size
            mlp_norm = make_norm(sizes.norm, sizes.hidden_size, sizes.norm_eps)
            mlp = make_mlp(sizes.mlp, sizes.hidden_size, wide)
            if self.wo_init_zero:
                mlp.down_proj = ZeroLinear(wide, sizes.hidden_size)
        bank_index = self.bank_of(layer, sizes.num_layers)
        return ChapterMemory(router, attention, bank_index, mlp_norm, mlp)

    def run(self, module: nn.Module, hidden_states: Tensor, context: PartContext) -> PartOutput:
        assert isinstance(module, ChapterMemory) and isinstance(context.shared_module, MemoryBanks)
        bank = context.shared_module.banks[module.bank_index]
        assert isinstance(bank, MemoryBank)
        losses: dict[str, tuple[Tensor, Tensor]] = {}
        if module.router is None:
            indices = torch.zeros(hidden_states.shape[0], 1, dtype=torch.int32)
            indices, weights = indices.to(hidden_states.device), None
            options = context.once(("bounds",), lambda: call_bounds(context))
        else:
            rule = check_mode(self._rules, module.training, context)
            routed = route_tokens(rule, module.router, hidden_states, context)
            indices, weights, options = routed.indices, routed.weights, routed.options
            if context.measure_losses:
                measured, count = measures(routed.output), routed.output.count
                losses = {name: (measured[name] * count, count) for name in self.losses}
        projected, opened = None, {}
        state = context.state if isinstance(context.state, RoutingState) else None
        if state is not None and not torch.is_grad_enabled():
            # in generation the bank is projected once
            if state.projected is None:
                state.projected = module.attention.project(bank)
            projected = state.projected
        if state is not None and not context.chapters:
            state.open_chapters = None  # they were closed or deleted
        if context.chapters:
            opened = dict(
                open_chapters=_project_open(module.attention, context, state),
                open_bounds=context.once(("bounds",), lambda: call_bounds(context)),
            )
        out = module.attention(
            hidden_states, bank, indices, weights, projected=projected, **opened, **options
        )
        if module.mlp is not None and module.mlp_norm is not None:
            assert context.residual is not None
            out = out + module.mlp(module.mlp_norm(context.residual + out))
        return PartOutput(out, losses)

    @property
    def _rules(self) -> dict[bool, RoutingRule]:
        """The routing rules of training (key True) and evaluation."""
        return {
            training: RoutingRule(
                strategy=strategy, block=self.routing_block_size, window=self.routing_window_size
            )
            for training, strategy in (
                (True, self.routing_strategy_train),
                (False, self.routing_strategy_inference),
            )
        }

    def chapter_layout(self, sizes: Sizes) -> Mapping[str, int]:
        """Hidden states become memory tokens, so both must have the same width to take chapters."""
        return {"states": sizes.hidden_size} if self.width(sizes) == sizes.hidden_size else {}

    def chapter_tensors(self, hidden_states: Tensor) -> Mapping[str, Tensor]:
        return {"states": hidden_states}

    def new_state(self) -> RoutingState:
        if not self.keeps_state:
            return RoutingState(self.kind)
        return RoutingState.for_blocks(self.kind, self.routing_block_size, self.routing_window_size)

    @staticmethod
    def init_weights(module: nn.Module, std: float) -> None:
        if isinstance(module, MemoryBank):
            module.reset_parameters()
        if isinstance(module, ChapterRouter):
            module.reset_parameters(std)
        if isinstance(module, ZeroLinear):
            module.reset_parameters()

    def cost(self, sizes: Sizes, length: int, layer: int = 0) -> Cost:
        """Its cost for one sequence; selected chapters are projected once for all its tokens."""
        with torch.device("meta"):
            module = self.build(sizes, layer)
        attention, M = module.attention, self.num_memory_tokens

        def count(part: nn.Module) -> int:
            return sum(p.numel() for p in part.parameters())

        flops = 2 * length * (count(attention.q_proj) + count(attention.o_proj))
        tokens = seen = M  # memory tokens projected, and seen by a token
        if module.router is not None:
            rows = length
            if self.routing_strategy_train != "token":
                rows = -(-length // self.routing_block_size)
            selected = self.num_shared_chapters + self.top_k_chapters
            tokens = M // self.num_chapters * min(self.num_chapters, rows * selected)
            seen = M // self.num_chapters * selected
            flops += 2 * rows * module.router.weight.numel()
        flops += 2 * tokens * (count(attention.k_proj) + count(attention.v_proj))
        if self.use_low_rank_memory and not self.is_reduced:
            # the basis is multiplied into the first matrix of each projection, which gets fewer
            # columns
            outputs = [
                proj.down.out_features if isinstance(proj, LowRankLinear) else proj.out_features
                for proj in (attention.k_proj, attention.v_proj)
            ]
            width, rank = self.width(sizes), self.memory_rank
            flops += 2 * sum(outputs) * (tokens * (rank - width) + width * rank)
        flops += 4 * attention.num_heads * attention.head_dim * length * seen
        if module.mlp is not None:
            flops += 2 * length * count(module.mlp)
        return Cost(count(module), flops)

    def shared_cost(self, sizes: Sizes, length: int) -> Cost:
        """Parameters of the banks, whatever their storage format."""
        with torch.device("meta"):
            banks = self.build_shared(sizes)
        if not isinstance(banks, MemoryBanks):
            return Cost(0, 0)
        held = [bank for bank in banks.banks if isinstance(bank, MemoryBank)]
        rows = sum(bank.num_tokens * bank.num_features for bank in held)
        bases = sum(p.numel() for name, p in banks.named_parameters() if name.endswith("basis"))
        return Cost(rows + bases, 0)

    def role(self, name: str, parameter: Tensor) -> Role | None:
        return Role("memory") if name.startswith("banks.") else None


def _project_open(
    attention: MemoryCrossAttention, context: PartContext, state: RoutingState | None
) -> list[tuple[ProjectedChapters, float]]:
    """Keys, values and weights of the open chapters, projected once per generation."""
    if torch.is_grad_enabled():
        state = None
    if state is not None and state.open_chapters is not None:
        known, projected = state.open_chapters
        if known is context.chapters:
            return projected
    dtype = attention.dtype
    projected = [
        (attention.project_states(chapter.tensors["states"].to(dtype)), chapter.weight)
        for chapter in context.chapters
    ]
    if state is not None:
        state.open_chapters = context.chapters, projected
    return projected
