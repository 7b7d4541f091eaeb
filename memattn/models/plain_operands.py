"""The tensors that one call of all layers reads, collected once for a cache.

``memattn.models.plain_step`` says which tensors of a layer may be read. The facts that this depends
on (weights, hooks, settings) are kept too. They are compared at every token, which takes a tenth of
the time of collecting; after a change the tensors are collected again.
"""

from dataclasses import dataclass
from operator import is_
from typing import Any

from torch import Tensor, nn

from memattn.models.block import MemAttnBlock
from memattn.models.plain_step import attention_operands, mlp_operands
from memattn.parts import PartContext
from memattn.parts.base import HOOKS, is_bare


@dataclass(eq=False)
class DecoderOperands:
    """The tensors of all layers in the order of ``decoder_step``, and what they depend on."""

    layers: nn.ModuleList
    weights: list[Tensor]
    given: list[Tensor | None]  # persistent keys and values, and those of a table, of each layer
    spans: list[int]  # segment, window and rows ahead, -1 for none
    eps: list[float]
    heads: tuple[int, int]  # number of key heads and their size
    # dictionary of a module, key and value; None where the key is missing
    entries: tuple[tuple[dict, ...], tuple[str, ...], tuple[Any, ...]]
    modules: list[nn.Module]
    kinds: list[type]
    hooks: tuple[Any, ...]
    places: list[int]

    @property
    def ahead(self) -> int:
        """Rows of a table that a token sees, at most."""
        return max(self.spans[2::3])

    def hold(self, layers: nn.ModuleList) -> bool:
        """Whether the modules are still as they were."""
        dictionaries, keys, values = self.entries
        return (
            layers is self.layers
            and len(layers) == len(self.eps) // 2
            and not any(self.hooks)
            and list(map(type, self.modules)) == self.kinds
            and all(map(is_, map(dict.get, dictionaries, keys), values))
            # another dtype or device changes a parameter in place
            and _places(self.weights, self.given) == self.places
        )

    def __reduce__(self) -> tuple:
        """Copies and files of a cache have no operands, since these belong to the model."""
        return type(None), ()


def collect_operands(layers: nn.ModuleList, context: PartContext) -> DecoderOperands | None:
    """The operands of layers that are plain and have heads of one size, or None."""
    weights: list[Tensor] = []
    given: list[Tensor | None] = []
    spans: list[int] = []
    eps: list[float] = []
    heads: tuple[int, int] | None = None
    watched: list[nn.Module] = [layers]
    blocks: Any = layers._modules.values()
    for block in blocks:
        if not is_plain_block(block):
            return None
        own: Any = block._modules
        attention, part = own["attention"], block.part_configs["attention"]
        found = attention_operands(own["attention_norm"], attention, part, context)
        mlp = None if found is None else mlp_operands(own["mlp_norm"], own["mlp"])
        if found is None or mlp is None:
            return None
        size = (attention.num_kv_heads, attention.head_dim)
        if heads is not None and size != heads:
            return None
        heads = size
        tensors, sources, more = found
        weights += (*tensors, *mlp)
        given += more
        for span in (sources.segment_len, sources.window_size, sources.future_dim):
            spans.append(-1 if span is None else span)
        eps += (own["attention_norm"].eps, own["mlp_norm"].eps)
        watched += block.modules()
    if heads is None:
        return None
    places = _places(weights, given)
    hooks = tuple(module.__dict__[name] for module in watched[1:] for name in HOOKS)
    entries: Any = tuple(zip(*(e for module in watched for e in _entries(module)), strict=True))
    kinds = list(map(type, watched))
    watching = entries, watched, kinds, hooks, places
    return DecoderOperands(layers, weights, given, spans, eps, heads, *watching)


def is_plain_block(block: Any) -> bool:
    """Whether a block has attention and an MLP only, and no hooks."""
    return type(block) is MemAttnBlock and is_bare(block) and len(block.part_configs) == 1


def _places(weights: list[Tensor], given: list[Tensor | None]) -> list[int]:
    """Where the tensors lie in memory."""
    return [t.data_ptr() for tensors in (weights, given) for t in tensors if t is not None]


def _entries(module: nn.Module) -> list[tuple[dict, str, Any]]:
    """Submodules, parameters and settings of a module, and that its ``forward`` is its class's."""
    own: Any = module.__dict__
    settings = ((own, name, value) for name, value in own.items() if name[0] != "_")
    names = ("_modules", "_parameters")
    inside = ((own[name], key, value) for name in names for key, value in own[name].items())
    return [*settings, *inside, (own, "forward", None)]
