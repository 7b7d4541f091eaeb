"""Projections of branches for the tokens that use them: one product per branch and its rows."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memattn.checks import plain_values
from memattn.nn._autograd import apply
from memattn.nn.attention_specialist import AttentionWeights
from memattn.ops._attention import autocast

# A branch's rows are padded to a multiple of this. Smaller products, and the last rows of products,
# may be summed in another order, so that a token's result would depend on how many others use its
# branch.
ROWS = 16


class Span(NamedTuple):
    """Rows that are multiplied by the same weight."""

    source: int  # first row of the input
    target: int  # first row of the result
    n: int
    branch: int


class BranchPlan(NamedTuple):
    """The branches that the tokens of a batch use, read on the host."""

    slots: Tensor  # int64 [B, T, A], the branch of each slot, or -1
    gates: Tensor  # [B, T, A], the gates of the slots
    places: Tensor  # int64 [B, T, A], the branch's index among those that the sample uses, or -1
    used: list[list[int]]  # the branches of each sample, rising
    spans: list[Span]  # rows of the branches, in ascending order
    slot_of: Tensor  # int64 [n], slots of the rows in ``slots.flatten()``; -1 for padding
    row_of: Tensor  # int64 [B * T, A], the row of every slot, or -1

    @property
    def branches(self) -> list[int]:
        """Branches that some token uses, in ascending order."""
        return [span.branch for span in self.spans]

    @property
    def width(self) -> int:
        """Largest number of branches that a sample uses."""
        return max(map(len, self.used), default=0)

    def queries(self, x: Tensor, weights: Mapping[int, AttentionWeights], heads: int) -> Tensor:
        """Map ``[B, T, E]`` to the heads of every slot, ``[B, A, H, T, D]``; 0 in empty slots.

        Args:
            x: The tokens' features.
            weights: Weights of ``branches``, by branch.
            heads: Heads of a branch.
        """
        B, T, A = self.slots.shape
        token_of = torch.where(self.slot_of < 0, -1, self.slot_of // A)
        rows = move_rows(x.flatten(0, 1), token_of, self.row_of)
        rows = _products(rows, self.spans, len(rows), weights, "q")
        slots = move_rows(rows, self.row_of.flatten(), self.slot_of[:, None])
        return slots.view(B, T, A, heads, -1).permute(0, 2, 3, 1, 4)

    def keys(
        self, x: Tensor, weights: Mapping[int, AttentionWeights], heads: int, name: str
    ) -> Tensor:
        """Map ``[B, S, E]`` to keys or values of each sample's branches, ``[B, F, Hkv, S, D]``.

        F is ``width``; ``places`` gives the index of a slot's branch. Samples that use fewer
        branches are padded with 0.

        Args:
            x: Features that keys or values are computed from.
            weights: Likewise.
            heads: Heads of a branch.
            name: ``"k"`` or ``"v"``.
        """
        B, S, _ = x.shape
        n = self.width
        spans = [
            Span(b * S, (b * n + at) * S, S, branch)
            for b, branches in enumerate(self.used)
            for at, branch in enumerate(branches)
        ]
        rows = _products(x.flatten(0, 1), spans, B * n * S, weights, name)
        return rows.view(B, n, S, heads, -1).permute(0, 1, 3, 2, 4)

    def reduce(self, out: Tensor, weights: Mapping[int, AttentionWeights]) -> Tensor:
        """Sum over slots of their branches' output projections, ``[B, T, E]``.

        Args:
            out: ``[B, A, H, T, D]``, gated; 0 in empty slots.
            weights: As in ``queries``. Biases are multiplied by the gate.
        """
        B, A, H, T, D = out.shape
        slots = out.permute(0, 3, 1, 2, 4).reshape(B * T * A, H * D)
        rows = move_rows(slots, self.slot_of, self.row_of.view(-1, 1))
        gates = None
        if any(weights[branch].out_bias is not None for branch in self.branches):
            gates = move_rows(self.gates.reshape(-1, 1), self.slot_of, self.row_of.view(-1, 1))
        rows = _products(rows, self.spans, len(rows), weights, "out", gates)
        # each token sums the rows of its slots
        token_of = torch.where(self.slot_of < 0, -1, self.slot_of // A)
        return sum_rows(rows, token_of, self.row_of).view(B, T, -1)


def plan_branches(shares: Tensor, slots: int | None = None) -> BranchPlan:
    """Find the branches that tokens use: those whose gates are not 0.

    Args:
        shares: Gates ``[B, T, F]`` of all branches; their values are read on the host.
        slots: Largest number of branches per token, taken by the largest gates; None: all.
    """
    B, T, F = shares.shape
    A = F if slots is None else min(slots, F)
    # a NaN gate counts as open
    chosen = shares.detach().sort(dim=-1, descending=True, stable=True).indices[..., :A]
    chosen = chosen.sort(dim=-1).values  # a token's sum is in the order of the branches
    gates = shares.gather(-1, chosen)
    branches = torch.where(gates.detach() != 0, chosen, -1)
    present = shares.new_zeros(B, 1 + F, dtype=torch.bool)
    present.scatter_(1, (branches + 1).flatten(1), True)
    places = (present[:, 1:].cumsum(1) - 1).gather(1, branches.clamp(min=0).flatten(1))
    places = torch.where(branches < 0, -1, places.view_as(branches))
    used = [plain_values(row.nonzero()[:, 0]) for row in present[:, 1:].cpu()]

    flat = branches.flatten()
    order = flat.argsort(stable=True)
    counts: list[int] = plain_values((flat + 1).bincount(minlength=1 + F))
    spans: list[Span] = []
    pieces: list[Tensor] = []
    begin, row = counts[0], 0
    for branch, count in enumerate(counts[1:]):
        if count == 0:
            continue
        filled = -(-count // ROWS) * ROWS
        spans.append(Span(row, row, filled, branch))
        pieces += [order[begin : begin + count], order.new_full((filled - count,), -1)]
        begin, row = begin + count, row + filled
    slot_of = torch.cat(pieces) if pieces else order[:0]
    row_of = torch.full_like(flat, -1)
    held = slot_of >= 0
    row_of[slot_of[held]] = held.nonzero()[:, 0]
    return BranchPlan(branches, gates, places, used, spans, slot_of, row_of.view(B * T, A))


def move_rows(x: Tensor, source: Tensor, targets: Tensor) -> Tensor:
    """Rows ``x[source]``, and 0 where ``source`` is -1.

    Args:
        x: ``[R, E]``.
        source: int64 ``[n]``.
        targets: int64 ``[R, A]``, the rows of the result that row r goes to, or -1.
    """
    return apply(_MoveRows, x, source, targets)


def sum_rows(x: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    """Sums of rows ``x[targets[r, 0]] + x[targets[r, 1]] + ...``, without those at -1.

    Args:
        x: ``[n, E]``.
        sources: int64 ``[n]``, the sum that row i goes to, or -1.
        targets: int64 ``[R, A]``.
    """
    return apply(_SumRows, x, sources, targets)


def _take(x: Tensor, source: Tensor) -> Tensor:
    if not len(x):
        return x.new_zeros(len(source), x.shape[1])
    taken = x.index_select(0, source.clamp(min=0))
    missing = source < 0
    return taken.masked_fill_(missing[:, None], 0.0) if bool(missing.any()) else taken


class _MoveRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(source, targets)
        return _take(x, source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return apply(_SumRows, grads[0], *ctx.saved_tensors), None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(sources, targets)
        total = _take(x, targets[:, 0])
        for a in range(1, targets.shape[1]):
            total += _take(x, targets[:, a])
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return apply(_MoveRows, grads[0], *ctx.saved_tensors), None, None


def _products(
    rows: Tensor,
    spans: Sequence[Span],
    n: int,
    weights: Mapping[int, AttentionWeights],
    name: str,
    factors: Tensor | None = None,
) -> Tensor:
    """Rows ``[n, d_out]``: one product for each span, 0 in all other rows.

    Args:
        rows: ``[R, d_in]``.
        spans: The rows of each branch.
        n: Rows of the result.
        weights: Weights of each branch.
        name: Name of the weight.
        factors: ``[n, 1]``, factors of the biases.
    """
    branches = sorted({span.branch for span in spans})
    at = {branch: i for i, branch in enumerate(branches)}
    spans = [span._replace(branch=at[span.branch]) for span in spans]
    if not branches:
        return rows.new_zeros(n, getattr(next(iter(weights.values())), name).shape[0])
    own = [weights[branch] for branch in branches]
    weight = [autocast(getattr(w, name)) for w in own]
    bias = [autocast(getattr(w, f"{name}_bias")) for w in own]
    bias = [] if bias[0] is None else bias
    return apply(_Products, autocast(rows), factors, spans, n, *weight, *bias)


class _Products(torch.autograd.Function):
    """Products written in place into the result, without copies of weights or results."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, factors: Tensor | None, spans: list[Span], n: int, *given: Tensor
    ) -> Tensor:
        count = 1 + max(span.branch for span in spans)
        weights, biases = given[:count], given[count:]
        out = x.new_empty(n, weights[0].shape[0])
        end = 0
        for source, target, size, branch in spans:
            out[end:target] = 0.0
            end = target + size
            to, taken = out[target:end], x[source : source + size]
            if not biases:
                torch.mm(taken, weights[branch].t(), out=to)
            elif factors is None:
                torch.addmm(biases[branch], taken, weights[branch].t(), out=to)
            else:
                to.copy_(factors[target:end] * biases[branch])
                to.addmm_(taken, weights[branch].t())
        out[end:] = 0.0
        ctx.save_for_backward(x, factors, *given)
        ctx.spans, ctx.count = spans, count
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, factors, *given = ctx.saved_tensors
        weights, biases = given[: ctx.count], given[ctx.count :]
        wants = ctx.needs_input_grad
        d_x = torch.zeros_like(x) if wants[0] else None
        d_factors = torch.zeros_like(factors) if factors is not None and wants[1] else None
        # sums over samples in float32 or wider
        wide = torch.promote_types(x.dtype, torch.float32)
        found: list[Tensor | None] = [None] * len(given)

        def add(i: int, gradient: Tensor) -> None:
            before = found[i]
            found[i] = gradient if before is None else before.add_(gradient)

        for source, target, size, branch in ctx.spans:
            d_out, taken = grads[0][target : target + size], x[source : source + size]
            if d_x is not None:
                d_x[source : source + size].addmm_(d_out, weights[branch])
            if wants[4 + branch]:
                add(branch, (d_out.t() @ taken).to(wide))
            if not biases:
                continue
            i = ctx.count + branch
            if d_factors is not None:
                d_factors[target : target + size] = (d_out @ biases[branch])[:, None]
            if wants[4 + i]:
                by_row = d_out if factors is None else d_out * factors[target : target + size]
                add(i, by_row.sum(0, dtype=wide))
        gradients = [
            None if gradient is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(found, given, strict=True)
        ]
        return d_x, d_factors, None, None, *gradients
