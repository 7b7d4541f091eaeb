"""Rotary positions with scaled frequencies, computed by transformers' functions."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from memattn.checks import check_bool, must, plain_values
from memattn.nn.rotary import RotaryEmbedding

# required and optional parameters of each type, besides rope_type and rope_theta
KINDS: dict[str, tuple[set[str], set[str]]] = {
    # these two do not use the original length, but configurations contain it
    "default": (set(), {"original_max_position_embeddings"}),
    "linear": ({"factor"}, {"original_max_position_embeddings"}),
    "yarn": (
        {"factor"},
        {
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        },
    ),
    "llama3": (
        {"factor", "low_freq_factor", "high_freq_factor"},
        {"original_max_position_embeddings"},
    ),
    "proportional": ({"partial_rotary_factor"}, set()),
}
BY_LENGTH = ("dynamic", "longrope")
NAME = "rope_parameters"


def check_rope(rope: Mapping[str, Any], name: str = NAME) -> None:
    """Raise ValueError for parameters that ``make_rotary`` does not support.

    Args:
        rope: The parameters, with transformers' names.
        name: Their name in error messages.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in BY_LENGTH:
        why = "whose frequencies do not change with the length, else decoding differs from prefill"
        must(name, f"have a rope_type {why}", repr(kind))
    if kind not in KINDS:
        must(name, f"have a rope_type among {', '.join(KINDS)}", repr(kind))
    needed, optional = KINDS[kind]
    if missing := sorted(needed - rope.keys()):
        must(name, f"have {', '.join(sorted(needed))} for {kind!r}", f"no {', '.join(missing)}")
    if unknown := sorted(rope.keys() - needed - optional - {"rope_type", "rope_theta", "type"}):
        known = ", ".join(["rope_type", "rope_theta", *sorted(needed | optional)])
        must(name, f"have only {known} for {kind!r}", ", ".join(unknown))
    for field, value in rope.items():
        where = field if field == "rope_theta" else f"{name}[{field!r}]"
        if field in ("rope_type", "type") or (value is None and field in optional):
            continue
        if field == "truncate":
            check_bool(where, value)
        elif isinstance(value, bool) or not isinstance(value, int | float):
            must(where, "be a number", type(value).__name__, TypeError)
        elif not 0 < value < float("inf"):
            must(where, "be positive", value)
    _check_order(kind, rope, name)


def _check_order(kind: str, rope: Mapping[str, Any], name: str) -> None:
    """Raise ValueError for values that contradict each other."""
    if not rope.get("factor", 1) >= 1:
        must(f"{name}['factor']", "be at least 1", rope["factor"])
    if kind == "proportional" and rope["partial_rotary_factor"] > 1:
        must(f"{name}['partial_rotary_factor']", "be at most 1", rope["partial_rotary_factor"])
    if kind == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        above = f"be above low_freq_factor={rope['low_freq_factor']}"
        must(f"{name}['high_freq_factor']", above, rope["high_freq_factor"])
    fast, slow = (rope.get(key) or usual for key, usual in (("beta_fast", 32), ("beta_slow", 1)))
    if kind == "yarn" and not fast > slow:
        must(f"{name}['beta_fast']", f"be above beta_slow={slow}", fast)


def make_rotary(head_dim: int, rope: Mapping[str, Any], max_positions: int) -> RotaryEmbedding:
    """A ``RotaryEmbedding`` for parameters in the form of transformers' configurations.

    Args:
        head_dim: Features of a head, ``D``; even.
        rope: ``rope_type``, which is ``"default"``, ``"linear"``, ``"yarn"``, ``"llama3"`` or
            ``"proportional"``, ``rope_theta``, and what the type needs.
        max_positions: ``original_max_position_embeddings`` where the parameters have none.

    Raises:
        ValueError: If the parameters are not of such a type, or ``head_dim`` is odd.
        ImportError: If they are not the default ones and transformers is not installed.
    """
    check_rope(rope)
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", 10000.0)
    if kind == "default":
        return RotaryEmbedding(head_dim, theta)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given: dict[str, Any] = {"original_max_position_embeddings": max_positions, **rope}
    given |= dict(rope_type=kind, rope_theta=theta)
    config: Any = SimpleNamespace(
        rope_parameters=given,
        head_dim=head_dim,
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=max_positions,
        standardize_rope_params=lambda: None,
    )
    with torch.device("cpu"):  # models are loaded on the meta device, which has no values
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return RotaryEmbedding(head_dim, theta, frequencies=plain_values(frequencies), scale=scale)
