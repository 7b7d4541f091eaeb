"""Titans: a neural memory, alone or combined with local attention."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from memattn.checks import check_int, must
from memattn.nn import CausalConvolution, NeuralMemory, SegmentedAttention
from memattn.nn.neural_memory_parameters import MemoryRates, MemoryWeights
from memattn.ops._dispatch import BACKENDS
from memattn.ops._neural_memory_checks import DEEPEST
from memattn.parts.base import Exchange, PartOutput, Role, Sizes, View, register_part
from memattn.parts.context import PartContext
from memattn.parts.memory_measures import measure_memory
from memattn.parts.memory_picture import draw_memory_use
from memattn.parts.state import PartState
from memattn.parts.titans_context import ContextAttention, MemoryAsContext, MemoryInParallel
from memattn.parts.titans_layers import MemoryAsGate, MemoryAsLayer, MemoryLayer
from memattn.parts.titans_options import LongTermTokens, TitansOptions
from memattn.parts.titans_state import TitansState

VARIANTS = ("lmm", "mac", "mac_parallel", "mag", "mal")
CHUNK = 64  # default tokens of a chunk


@register_part
@dataclass(frozen=True, kw_only=True)
class TitansConfig(TitansOptions):
    """A memory that learns while it reads, alone or with attention in a window or segment.

    All variants are causal. Persistent tokens of the attention are learned keys and values; those
    of the memory are learned hidden states that it reads before every sequence.
    ``memattn.parts.titans_options.TitansOptions`` documents the other fields: sizes of the memory,
    residuals between layers, long-term memory tokens.

    Attributes:
        variant: ``"lmm"``: the memory alone. ``"mag"``: attention gated by the memory. ``"mal"``:
            attention over the memory's output. ``"mac"``: attention over a segment and the memory's
            output for it; the memory then learns attention's output. ``"mac_parallel"``: as MAC,
            but the memory learns from the layer's input, which is a different model.
        window_size: Keys in the window of the attention, the query's own included.
        segment_len: Tokens in a segment, for ``"mac"`` and ``"mac_parallel"``, which have no
            window.
        num_persistent_tokens: Number of persistent tokens of the memory and of persistent keys of
            the attention. The memory of ``"mac"`` has none, as it learns only attention's output.
        memory_depth: Layers of the memory's network, 1 to 4.
        memory_expansion: Width of its hidden layers, as a multiple of its head size.
        chunk_size: Tokens whose gradients are taken at the same weights. None means 64. In
            ``"mac"`` it must divide ``segment_len``; None then means ``segment_len`` if 64 does not
            divide it.
        conv_size: Tokens that the memory's convolutions see; 1 means no convolution.
        lr: Initial learning rate of the memory; a learned gate then sets it for each token.
        momentum: Initial momentum; None means no momentum.
        decay: Initial decay; None means no decay.
        max_norm: Largest norm of a token's gradient. None means no limit; a chunk of similar keys
            may then overflow the memory in training.
        backend: Backend of the operators, ``"auto"``, ``"triton"``, ``"cpp"`` or ``"reference"``;
            or ``"flex"`` for the attention and ``"auto"`` for the memory.
    """

    kind: ClassVar[str] = "titans"
    backends: ClassVar[tuple[str, ...]] = (*BACKENDS, "flex")
    state_type: ClassVar[type[PartState]] = TitansState
    views: ClassVar[Mapping[str, View]] = {"memory": View(measure_memory, draw_memory_use)}

    window_size: int = 128
    segment_len: int = 128
    num_persistent_tokens: int = 4
    memory_depth: int = 2
    memory_expansion: int = 4
    chunk_size: int | None = None
    conv_size: int = 4
    lr: float = 0.01
    momentum: float | None = 0.5
    decay: float | None = 0.001
    max_norm: float | None = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            must("attention.variant", f"be one of {', '.join(VARIANTS)}", repr(self.variant))
        for name in ("window_size", "segment_len", "memory_expansion", "conv_size"):
            check_int(f"attention.{name}", getattr(self, name), 1)
        if self.chunk_size is None:
            fits = self.variant != "mac" or self.segment_len % CHUNK == 0
            # the dataclass is frozen; readers of the field get the number
            object.__setattr__(self, "chunk_size", CHUNK if fits else self.segment_len)
        check_int("attention.chunk_size", self.chunk_size, 1)
        if self.variant == "mac" and self.segment_len % self._chunk:
            must("attention.chunk_size", f"divide segment_len={self.segment_len}", self._chunk)
        check_int("attention.num_persistent_tokens", self.num_persistent_tokens, 0)
        check_int("attention.memory_depth", self.memory_depth, 1)
        if self.memory_depth > DEEPEST:
            must("attention.memory_depth", f"be at most {DEEPEST}", self.memory_depth)
        for name in ("lr", "momentum", "decay"):
            rate = getattr(self, name)
            if rate is not None and not 0.0 < rate < 1.0:
                must(f"attention.{name}", "be between 0 and 1", rate)
        if self.max_norm is not None and not self.max_norm > 0.0:
            must("attention.max_norm", "be positive", self.max_norm)

    @property
    def _chunk(self) -> int:
        assert self.chunk_size is not None
        return self.chunk_size

    @property
    def attends(self) -> bool:
        """Whether the variant has attention."""
        return self.variant != "lmm"

    @property
    def segments(self) -> bool:
        """Whether attention is within segments and also sees the memory's output."""
        return self.variant in ("mac", "mac_parallel")

    @property
    def reach(self) -> int:
        attended = self.segment_len if self.segments else self.window_size
        return max(self._chunk, attended if self.attends else 0)

    def build(self, sizes: Sizes, layer: int) -> nn.Module:
        return self.add_options(self._build(sizes), sizes, layer)

    def _build(self, sizes: Sizes) -> MemoryLayer:
        """A layer without the fields of ``TitansOptions``."""
        heads, head_dim = self.memory_sizes(sizes)
        memory = NeuralMemory(
            sizes.hidden_size,
            heads,
            head_dim=head_dim,
            depth=self.memory_depth,
            expansion=self.memory_expansion,
            chunk_size=self._chunk,
            conv_size=self.conv_size,
            num_persistent_tokens=0 if self.variant == "mac" else self.num_persistent_tokens,
            lr=self.lr,
            momentum=self.momentum,
            decay=self.decay,
            norm_eps=sizes.norm_eps,
            options={} if self.max_norm is None else dict(max_norm=self.max_norm),
            backend="auto" if self.backend == "flex" else self.backend,
        )
        if not self.attends:
            return MemoryLayer(memory)
        if self.segments:
            over = ContextAttention(
                **self.heads(sizes),
                segment_len=self.segment_len,
                num_persistent_tokens=self.num_persistent_tokens,
                num_longterm_tokens=self.num_longterm_mem_tokens,
            )
            joined = MemoryAsContext if self.variant == "mac" else MemoryInParallel
            return joined(memory, over, sizes.hidden_size, sizes.norm_eps)
        attention = SegmentedAttention(
            **self.heads(sizes),
            window_size=self.window_size,
            num_persistent_tokens=self.num_persistent_tokens,
        )
        if self.variant == "mal":
            return MemoryAsLayer(memory, attention)
        return MemoryAsGate(memory, attention, sizes.hidden_size, sizes.norm_eps)

    def run(self, module: nn.Module, hidden_states: Tensor, context: PartContext) -> PartOutput:
        out = module(hidden_states, context)
        return PartOutput(out, carry=context.handed)

    def new_state(self) -> PartState:
        segment = self.segment_len if self.segments else None
        window = self.window_size if self.attends and not self.segments else None
        return TitansState(self.kind, segment, window, self.variant, self.extras)

    @staticmethod
    def init_weights(module: nn.Module, std: float) -> None:
        if isinstance(module, CausalConvolution | MemoryWeights | NeuralMemory):
            module.reset_parameters()
        if isinstance(module, LongTermTokens):
            nn.init.normal_(module.tokens, std=std)
        if isinstance(module, MemoryRates):
            nn.init.zeros_(module.weight)
            # torch.nn.init has no function that sets several values, so a loaded bias is checked
            # here
            if not getattr(module.bias, "_is_hf_initialized", False):
                module.reset_parameters()
        # persistent keys of attention are initialised by the attention layer's own part

    def role(self, name: str, parameter: Tensor) -> Role | None:
        learned = ("memory.memory_weights", "memory.persistent_", "attention.persistent_")
        return Role("memory") if name.startswith((*learned, "longterm.")) else None

    def visible(self, position: int, sizes: Sizes) -> int:
        if not self.attends:
            return 0
        if self.segments:  # tokens and memory outputs
            own = position % self.segment_len + 1 + self.num_longterm_mem_tokens
            return 2 * own + self.num_persistent_tokens
        return min(position + 1, self.window_size) + self.num_persistent_tokens

    def _widths(self, head_dim: int) -> list[int]:
        """Widths of the memory's layers, from its input to its output."""
        return [head_dim, *[self.memory_expansion * head_dim] * (self.memory_depth - 1), head_dim]

    def exchange(self, sizes: Sizes) -> Exchange:
        heads, D = self.memory_sizes(sizes)
        widths = self._widths(D)
        weights = sum(a * b for a, b in zip(widths, widths[1:], strict=False))
        state = heads * weights * (1 if self.momentum is None else 2)
        if not self.attends:
            return Exchange(state=state)
        spans = (self.segment_len, None) if self.segments else (None, self.window_size)
        return super().exchange(sizes)._replace(spans=spans, state=state)

    def operator_flops(self, sizes: Sizes, length: int) -> int:
        heads, D = self.memory_sizes(sizes)
        widths = self._widths(D)
        pairs = list(zip(widths, widths[1:], strict=False))
        W, both = sum(a * b for a, b in pairs), sum(a + b for a, b in pairs)
        kept = 1 if self.momentum is None else 2  # sums over the chunk: for weights and momentum
        # keys forward, backward, sums of updates, and the read at the chunk's start and within it
        token = 2 * W + 2 * (W - widths[0] * widths[1]) + kept * 4 * W
        token += (min(self._chunk, length) + 1) * both
        again = 0  # products with matrices that are used twice
        longterm = 0  # for the long-term memory tokens of all segments
        keys = 2 * sizes.hidden_size * sizes.num_kv_heads * sizes.head_dim  # and values
        if self.segments:  # keys of the memory's outputs
            again = keys
        if self.variant == "mac":  # the read at the segment's start: query, gate, output
            token += 2 * W
            convolution = self.conv_size if self.conv_size > 1 else 0
            again += (3 * sizes.hidden_size + convolution) * heads * D
            tokens = -(-length // self.segment_len) * self.num_longterm_mem_tokens
            longterm = tokens * (heads * 2 * W + 2 * (again + keys))
        once = super().operator_flops(sizes, length) + longterm
        return once + length * (heads * token + 2 * again)
