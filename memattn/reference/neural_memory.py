"""Definition of the neural memory, chunk by chunk, in operations that autograd differentiates.

``neural_memory_loops`` computes the same token by token. A row is a sequence or a document; its
slots are the pending tokens of its open chunk, then its own tokens, so that chunks begin at slots
0, b, 2b, ... of every row. A slot without a token changes nothing.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from memattn_kernels.signatures import NeuralMemoryArgs, NeuralMemoryStepArgs

Arguments = NeuralMemoryArgs | NeuralMemoryStepArgs


def memory_sizes(args: Arguments) -> list[int]:
    """``d_0 ... d_N``."""
    hidden = [args.width_1, args.width_2, args.width_3][: args.depth - 1]
    return [args.query.shape[-1], *hidden, args.value.shape[-1]]


def unpack(packed: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Layers ``[..., d_n, d_{n-1}]`` of packed weights ``[..., P]``, as views."""
    pairs = list(zip(sizes[1:], sizes, strict=False))
    parts = packed.split([rows * columns for rows, columns in pairs], -1)
    return [part.unflatten(-1, pair) for part, pair in zip(parts, pairs, strict=True)]


def pack(layers: Sequence[Tensor]) -> Tensor:
    """Packed weights ``[..., P]`` of layers ``[..., d_n, d_{n-1}]``."""
    return torch.cat([layer.flatten(-2) for layer in layers], -1)


def activate(a: Tensor, is_silu: bool) -> tuple[Tensor, Tensor]:
    """The activation and its derivative."""
    if is_silu:
        s = a.sigmoid()
        return a * s, s + a * s * (1 - s)
    below = 0.5 * (1 + torch.erf(a / math.sqrt(2)))
    return a * below, below + a * torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)


def memory_forward(
    layers: Sequence[Tensor], x: Tensor, is_silu: bool, residual: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """``f(W; x)`` of rows ``x [..., n, D]``, the inputs of its layers, the derivatives between."""
    inputs, slopes, h = [], [], x
    for n, layer in enumerate(layers):
        inputs.append(h)
        h = h @ layer.mT
        if n < len(layers) - 1:
            h, slope = activate(h, is_silu)
            slopes.append(slope)
    return (x + h if residual else h), inputs, slopes


def inner_gradient(
    args: Arguments, layers: Sequence[Tensor], key: Tensor, value: Tensor
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """``h`` and ``delta`` of all layers, so that a gradient is ``delta h^T``, and its norm."""
    predicted, h, slopes = memory_forward(layers, key, args.is_silu, args.residual)
    error = predicted - value
    delta = [error.clamp(-args.huber_delta, args.huber_delta) if args.is_huber else error]
    for layer, slope in zip(reversed(layers[1:]), reversed(slopes), strict=True):
        delta.insert(0, slope * (delta[0] @ layer))
    square = sum(
        (d.square().sum(-1) * x.square().sum(-1) for d, x in zip(delta, h, strict=True)),
        start=torch.zeros_like(error[..., 0]),
    )
    some = square != 0  # the root has no derivative at 0
    return h, delta, torch.where(some, torch.where(some, square, 1.0).sqrt(), 0.0)


def clamp_factor(args: Arguments, norm: Tensor) -> Tensor:
    """Factor that clips a gradient of this norm to ``max_norm``: at most 1, and 1 at norm 0."""
    if args.max_norm is None:
        return torch.ones_like(norm)
    some = norm != 0
    safe = torch.where(some, norm, 1.0)
    if args.clamp_soft:
        factor = args.max_norm / safe * torch.tanh(safe / args.max_norm)
        return torch.where(some, factor, 1.0)
    return torch.where(norm <= args.max_norm, 1.0, args.max_norm / safe)


def without_lost(h: list[Tensor], delta: list[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Zeros for tokens whose update is not finite, and which they are, bool ``[..., n]``.

    Weights are NaN from such a token on. Its own factors would reach earlier tokens as 0 * NaN, so
    its rates are NaN in the state instead.
    """
    sound = [x.detach().isfinite().all(-1) for x in (*h, *delta)]
    ok = torch.stack(sound).all(0)[..., None]
    clean = lambda layers: [torch.where(ok, x, 0.0) for x in layers]
    return clean(h), clean(delta), ~ok[..., 0]


def coefficients(decay: Tensor, momentum: Tensor, present: Tensor) -> tuple[Tensor, ...]:
    """How the state at the start of a chunk and its tokens' gradients enter each token's weights.

    Args:
        decay: ``[..., b]``, 0 where there is none.
        momentum: The same.
        present: bool ``[..., b]``, slots that hold a token.

    Returns:
        ``beta``, ``sigma``, ``mu`` ``[..., b]``, and ``c``, ``m`` ``[..., b, b]``: token j has the
        weights ``beta_j W' + sigma_j S' - sum_i c_ji delta_i h_i^T`` and the momentum ``mu_j S' -
        sum_i m_ji delta_i h_i^T``. By recurrence: ratios of products would be 0 / 0 for a decay of
        1.
    """
    b = decay.shape[-1]
    # beside each other what the same recurrence makes: mu before m, and beta, sigma before c
    unit = F.pad(torch.eye(b, dtype=decay.dtype, device=decay.device), (2, 0))
    start = unit.new_zeros(b + 2)
    moved, kept = start.clone(), start.clone()
    moved[1], kept[0] = 1.0, 1.0
    moved, kept = (x.expand(*decay.shape[:-1], b + 2) for x in (moved, kept))
    rates = zip(*(x[..., None].unbind(-2) for x in (present, 1 - decay, momentum)), strict=True)
    found = []
    for own, (here, keep, carry) in zip(unit, rates, strict=True):
        moved = torch.where(here, carry * moved + own, moved)
        kept = torch.where(here, keep * kept + moved, kept)
        found.append((moved, kept))
    moved, kept = (torch.stack(x, -2) for x in zip(*found, strict=True))
    beta, sigma, c = kept[..., 0], kept[..., 1], kept[..., 2:]
    return beta, sigma, moved[..., 1], c, moved[..., 2:]


class Slots:
    """Where the tokens of each row are: ``token [R, n]`` is T for slots that hold none of them."""

    def __init__(self, args: NeuralMemoryArgs):
        B, _, self.T, _ = args.query.shape
        device, b = args.query.device, args.chunk_size
        by_row = (args.count, args.row_start)
        self.R = next((x.shape[0] for x in by_row if x is not None), B)
        zero = torch.zeros(self.R, dtype=torch.long, device=device)
        start = zero if args.row_start is None else args.row_start.long()
        end = zero + self.T if args.row_end is None else args.row_end.long()
        self.pending = zero if args.count is None else args.count.long()
        self.total = self.pending + (end - start).clamp(min=0)  # tokens from the open chunk's first
        self.n_chunks = (self.T + (0 if args.count is None else b - 1) + b - 1) // b
        slot = torch.arange(self.n_chunks * b, device=device)
        self.is_pending = slot < self.pending[:, None]
        self.present = slot < self.total[:, None]
        token = start[:, None] - self.pending[:, None] + slot
        self.token = torch.where(self.present & ~self.is_pending, token, self.T)
        self.shape = (self.n_chunks, b)

    def take(self, x: Tensor) -> Tensor:
        """``[R, H, n_chunks, b, ...]`` from ``[B, H, T, ...]``, 0 where there is no token."""
        last = x.dim() == 3
        x = F.pad(x[..., None] if last else x, (0, 0, 0, 1)).expand(self.R, -1, -1, -1)
        index = self.token[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1])
        x = x.gather(2, index).unflatten(2, self.shape)
        return x[..., 0] if last else x

    def put(self, x: Tensor, B: int) -> Tensor:
        """``[B, H, T, ...]`` from ``[R, H, n_chunks, b, ...]``, 0 for tokens of no row."""
        last = x.dim() == 4
        x = (x[..., None] if last else x).flatten(2, 3)
        index = self.token[:, None, :, None].expand_as(x)
        none = x.new_zeros(*x.shape[:2], self.T + 1, x.shape[-1])
        tokens = none.scatter(2, index, x)[:, :, : self.T]
        if B != self.R:  # documents: each token is one row's
            tokens = tokens.sum(0, keepdim=True)
        return tokens[..., 0] if last else tokens


def neural_memory(args: NeuralMemoryArgs) -> tuple[Tensor, ...]:
    """Return ``out``, ``surprise`` and the tensors of the state, of size 0 where there is none."""
    with torch.autocast(args.query.device.type, enabled=False):
        return _neural_memory(args)


def _neural_memory(args: NeuralMemoryArgs) -> tuple[Tensor, ...]:
    """Without autocast: all sums are float32, or float64."""
    wide = args.lr.dtype
    B, H, _, _ = args.query.shape
    b, sizes, slots = args.chunk_size, memory_sizes(args), Slots(args)
    query, key, value = (slots.take(x.to(wide)) for x in (args.query, args.key, args.value))
    lr = slots.take(args.lr)
    decay = torch.zeros_like(lr) if args.decay is None else slots.take(args.decay)
    momentum = torch.zeros_like(lr) if args.momentum is None else slots.take(args.momentum)

    old = _Pending(args, slots, sizes)
    if slots.n_chunks:
        decay = torch.cat([old.into(decay[:, :, 0], old.decay)[:, :, None], decay[:, :, 1:]], 2)
        if args.momentum is not None:
            first = old.into(momentum[:, :, 0], old.momentum)
            momentum = torch.cat([first[:, :, None], momentum[:, :, 1:]], 2)
    present = slots.present.unflatten(1, slots.shape)[:, None].expand_as(lr)
    beta, sigma, mu, c, m = coefficients(decay, momentum, present)

    every = lambda x: x.expand(slots.R, -1, -1)
    weights = unpack(every(args.start_weights), sizes)
    if args.momentum is None:
        surprise = None
    elif args.start_momentum is None:
        surprise = [torch.zeros_like(layer) for layer in weights]
    else:
        surprise = unpack(every(args.start_momentum), sizes)
    new = old.emptied()
    skipped = torch.zeros_like(slots.pending) if args.skipped is None else args.skipped
    outs, norms = [], []
    for g in range(slots.n_chunks):
        k, v, q = key[:, :, g], value[:, :, g], query[:, :, g]
        h, delta, norm = inner_gradient(args, weights, k, v)
        norms.append(norm.detach())
        if args.skip_nonfinite:
            ok = norm.detach().isfinite()[..., None]
            own = slots.token.unflatten(1, slots.shape)[:, g] < slots.T
            skipped = skipped + (own[:, None] & ~ok[..., 0]).sum((1, 2))
            # again from zeros: what is not finite would reach gradients as 0 * NaN
            k, v = (torch.where(ok, x, 0.0) for x in (k, v))
            h, delta, norm = inner_gradient(args, weights, k, v)
            h, delta = ([torch.where(ok, x, 0.0) for x in layers] for layers in (h, delta))
        factor = (lr[:, :, g] * clamp_factor(args, norm))[..., None]
        h, delta, lost = without_lost(h, [factor * x for x in delta])
        poison = torch.where(lost.long().cumsum(-1) > 0, torch.nan, 0.0).to(wide)
        if g == 0:
            h = old.into_layers(h, old.h)
            delta = old.into_layers(delta, old.delta)

        if args.read_chunk:
            outs.append(memory_forward(weights, q, args.is_silu, args.residual)[0])
        else:
            x = q
            for n, layer in enumerate(weights):
                z = beta[:, :, g, :, None] * (x @ layer.mT)
                if surprise is not None:
                    z = z + sigma[:, :, g, :, None] * (x @ surprise[n].mT)
                z = z - ((x @ h[n].mT) * c[:, :, g]) @ delta[n]
                z = z + poison[..., None]
                x = activate(z, args.is_silu)[0] if n < args.depth - 1 else z
            outs.append(x + q if args.residual else x)

        # rows whose chunk ends here
        full = slots.total >= (g + 1) * b
        row = full[:, None, None, None]
        end_c, end_m = c[:, :, g, -1, :, None], m[:, :, g, -1, :, None]
        end_poison = poison[..., -1, None, None]
        last = lambda x, g=g: x[:, :, g, -1, None, None]
        ended, moved = [], []
        for n, layer in enumerate(weights):
            end = last(beta) * layer - (end_c * delta[n]).mT @ h[n] + end_poison
            if surprise is not None:
                end = end + last(sigma) * surprise[n]
                end_s = end_poison + last(mu) * surprise[n] - (end_m * delta[n]).mT @ h[n]
                moved.append(torch.where(row, end_s, surprise[n]))
            ended.append(torch.where(row, end, layer))
        weights, surprise = ended, surprise if surprise is None else moved
        # rows whose open chunk this is
        if args.return_state:
            is_open = ~full & (slots.total >= g * b)
            rates = [decay[:, :, g], momentum[:, :, g]]
            for n in range(1 if surprise is None else 2):
                rates[n] = torch.where(lost, torch.nan, rates[n])
            new.fill(is_open, slots.total - g * b, h, delta, *rates)

    none = args.lr.new_zeros(B, H, args.query.shape[2])
    out = slots.put(torch.stack(outs, 2), B) if outs else none[..., None] * args.value.to(wide)
    norm = slots.put(torch.stack(norms, 2), B) if norms else none
    end_count = (slots.total % b).int()
    if args.return_state:
        no_s = args.lr.new_zeros(0)
        state = [pack(weights), no_s if surprise is None else pack(surprise)]
        state += [new.h, new.delta, new.decay, new.momentum]
    else:
        state = [args.lr.new_zeros(0) for _ in range(6)]
    return out.to(args.query.dtype), norm, *state, end_count, skipped


class _Pending:
    """The tokens of the open chunk of each row, in the initial or the final state."""

    def __init__(self, args: NeuralMemoryArgs, slots: Slots, sizes: list[int]):
        self.args, self.sizes, b = args, sizes, args.chunk_size
        like, (R, H) = args.lr, (slots.R, args.query.shape[1])
        widths = (sum(sizes[:-1]), sum(sizes[1:]))
        self.is_pending = slots.is_pending[:, None, :b]  # [R, 1, b]
        given = (args.pending_h, args.pending_delta, args.pending_decay, args.pending_momentum)
        shapes = ([R, H, b - 1, widths[0]], [R, H, b - 1, widths[1]], [R, H, b - 1], [R, H, b - 1])
        self.h, self.delta, self.decay, self.momentum = (
            like.new_zeros(shape) if x is None else x
            for x, shape in zip(given, shapes, strict=True)
        )

    def emptied(self) -> "_Pending":
        """The same without a token."""
        new = object.__new__(_Pending)
        new.args, new.sizes, new.is_pending = self.args, self.sizes, self.is_pending
        new.h, new.delta, new.decay, new.momentum = (
            torch.zeros_like(x) for x in (self.h, self.delta, self.decay, self.momentum)
        )
        return new

    def into(self, chunk: Tensor, pending: Tensor) -> Tensor:
        """The first chunk ``[R, H, b, ...]`` with the pending tokens in their slots."""
        if self.args.count is None:
            return chunk
        where = self.is_pending if chunk.dim() == 3 else self.is_pending[..., None]
        padding = (0, 1) if chunk.dim() == 3 else (0, 0, 0, 1)
        return torch.where(where, F.pad(pending, padding), chunk)

    def into_layers(self, layers: list[Tensor], pending: Tensor) -> list[Tensor]:
        """The same for each layer."""
        parts = pending.split([x.shape[-1] for x in layers], -1)
        return [self.into(x, part) for x, part in zip(layers, parts, strict=True)]

    def fill(
        self,
        rows: Tensor,
        count: Tensor,
        h: list[Tensor],
        delta: list[Tensor],
        decay: Tensor,
        momentum: Tensor,
    ) -> None:
        """Take the first ``count [R]`` tokens of a chunk for some of the rows."""
        slot = torch.arange(self.args.chunk_size - 1, device=count.device)
        where = (rows[:, None] & (slot < count[:, None]))[:, None]  # [R, 1, b - 1]
        wide = where[..., None]
        self.h = torch.where(wide, torch.cat(h, -1)[:, :, :-1], self.h)
        self.delta = torch.where(wide, torch.cat(delta, -1)[:, :, :-1], self.delta)
        self.decay = torch.where(where, decay[:, :, :-1], self.decay)
        self.momentum = torch.where(where, momentum[:, :, :-1], self.momentum)
