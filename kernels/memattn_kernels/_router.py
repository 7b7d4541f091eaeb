"""Registration of the chapter router, the same for Triton and C++; needs torch only."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memattn_kernels.signatures import ChapterRouterArgs


def empty_results(args: ChapterRouterArgs) -> tuple[Tensor, ...]:
    """Besides the results: ``lse`` as the sum of two floats, and mean probabilities."""
    B, N, _ = args.hidden.shape
    n_routed, K = args.weight.shape[0], args.num_shared + args.top_k
    weights = args.hidden.new_empty(B, N, K, dtype=torch.float32)
    indices = weights.new_empty(B, N, K, dtype=torch.int32)
    shapes = ((), (), (), (), (n_routed,), (), (2, B, N), (n_routed,))
    return weights, indices, *(weights.new_empty(shape) for shape in shapes)


def without_saved(results: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Indices, weights, the three losses, and without gradients count, load and entropy."""
    weights, indices, balance, auxiliary, z, *reported, _, _ = results
    count, load, entropy = (t.detach() for t in reported)
    return indices, weights, balance, auxiliary, z, count, load, entropy


REGISTRATION: dict[str, Any] = dict(
    # weights come first: torch's checks of operators add up all results in the dtype of the first
    results="weights indices load_balance_loss auxiliary_loss z_loss count load entropy lse "
    "importance",
    cotangents="weights? load_balance_loss? auxiliary_loss? z_loss?",
    saved="indices count load importance lse",
    empty_results=empty_results,
)
