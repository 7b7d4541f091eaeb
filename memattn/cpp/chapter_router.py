"""The router of chapters of the C++ extension."""

import torch
from torch import Tensor

from memattn.cpp._register import register_cpp
from memattn_kernels.signatures import ChapterRouterArgs


def _empty_results(args: ChapterRouterArgs) -> tuple[Tensor, ...]:
    """Besides the results: ``lse`` as two floats and the mean probability of each chapter."""
    B, N, _ = args.hidden.shape
    n_routed, K = args.weight.shape[0], args.num_shared + args.top_k
    empty = lambda *shape: args.hidden.new_empty(shape, dtype=torch.float32)
    indices = empty(B, N, K).int()
    losses = (empty(), empty(), empty())
    return (
        *(empty(B, N, K), indices, *losses),
        *(empty(), empty(n_routed), empty(), empty(2, B, N), empty(n_routed)),
    )


_operator = register_cpp(
    "chapter_router",
    ChapterRouterArgs,
    results="weights indices load_balance_loss auxiliary_loss z_loss count load entropy "
    "lse importance",
    cotangents="weights? load_balance_loss? auxiliary_loss? z_loss?",
    saved="indices count load importance lse",
    gradients="hidden weight bias",
    empty_results=_empty_results,
)


def chapter_router(args: ChapterRouterArgs) -> tuple[Tensor, ...]:
    """Return indices, weights, the three losses, count, load and entropy."""
    weights, indices, balance, auxiliary, z, *reported, _, _ = _operator(*args)
    count, load, entropy = (t.detach() for t in reported)
    return indices, weights, balance, auxiliary, z, count, load, entropy
