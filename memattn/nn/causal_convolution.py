"""Causal depthwise convolution, and the tokens of a call that exist."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.ops._dispatch import has_cpp_kernel, untaken_transform


class CausalConvolution(nn.Module):
    """A depthwise filter over a token and the tokens before it.

    Args:
        num_features: Features, ``F``.
        size: Tokens that a filter sees.
    """

    def __init__(self, num_features: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.empty(num_features, size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New filters, drawn like those of ``torch.nn.Conv1d``."""
        bound = self.size**-0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, inputs: Tensor, T: int, positions: Tensor | None = None) -> Tensor:
        """Filter the last ``T`` of ``inputs [B, S, F]``, where ``S`` is at least ``T + size - 1``.

        ``positions`` int64 ``[T]`` of packed documents: tokens before position 0 are not seen.
        """
        return causal_convolution(inputs, self.weight, T, positions)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, size={self.size}"


def causal_convolution(
    inputs: Tensor, weight: Tensor, T: int, positions: Tensor | None = None
) -> Tensor:
    """``CausalConvolution.forward`` with filters ``weight [F, size]``."""
    first = inputs.shape[1] - T
    out = inputs[:, first:] * weight[:, -1]
    for back in range(1, weight.shape[1]):
        seen = inputs[:, first - back : first - back + T] * weight[:, -1 - back]
        if positions is not None:
            seen = torch.where((positions >= back)[:, None], seen, 0.0)
        out = out + seen
    return out


class PresentTokens(NamedTuple):
    """The existing tokens of a call; they are contiguous in each row."""

    present: Tensor  # bool [B, T]
    start: Tensor  # int64 [B]
    length: Tensor  # int64 [B]


def present_tokens(
    x: Tensor, seq_start: Tensor | None, seq_end: Tensor | None
) -> PresentTokens | None:
    """None if all tokens exist."""
    B, T, _ = x.shape
    if seq_start is None and seq_end is None:
        return None
    full = torch.zeros(B, dtype=torch.int64, device=x.device)
    start = full if seq_start is None else seq_start.long().clamp(0, T)
    end = full + T if seq_end is None else seq_end.long().clamp(0, T)
    column = torch.arange(T, device=x.device)
    present = (column >= start[:, None]) & (column < end[:, None])
    return PresentTokens(present, start, (end - start).clamp(min=0))


class FilterInputs(NamedTuple):
    """What a convolution over the tokens of a call reads, and what later calls need."""

    inputs: Tensor  # [B, S, F], the tokens of the call last
    after: Tensor | None  # [B, kept, F], the newest; of each document in packed rows
    positions: Tensor | None  # int64 [T], in packed rows


def continued_inputs(
    x: Tensor,
    past: Tensor | None,
    kept: int,
    bounds: PresentTokens | None = None,
    cu_seqlens: Tensor | None = None,
) -> FilterInputs:
    """Tokens ``[B, T, F]`` behind earlier ones, as a convolution reads them.

    Args:
        x: ``[B, T, F]``.
        past: ``[B, n, F]``, earlier inputs, the newest last; None if there are none.
        kept: Number of inputs to keep, at least one less than the convolution sees.
        bounds: The existing tokens; None means all. Missing tokens count as 0.
        cu_seqlens: int32 ``[n+1]``, bounds of packed documents, without a past.
    """
    B, T, width = x.shape
    if past is None:
        past = x.new_zeros(B, kept, width)
    past = past.to(x.dtype)[:, -kept:]
    past = F.pad(past, (0, 0, kept - past.shape[1], 0))
    positions = None
    if bounds is None:
        inputs = torch.cat([past, x], 1)
        after = inputs[:, T:]
    else:
        # earlier inputs come right before the first token of each row
        x = F.pad(torch.where(bounds.present[..., None], x, 0.0), (0, 0, kept, 0))
        column = torch.arange(kept, device=x.device)[:, None]

        def at(first: Tensor) -> Tensor:
            return (first[:, None, None] + column).expand(-1, -1, width)

        inputs = x.scatter(1, at(bounds.start), past)
        after = inputs.gather(1, at(bounds.start + bounds.length))
    if cu_seqlens is not None:
        token = torch.arange(T, device=x.device)
        document = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
        positions = token - cu_seqlens[document]
        ends = cu_seqlens[1:, None] + torch.arange(-kept, 0, device=x.device)
        own = ends >= cu_seqlens[:-1, None]
        after = torch.where(own[..., None], x[0, ends.clamp(min=0).long()], 0.0)
    return FilterInputs(inputs, after, positions)


def filtered_vectors(
    inputs: Tensor,
    weight: Tensor | None,
    T: int,
    positions: Tensor | None,
    *,
    num_unit: int,
    head_dim: int,
    backend: str,
) -> Tensor:
    """SiLU of the filtered last ``T`` tokens, as vectors ``[B, T, n, head_dim]``.

    Args:
        inputs: ``[B, S, F]``, with ``F = n * head_dim``.
        weight: Filters ``[F, size]``; None means no filter.
        T: Tokens to filter.
        positions: int64 ``[T]`` of packed documents: tokens before position 0 are not seen.
        num_unit: How many of the ``n`` vectors, the first ones, are divided by their length.
        head_dim: Features of a vector.
        backend: ``"auto"`` and ``"cpp"`` run one operator on float32 CPU tensors, which is
            differentiable once.
    """
    if _is_taken(inputs, backend):
        from memattn.cpp.token_filter import TokenFilterArgs, token_filter

        if weight is None:
            weight = inputs.new_ones(inputs.shape[-1], 1)
        taps = weight.flip(1).t().contiguous()
        args = TokenFilterArgs(
            inputs.contiguous(), taps, positions, T, num_unit * head_dim, head_dim
        )
        return torch.unflatten(token_filter(args), -1, (-1, head_dim))
    if weight is not None:
        inputs = causal_convolution(inputs, weight, T, positions)
    out = torch.unflatten(F.silu(inputs), -1, (-1, head_dim))
    return torch.cat([unit_vectors(out[:, :, :num_unit]), out[:, :, num_unit:]], 2)


def _is_taken(inputs: Tensor, backend: str) -> bool:
    """Whether the C++ operator takes the inputs."""
    return (
        backend in ("auto", "cpp")
        and inputs.is_cpu
        and inputs.dtype == torch.float32
        and has_cpp_kernel("token_filter")
        and untaken_transform() is None
    )


def unit_vectors(x: Tensor) -> Tensor:
    """Vectors normalised to length 1, in float32 or wider; zero vectors stay zero."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.normalize(wide, dim=-1).to(x.dtype)
