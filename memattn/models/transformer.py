"""``TitansTransformer`` and its state: Titans with the names of its first implementation."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from memattn.checks import check_bool, check_int, must
from memattn.models.cache import MemAttnCache
from memattn.models.config import MemAttnConfig
from memattn.models.decoder import MemAttnForCausalLM
from memattn.models.outputs import MemAttnCausalLMOutput
from memattn.models.signatures import add_arguments
from memattn.nn import NeuralMemory
from memattn.ops import NeuralMemoryState
from memattn.parts.memory_measures import update_magnitude, utilisation
from memattn.parts.titans_layers import MemoryLayer
from memattn.parts.titans_options import TitansOptions
from memattn.parts.titans_state import TitansState
from memattn.reference.neural_memory import unpack

Pair = tuple[Tensor, Tensor]


@dataclass(eq=False)
class TransformerState:
    """State of a batch of sequences between calls, layer by layer: a view of a cache.

    It has ``memory_states``, ``kv_caches``, ``value_residuals`` and ``metrics``. A call extends the
    cache in place, which the view then shows. Tensors and states that it returned earlier do not
    change.

    Attributes:
        cache: The cache; pass it to ``generate`` as ``past_key_values``.

    Example:
        >>> model = TitansTransformer(num_tokens=100, dim=32, depth=2, heads=2, dim_head=16).eval()
        >>> state = model(torch.randint(100, (2, 30))).state
        >>> logits = model(torch.randint(100, (2, 5)), state=state).logits
        >>> state.kv_caches[0][0].shape[0], state.memory_states[1]
        (2, NeuralMemoryState(R=2, H=2, sizes=(16, 64, 16), chunk_size=64, momentum=True))
    """

    cache: MemAttnCache

    @property
    def memory_states(self) -> list[NeuralMemoryState | None]:
        """The neural memory of each layer; None before the first call, or without a memory."""
        return [state and state.memory for state in self._parts()]

    @property
    def kv_caches(self) -> list[Pair | None]:
        """Keys and values ``[B, Hkv, S, D]`` that later tokens of each layer see, or None."""
        found: list[Pair | None] = []
        for layer in self.cache.layers:
            tokens = layer.parts["attention"].tokens
            found.append((tokens["key"], tokens["value"]) if "key" in tokens else None)
        return found

    @property
    def value_residuals(self) -> list[Tensor | None]:
        """First-layer values ``[B, Hkv, S, D]`` that are mixed into those of each layer.

        None for the first layer, and if ``value_residual`` is off.
        """
        part = None if self.cache.config is None else self.cache.config.attention
        is_on = isinstance(part, TitansOptions) and part.value_residual
        pairs = self.kv_caches
        first = pairs[0][1] if is_on and pairs[0] is not None else None
        return [first if i else None for i in range(len(pairs))]

    @property
    def metrics(self) -> dict[str, list[Tensor | None]]:
        """Metrics of the memory of each layer, float64 ``[B, H]`` each.

        ``update_magnitude`` is the norm of the sequence's weight change, relative to the norm of
        the initial weights. ``utilisation`` is the effective rank of the change (exponential of the
        entropy of its squared singular values), relative to the full rank, averaged over the
        memory's layers. Surprise and relevance belong to tokens while they are read, so a state
        does not have them: ``memattn.parts.memory_measures.measure_memory`` measures them, and
        ``KeptMemory.read`` stores them.
        """
        names = ("update_magnitude", "utilisation")
        found = [{} if state is None else _measure(state) for state in self.memory_states]
        return {name: [layer.get(name) for layer in found] for name in names}

    def detach(self) -> "TransformerState":
        """The state detached from the autograd graph."""
        return TransformerState(self.cache.detach())

    def reset(self, mask: Tensor | None = None) -> None:
        """Restart the rows in ``mask`` (bool ``[B]``) with the next call; None: empty the state."""
        self.cache.reset(mask)

    def reorder(self, beam_idx: Tensor) -> None:
        """Replace the rows by rows ``beam_idx`` (int64 ``[B]``), in place."""
        self.cache.reorder_cache(beam_idx)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to one safetensors file, atomically.

        Raises:
            ValueError: If it is empty.
        """
        self.cache.save(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: MemAttnForCausalLM) -> "TransformerState":
        """Read what ``save`` wrote.

        Args:
            path: The file.
            model: The model that will continue with it.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, or belongs to a model with other layers.
        """
        cache = MemAttnCache.load(path, next(model.parameters()).device)
        with _naming("state"):
            cache.check_fits(model.config)
        state = cls(cache)
        layers = [block.attention for block in model.model.layers]
        for part, layer in zip(state._parts(), layers, strict=True):
            if part is not None and isinstance(layer, MemoryLayer):
                assert isinstance(layer.memory, NeuralMemory)
                part.recall(layer.memory)
        return state

    def _parts(self) -> list[TitansState | None]:
        """The state of each layer's memory."""
        found = [layer.parts["attention"] for layer in self.cache.layers]
        return [part if isinstance(part, TitansState) else None for part in found]


@dataclass
class TitansOutput(MemAttnCausalLMOutput):
    """Output of ``TitansTransformer``."""

    @property
    def state(self) -> TransformerState | None:
        """The state after the last token; None without a cache."""
        cache = self.past_key_values
        return TransformerState(cache) if isinstance(cache, MemAttnCache) else None


class TitansTransformer(MemAttnForCausalLM):
    """A language model with a neural memory, with the options of common Titans implementations.

    It is a ``MemAttnForCausalLM`` whose calls also take and return a ``TransformerState``. A call
    without a state starts sequences; with a state it continues them and extends the state.

    Args:
        config: A complete configuration, instead of the options.
        num_tokens: Tokens of the vocabulary.
        dim: Model dimension.
        depth: Layers.
        heads: Attention heads.
        dim_head: Features of a head; ``heads * dim_head`` need not be ``dim``.
        segment_len: Tokens in a segment, or keys in the window, depending on the variant.
        ff_mult: Width of the MLP, as a multiple of ``dim``.
        memory_dim: Features of all heads of the memory; None means ``dim``.
        use_memory: Whether there is a memory; otherwise only attention within segments.
        use_flex_attn: Whether attention uses PyTorch's FlexAttention (backend ``"flex"``).
        num_persist_mem_tokens: Persistent tokens.
        position_embedding: As in ``MemAttnConfig``.
        options: More fields of ``MemAttnConfig.titans``, such as ``variant``,
            ``num_longterm_mem_tokens``, ``value_residual`` and ``neural_mem_weight_residual``.

    Raises:
        ValueError: If an option is outside its range, or does not fit the others.
        TypeError: If there is no such option.

    Example:
        >>> model = TitansTransformer(num_tokens=100, dim=128, depth=2, heads=3, segment_len=16)
        >>> first, second = torch.randint(100, (2, 40)).split(20, dim=1)
        >>> state = model.eval()(first).state
        >>> model(second, state=state).logits.shape
        torch.Size([2, 20, 100])
    """

    def __init__(self, config: MemAttnConfig | None = None, **options: Any) -> None:
        if config is None:
            config = titans_config(**options)
        elif options:
            must("config", f"be None with {', '.join(options)}", "a configuration", TypeError)
        super().__init__(config)

    def new_state(self) -> TransformerState:
        """An empty state, to start sequences."""
        return TransformerState(MemAttnCache(self.config))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *args: Any, state: TransformerState | None = None, **kwargs: Any
    ) -> TitansOutput | tuple:
        """As ``MemAttnForCausalLM.forward``, with a state.

        Args:
            args: As there, ``input_ids`` first.
            state: The state of earlier calls, used and extended instead of ``past_key_values``.
            kwargs: As there.

        Returns:
            The model's output with ``state``: the given one, or a new one with ``use_cache`` (the
            default outside training).

        Raises:
            TypeError: If ``state`` is not a ``TransformerState``.
            ValueError: If it belongs to a model with other layers or to another batch size.
        """
        if state is None:
            outputs = super().forward(*args, **kwargs)
        else:
            if not isinstance(state, TransformerState):
                must("state", "be a TransformerState", type(state).__name__, TypeError)
            if kwargs.get("past_key_values") is not None:
                must("past_key_values", "be None with state", "a cache")
            with _naming("state"):
                outputs = super().forward(*args, **{**kwargs, "past_key_values": state.cache})
        if not isinstance(outputs, MemAttnCausalLMOutput):
            return outputs
        named = {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
        return TitansOutput(**named)

    add_arguments(forward, MemAttnForCausalLM.forward, "state")


def titans_config(
    *,
    num_tokens: int = 50257,
    dim: int = 512,
    depth: int = 6,
    heads: int = 8,
    dim_head: int = 64,
    segment_len: int = 512,
    ff_mult: int = 4,
    memory_dim: int | None = None,
    use_memory: bool = True,
    use_flex_attn: bool = False,
    num_persist_mem_tokens: int = 4,
    position_embedding: str = "continuous_axial",
    **options: Any,
) -> MemAttnConfig:
    """The configuration for the options of ``TitansTransformer``."""
    for name, value in (("dim", dim), ("ff_mult", ff_mult)):
        check_int(name, value, 1)
    for name, value in (("use_memory", use_memory), ("use_flex_attn", use_flex_attn)):
        check_bool(name, value)
    sizes: dict[str, Any] = dict(
        vocab_size=num_tokens,
        hidden_size=dim,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        head_dim=dim_head,
        intermediate_size=ff_mult * dim,
        mlp="gelu",
        position_embedding=position_embedding,
        segment_len=segment_len,
        num_persistent_tokens=num_persist_mem_tokens,
    )
    if use_flex_attn:
        sizes["backend"] = "flex"
    if not use_memory:
        if memory_dim is not None:
            must("memory_dim", "be None without use_memory", memory_dim)
        return MemAttnConfig.segmented(**{"window_size": None, **sizes, **options})
    sizes |= dict(window_size=segment_len, memory_dim=memory_dim)
    return MemAttnConfig.titans(**{**sizes, **options})


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Context in which errors about a cache use this argument name."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if "past_key_values" not in str(error):
            raise
        raise type(error)(str(error).replace("past_key_values", name)) from error


def _measure(state: NeuralMemoryState) -> dict[str, Tensor]:
    """The metrics of one memory."""
    before, after = (
        [x.detach().double() for x in layers]
        for layers in (unpack(state.initial, state.sizes), state.current()[0])
    )
    return {
        "update_magnitude": update_magnitude(before, after),
        "utilisation": utilisation(before, after).mean(-1),
    }
