"""One token of the neural memory, for decoding: as ``neural_memory``, without gradients. The
weights after the token are not formed until its chunk ends.
"""

import torch
from torch import Tensor

from memattn.reference.neural_memory import (
    activate,
    clamp_factor,
    coefficients,
    inner_gradient,
    memory_forward,
    memory_sizes,
    pack,
    unpack,
    without_lost,
)
from memattn_kernels.signatures import NeuralMemoryStepArgs


def neural_memory_step(args: NeuralMemoryStepArgs) -> tuple[Tensor, ...]:
    """Write the pending tensors, and return the results.

    Returns:
        ``out``, ``surprise``, ``end_weights``, ``end_momentum``, ``end_count``, ``end_skipped``;
        weights and momentum have size 0 unless ``fold``.
    """
    with torch.no_grad(), torch.autocast(args.query.device.type, enabled=False):
        return _step(args)


def _step(args: NeuralMemoryStepArgs) -> tuple[Tensor, ...]:
    wide, sizes, b = args.lr.dtype, memory_sizes(args), args.chunk_size
    q, k, v = (x.to(wide) for x in (args.query, args.key, args.value))
    weights = unpack(args.start_weights, sizes)
    momentum = None if args.start_momentum is None else unpack(args.start_momentum, sizes)

    h, delta, norm = inner_gradient(args, weights, k, v)
    ok = norm.isfinite() if args.skip_nonfinite else torch.ones_like(norm, dtype=torch.bool)
    factor = (args.lr * clamp_factor(args, norm))[..., None]
    # [B, H, 1, .], all layers beside each other
    new_h = torch.where(ok[..., None], torch.cat(h, -1), 0.0)
    new_delta = torch.where(ok[..., None], factor * torch.cat(delta, -1), 0.0)
    (new_h,), (new_delta,), lost = without_lost([new_h], [new_delta])

    # slots of the chunk: pending tokens, this one, and nothing after it
    slot = torch.arange(b, device=args.count.device)
    is_new = (slot == args.count[:, None])[:, None]  # [B, 1, b]
    present = (slot <= args.count[:, None])[:, None].expand(*args.lr.shape[:2], b)

    def behind(pending: Tensor, new: Tensor) -> Tensor:
        """``[B, H, b, ...]`` with the new token in its slot and zeros after it."""
        new_slot, here = is_new, present
        if pending.dim() == 4:
            new_slot, here = is_new[..., None], present[..., None]
        slots = torch.cat([pending, torch.zeros_like(new)], 2)
        return torch.where(new_slot, new, torch.where(here, slots, 0.0))

    zero = torch.zeros_like(args.lr)
    eta = zero if args.momentum is None else args.momentum
    alpha = zero if args.decay is None else args.decay
    alpha, eta = (torch.where(lost, torch.nan, x) for x in (alpha, eta))
    all_h, all_delta = behind(args.pending_h, new_h), behind(args.pending_delta, new_delta)
    if momentum is None:
        all_eta = torch.zeros_like(present, dtype=wide)
    else:
        all_eta = behind(args.pending_momentum, eta)
    all_alpha = behind(args.pending_decay, alpha)
    # what follows the new token is absent, so the last row is that of the new token
    beta, sigma, mu, c, m = (
        x[:, :, -1:] for x in coefficients(all_alpha, all_eta, present)
    )  # [B, H, 1] and [B, H, 1, b]
    parts = lambda x, widths: x.split(widths, -1)
    hs, deltas = parts(all_h, sizes[:-1]), parts(all_delta, sizes[1:])
    if args.read_chunk:
        out = memory_forward(weights, q, args.is_silu, args.residual)[0]
    else:
        x = q
        for n, layer in enumerate(weights):
            z = beta[..., None] * (x @ layer.mT) - ((x @ hs[n].mT) * c) @ deltas[n]
            if momentum is not None:
                z = z + sigma[..., None] * (x @ momentum[n].mT)
            x = activate(z, args.is_silu)[0] if n < args.depth - 1 else z
        out = x + q if args.residual else x

    ends = args.count == b - 1
    end_weights = end_momentum = args.lr.new_zeros(0)
    if args.fold:
        row = ends[:, None, None, None]
        ended, moved = [], []
        for n, layer in enumerate(weights):
            end = beta[..., None] * layer - (c.mT * deltas[n]).mT @ hs[n]
            if momentum is not None:
                end = end + sigma[..., None] * momentum[n]
                end_s = mu[..., None] * momentum[n] - (m.mT * deltas[n]).mT @ hs[n]
                moved.append(torch.where(row, end_s, momentum[n]))
            ended.append(torch.where(row, end, layer))
        end_weights = pack(ended)
        end_momentum = end_momentum if momentum is None else pack(moved)

    index = args.count.long().clamp(max=max(b - 2, 0))[:, None, None]
    for pending, new in (
        (args.pending_h, new_h),
        (args.pending_delta, new_delta),
        (args.pending_decay, alpha),
        (args.pending_momentum, zero if momentum is None else eta),
    ):
        if b > 1:  # a row whose chunk ends writes back what it has
            at, stays = index.expand(*pending.shape[:2], 1), ends[:, None, None]
            if pending.dim() == 4:
                at, stays = at[..., None].expand_as(new), stays[..., None]
            pending.scatter_(2, at, torch.where(stays, pending.gather(2, at), new))
    end_count = torch.where(ends, 0, args.count + 1).int()
    skipped = args.skipped + (~ok).sum((1, 2))
    return out.to(args.query.dtype), norm, end_weights, end_momentum, end_count, skipped
