"""What operators return, as trees of tensors that ``torch.export.save`` has names for."""

import json
from collections.abc import Iterable
from typing import Any

from torch.utils import _pytree

from memattn.ops.chapter_router import RouterOutput
from memattn.ops.future_attention import FutureAttentionLossOutput, FutureAttentionOutput
from memattn.ops.neural_memory import NeuralMemoryOutput
from memattn.ops.neural_memory_state import TENSORS, NeuralMemoryState
from memattn.ops.segmented_attention import AttentionOutput

FIELDS = (*TENSORS, "past")


def _flatten(state: NeuralMemoryState) -> tuple[list[Any], str]:
    return [getattr(state, name) for name in FIELDS], json.dumps([state.sizes, state.records])


def _unflatten(values: Iterable[Any], facts: str) -> NeuralMemoryState:
    sizes, records = json.loads(facts)
    named: dict[str, Any] = dict(zip(FIELDS, values, strict=True))
    return NeuralMemoryState(**named, sizes=tuple(sizes), records=records)


def _flatten_with_keys(state: NeuralMemoryState) -> tuple[list[tuple[Any, Any]], str]:
    values, facts = _flatten(state)
    keys = map(_pytree.GetAttrKey, FIELDS)
    return list(zip(keys, values, strict=True)), facts


def register_trees() -> None:
    """Make them known to torch, once."""
    for kind in (
        AttentionOutput,
        FutureAttentionLossOutput,
        FutureAttentionOutput,
        NeuralMemoryOutput,
        RouterOutput,
    ):
        # torch's own errors name this function
        _pytree._register_namedtuple(  # pyright: ignore[reportPrivateUsage]
            kind, serialized_type_name=f"memattn.{kind.__name__}"
        )
    _pytree.register_pytree_node(
        NeuralMemoryState,
        _flatten,
        _unflatten,
        serialized_type_name="memattn.NeuralMemoryState",
        flatten_with_keys_fn=_flatten_with_keys,
    )
