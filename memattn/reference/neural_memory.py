"""Definition of the neural memory, chunk by chunk, in operations that autograd differentiates.

``neural_memory_loops`` computes the same token by token. A row is a sequence or a document; its
slots are the pending tokens of its open chunk, then its own tokens, so that chunks begin at slots
0, b, 2b, ... of every row. A slot without a token changes nothing.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memattn.checks import is_static
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

    old = _pending_before(args, slots, sizes)
    if args.count is not None:
        where = slots.is_pending.unflatten(1, slots.shape)[:, None]
        pending = (F.pad(x, (0, 1))[:, :, None] for x in (old.decay, old.momentum))
        decay, with_pending = (
            torch.where(where, *pair) for pair in zip(pending, (decay, momentum), strict=True)
        )
        momentum = momentum if args.momentum is None else with_pending
    present = slots.present.unflatten(1, slots.shape)[:, None].expand_as(lr)
    coefficient = coefficients(decay, momentum, present)

    every = lambda x: x.expand(slots.R, -1, -1)
    weights, surprise = unpack(every(args.start_weights), sizes), []
    if args.momentum is not None and args.start_momentum is None:
        surprise = [torch.zeros_like(layer) for layer in weights]
    elif args.momentum is not None:
        surprise = unpack(every(args.start_momentum), sizes)
    skipped = torch.zeros_like(slots.pending) if args.skipped is None else args.skipped
    state = _State(weights, surprise, _Pending(*map(torch.zeros_like, old)), skipped)
    tokens = (query, key, value, lr, decay, momentum, *coefficient)
    masks = (slots.is_pending, slots.token < slots.T)
    chunks = _Chunk(
        *(x.movedim(2, 0) for x in tokens),
        *(x.unflatten(1, slots.shape).movedim(1, 0) for x in masks),
        begin=b * torch.arange(slots.n_chunks, device=query.device),
    )
    read = partial(_read_and_write, args, slots.total)
    old = None if args.count is None else old
    if torch.compiler.is_exporting() and not is_static(slots.n_chunks):
        state, out, norm = _scan(partial(read, old), state, chunks)
    else:
        found: list[tuple[Tensor, Tensor]] = []
        for each in zip(*(x.unbind() for x in chunks), strict=True):
            state, outputs = read(None if found else old, state, _Chunk(*each))
            found.append(outputs)
        none = value.new_zeros(*value.shape[:2], 0, b, value.shape[-1])
        out, norm = none, none[..., 0]
        if found:
            out, norm = (torch.stack(x, 2) for x in zip(*found, strict=True))

    out, norm = slots.put(out, B), slots.put(norm, B)
    end_count = (slots.total % b).int()
    if args.return_state:
        no_s = args.lr.new_zeros(0)
        end = [pack(state.weights), pack(state.surprise) if state.surprise else no_s]
        end += state.pending
    else:
        end = [args.lr.new_zeros(0) for _ in range(6)]
    return out.to(args.query.dtype), norm, *end, end_count, state.skipped


class _Pending(NamedTuple):
    """The tokens of the open chunk of each row; layers beside each other."""

    h: Tensor  # [R, H, b - 1, PH]
    delta: Tensor  # [R, H, b - 1, PD]
    decay: Tensor  # [R, H, b - 1]
    momentum: Tensor


class _State(NamedTuple):
    """What goes from chunk to chunk."""

    weights: list[Tensor]  # of each layer, [R, H, d_n, d_{n-1}]
    surprise: list[Tensor]  # the momentum of each layer; empty where none is kept
    pending: _Pending  # of rows whose last chunk is open
    skipped: Tensor  # [R]


class _Chunk(NamedTuple):
    """The slots of one chunk, or of all chunks, whose axis is then in front."""

    query: Tensor  # [R, H, b, D]
    key: Tensor
    value: Tensor
    lr: Tensor  # [R, H, b]
    decay: Tensor
    momentum: Tensor
    beta: Tensor
    sigma: Tensor
    mu: Tensor
    c: Tensor  # [R, H, b, b]
    m: Tensor
    is_pending: Tensor  # bool [R, b]
    is_own: Tensor  # bool [R, b], a token of this call
    begin: Tensor  # int64 [], slots before it


def _pending_before(args: NeuralMemoryArgs, slots: Slots, sizes: list[int]) -> _Pending:
    """The open chunk at the start, zeros where there is none."""
    given = (args.pending_h, args.pending_delta, args.pending_decay, args.pending_momentum)
    shape = (slots.R, args.query.shape[1], args.chunk_size - 1)
    shapes = ((*shape, sum(sizes[:-1])), (*shape, sum(sizes[1:])), shape, shape)
    pairs = zip(given, shapes, strict=True)
    return _Pending(*(args.lr.new_zeros(size) if x is None else x for x, size in pairs))


def _with_pending(is_pending: Tensor, chunk: Tensor, pending: Tensor) -> Tensor:
    """A chunk ``[R, H, b, F]`` with the pending tokens in their slots."""
    return torch.where(is_pending[:, None, :, None], F.pad(pending, (0, 0, 0, 1)), chunk)


def _read_and_write(
    args: NeuralMemoryArgs, total: Tensor, old: _Pending | None, state: _State, chunk: _Chunk
) -> tuple[_State, tuple[Tensor, Tensor]]:
    """The state after a chunk, its outputs ``[R, H, b, Dv]`` and its norms ``[R, H, b]``.

    Args:
        total: int64 ``[R]``, tokens of each row from its first chunk on.
        old: The open chunk at the start, which is in the slots of the first chunk, or None.
    """
    weights, surprise, pending, skipped = state
    h, delta, norm = inner_gradient(args, weights, chunk.key, chunk.value)
    norms = norm.detach()
    if args.skip_nonfinite:
        ok = norms.isfinite()[..., None]
        skipped = skipped + (chunk.is_own[:, None] & ~ok[..., 0]).sum((1, 2))
        # again from zeros: what is not finite would reach gradients as 0 * NaN
        k, v = (torch.where(ok, x, 0.0) for x in (chunk.key, chunk.value))
        h, delta, norm = inner_gradient(args, weights, k, v)
        h, delta = ([torch.where(ok, x, 0.0) for x in layers] for layers in (h, delta))
    factor = (chunk.lr * clamp_factor(args, norm))[..., None]
    h, delta, lost = without_lost(h, [factor * x for x in delta])
    poison = torch.where(lost.long().cumsum(-1) > 0, torch.nan, 0.0).to(chunk.lr.dtype)
    if old is not None:
        h, delta = (
            [
                _with_pending(chunk.is_pending, x, part)
                for x, part in zip(new, had.split([x.shape[-1] for x in new], -1), strict=True)
            ]
            for new, had in ((h, old.h), (delta, old.delta))
        )

    if args.read_chunk:
        out = memory_forward(weights, chunk.query, args.is_silu, args.residual)[0]
    else:
        out = chunk.query
        for n, layer in enumerate(weights):
            z = chunk.beta[..., None] * (out @ layer.mT)
            if surprise:
                z = z + chunk.sigma[..., None] * (out @ surprise[n].mT)
            z = z - ((out @ h[n].mT) * chunk.c) @ delta[n]
            z = z + poison[..., None]
            out = activate(z, args.is_silu)[0] if n < args.depth - 1 else z
        out = out + chunk.query if args.residual else out

    # rows whose chunk ends here
    full = total >= chunk.begin + args.chunk_size
    row = full[:, None, None, None]
    end_c, end_m = chunk.c[:, :, -1, :, None], chunk.m[:, :, -1, :, None]
    end_poison = poison[..., -1, None, None]
    last = lambda x: x[:, :, -1, None, None]
    ended, moved = [], []
    for n, layer in enumerate(weights):
        end = last(chunk.beta) * layer - (end_c * delta[n]).mT @ h[n] + end_poison
        if surprise:
            end = end + last(chunk.sigma) * surprise[n]
            end_s = end_poison + last(chunk.mu) * surprise[n] - (end_m * delta[n]).mT @ h[n]
            moved.append(torch.where(row, end_s, surprise[n]))
        ended.append(torch.where(row, end, layer))
    # rows whose open chunk this is
    if args.return_state:
        rates = [chunk.decay, chunk.momentum]
        for n in range(2 if surprise else 1):
            rates[n] = torch.where(lost, torch.nan, rates[n])
        slot = torch.arange(args.chunk_size - 1, device=total.device)
        is_open = ~full & (total >= chunk.begin)
        where = (is_open[:, None] & (slot < (total - chunk.begin)[:, None]))[:, None]
        new = (torch.cat(h, -1), torch.cat(delta, -1), *rates)
        pending = _Pending(
            *(
                torch.where(where[..., None] if x.dim() == 4 else where, x[:, :, :-1], had)
                for x, had in zip(new, pending, strict=True)
            )
        )
    return _State(ended, moved, pending, skipped), (out, norms)


def _scan(
    read: Callable[[_State, _Chunk], tuple[_State, tuple[Tensor, Tensor]]],
    state: _State,
    chunks: _Chunk,
) -> tuple[_State, Tensor, Tensor]:
    """``read`` chunk by chunk in a program of ``torch.export`` for any number of chunks."""
    from torch._higher_order_ops.scan import scan  # not above: it loads the compiler

    depth, kept = len(state.weights), len(state.surprise)
    # scan wants tensors of the same strides each time, none of which is one that it gave
    own = lambda tensors: [x.clone(memory_format=torch.contiguous_format) for x in tensors]

    def flat(state: _State) -> list[Tensor]:
        return [*state.weights, *state.surprise, *state.pending, state.skipped]

    def step(carry: list[Tensor], slots: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        weights, surprise, rest = carry[:depth], carry[depth : depth + kept], carry[depth + kept :]
        state = _State(weights, surprise, _Pending(*rest[:-1]), rest[-1])
        state, outputs = read(state, _Chunk(*slots))
        return own(flat(state)), list(outputs)

    end, (out, norm) = scan(step, own(flat(state)), list(chunks))
    pending = _Pending(*end[depth + kept : -1])
    state = _State(end[:depth], end[depth : depth + kept], pending, end[-1])
    return state, out.movedim(0, 2), norm.movedim(0, 2)
