"""Loss of one row of queries: how far the future part of the output is from its target."""

import triton
import triton.language as tl

# the smallest norm of torch.nn.functional.cosine_similarity
MIN_NORM: tl.constexpr = tl.constexpr(1e-8)


@triton.jit
def _unit(x):
    """Rows of ``x`` over their norm, which is at least MIN_NORM, and these norms."""
    norm = tl.sqrt_rn(tl.sum(x * x, 1))
    return x / tl.maximum(norm, MIN_NORM)[:, None], norm


@triton.jit
def row_loss(out_future, target, DV: tl.constexpr, IS_COSINE: tl.constexpr):
    """Loss of each row, for float32 tiles that are 0 past DV."""
    if IS_COSINE:
        unit_out, _ = _unit(out_future)
        unit_target, _ = _unit(target)
        return 0.5 - 0.5 * tl.sum(unit_out * unit_target, 1)
    else:
        difference = out_future - target
        return tl.sum(difference * difference, 1) / DV


@triton.jit
def _cosine_gradient(unit, norm, other, cosine):
    """Gradient of ``cosine`` for the vector that has this unit and norm.

    As in PyTorch the limit of the norm counts as a constant, and a norm of 0 has gradient 0.
    """
    limited = tl.maximum(norm, MIN_NORM)
    # the unit of a vector below the limit is shorter than 1, its direction is not
    direction = unit * tl.where(norm > 0.0, limited / tl.maximum(norm, 1e-37), 0.0)[:, None]
    return (other - cosine[:, None] * direction) / limited[:, None]


@triton.jit
def row_loss_gradient(out_future, target, weight, DV: tl.constexpr, IS_COSINE: tl.constexpr):
    """Gradients for ``out_future`` and ``target``; ``weight`` is what a row counts, or 0."""
    if IS_COSINE:
        unit_out, norm_out = _unit(out_future)
        unit_target, norm_target = _unit(target)
        cosine = tl.sum(unit_out * unit_target, 1)
        weight = -0.5 * weight
        d_out = _cosine_gradient(unit_out, norm_out, unit_target, cosine) * weight[:, None]
        d_target = _cosine_gradient(unit_target, norm_target, unit_out, cosine) * weight[:, None]
    else:
        d_out = (out_future - target) * (weight * 2.0 / DV)[:, None]
        d_target = -d_out
    return d_out, d_target
