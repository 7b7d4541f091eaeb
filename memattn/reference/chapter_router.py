"""Definition of the router of chapters: a softmax, its largest entries, and three losses."""

import torch
from torch import Tensor

from memattn_kernels.signatures import ChapterRouterArgs


def chapter_router(args: ChapterRouterArgs) -> tuple[Tensor, ...]:
    """Return indices, weights, the three losses, count, load and entropy."""
    wide = torch.float64 if args.hidden.dtype == torch.float64 else torch.float32
    B, N, E = args.hidden.shape
    n_routed = args.weight.shape[0]
    valid = args.valid
    if valid is None:
        valid = torch.ones(B, N, dtype=torch.bool, device=args.hidden.device)
    # an invalid row may hold anything
    hidden = torch.where(valid[..., None], args.hidden, 0.0).to(wide)
    with torch.autocast(hidden.device.type, enabled=False):  # logits are never rounded
        logits = hidden.reshape(B * N, E) @ args.weight.to(wide).T
    if args.bias is not None:
        logits = logits + args.bias.to(wide)
    logits = (logits / args.temperature).unflatten(0, (B, N))

    order = logits.detach()
    order = order.masked_fill(order.isnan(), -torch.inf)
    chosen = _first_largest(order, args.top_k)
    weights = args.routed_scale * logits.gather(-1, chosen).softmax(-1)
    shared = torch.arange(args.num_shared, device=chosen.device).expand(B, N, -1)
    indices = torch.cat([shared, chosen + args.num_shared], -1)
    weights = torch.cat([weights.new_ones(shared.shape), weights], -1)
    indices = indices.masked_fill(~valid[..., None], -1).int()
    weights = weights.masked_fill(~valid[..., None], 0.0)

    count = valid.sum().to(wide)
    mean = lambda x: (
        torch.where(valid.view(B, N, *[1] * (x.dim() - 2)), x, 0.0).sum((0, 1)) / count.clamp(min=1)
    )
    lse = logits.logsumexp(-1)
    probabilities = logits.softmax(-1)
    one_hot = torch.zeros_like(order).scatter(-1, chosen, 1.0)
    load, importance = mean(one_hot), mean(probabilities)
    factor = n_routed / args.top_k if args.is_mean else n_routed
    load_balance_loss = factor * (load * importance).sum()
    auxiliary_loss = n_routed * (importance - 1 / n_routed).square().sum()
    auxiliary_loss = auxiliary_loss * (count > 0)
    # a chapter without probability has no part, though its logit may be minus infinity
    expected = torch.where(probabilities == 0, 0.0, probabilities * logits).sum(-1)
    entropy = mean(lse - expected).detach()
    z_loss = mean(lse.square())
    return indices, weights, load_balance_loss, auxiliary_loss, z_loss, count, load, entropy


def _first_largest(x: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` largest entries, of equal ones the first."""
    if torch.onnx.is_in_onnx_export():  # has no stable sort; its TopK takes the first of equals
        return x.topk(k).indices
    return x.sort(dim=-1, descending=True, stable=True).indices[..., :k]  # topk takes any of them
