"""Loss of one row of queries: how far the future part of the output is from its target."""

import triton
import triton.language as tl

# the smallest norm of torch.nn.functional.cosine_similarity
MIN_NORM: tl.constexpr = tl.constexpr(1e-8)


@triton.jit
def _cosine(x, y):
    """Cosine of the rows of two tiles, their norms, and these with their limit."""
    x = x.to(tl.float32)
    y = y.to(tl.float32)
    norm_x = tl.sqrt_rn(tl.sum(x * x, 1))
    norm_y = tl.sqrt_rn(tl.sum(y * y, 1))
    limited_x = tl.maximum(norm_x, MIN_NORM)
    limited_y = tl.maximum(norm_y, MIN_NORM)
    return tl.sum(x * y, 1) / limited_x / limited_y, norm_x, norm_y, limited_x, limited_y


@triton.jit
def row_loss(out_future, target, DV: tl.constexpr, IS_COSINE: tl.constexpr):
    """Loss of each row, for tiles that are 0 past DV."""
    if IS_COSINE:
        cosine, _, _, _, _ = _cosine(out_future, target)
        return 0.5 - 0.5 * cosine
    else:
        difference = out_future.to(tl.float32) - target.to(tl.float32)
        return tl.sum(difference * difference, 1) / DV


@triton.jit
def row_loss_gradient(out_future, target, weight, DV: tl.constexpr, IS_COSINE: tl.constexpr):
    """Factors ``own, other, own_target``, one for each row; ``weight`` is what the row counts.

    The gradient for ``out_future`` is ``own * out_future + other * target``, that for ``target`` is
    ``own_target * target + other * out_future``.
    """
    if IS_COSINE:
        cosine, norm_out, norm_target, limited_out, limited_target = _cosine(out_future, target)
        weight = -0.5 * weight
        other = weight / limited_out / limited_target
        # as in PyTorch the limit of a norm is a constant, and a norm of 0 has gradient 0
        own = tl.where(norm_out > 0.0, -weight * cosine / limited_out / norm_out, 0.0)
        own_target = -weight * cosine / limited_target / norm_target
        own_target = tl.where(norm_target > 0.0, own_target, 0.0)
    else:
        own = weight * (2.0 / DV)
        other = -own
        own_target = own
    return own, other, own_target
