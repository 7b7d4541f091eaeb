"""The options of a DTG-MA model."""

from numbers import Real
from typing import Any

from memattn.checks import check_bool, check_int, must
from memattn.dtgma.layers import DTGMALayers
from memattn.nn.task_tokens import TokenProjection

SHARED = ("frozen", "first_task")
INFERENCE = ("prototype", "entropy")


def check_sizes(
    hidden_dim: int, num_classes: int, n_layers: int, n_heads: int, n_nodes: int
) -> None:
    """Raise unless a model can have these sizes."""
    check_int("hidden_dim", hidden_dim, 1)
    check_int("n_layers", n_layers, 1)
    check_int("n_heads", n_heads, 1)
    if hidden_dim % n_heads:
        must("hidden_dim", f"be divisible by n_heads={n_heads}", hidden_dim)
    check_int("n_nodes", n_nodes, 0)
    check_int("num_classes", num_classes, 1)


def check_choices(positions: bool, dropout: float, shared: str, inference: str | None) -> None:
    """Raise unless these options have values that a model knows."""
    check_bool("positions", positions)
    if isinstance(dropout, bool) or not isinstance(dropout, Real):
        must("dropout", "be a number", type(dropout).__name__, TypeError)
    if not 0.0 <= dropout < 1.0:
        must("dropout", "be at least 0 and below 1", dropout)
    if shared not in SHARED:
        must("shared", f"be one of {', '.join(SHARED)}", repr(shared))
    if inference is not None and inference not in INFERENCE:
        must("inference", f"be None or one of {', '.join(INFERENCE)}", repr(inference))


def exchanged_options(tokens: TokenProjection, layers: DTGMALayers, n_nodes: int) -> dict[str, Any]:
    """Options that two models must share to exchange tasks."""
    attention = layers.layer(0).attention
    return dict(
        input_dim=tokens.input_dim if tokens.image is None else list(tokens.image),
        hidden_dim=tokens.projection.out_features,
        n_layers=len(layers),
        n_heads=attention.num_heads,
        n_tokens=tokens.n_tokens,
        patch_size=tokens.patch_size,
        n_nodes=n_nodes,
        positions=tokens.positions,
        rank=attention.q_proj.rank,
    )
