"""What the router makes of a row of logits: its largest, its softmax, and its gradient.

One program has all chapters of a row in registers, row after row, and adds up what its rows give
each chapter; those sums are then added in a fixed order.
"""

import triton
import triton.language as tl

NO_KEY: tl.constexpr = tl.constexpr(-(2**31))  # below that of minus infinity
NO_CHAPTER: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def _ordered(z):
    """Integers in the order of floats, where -0 is 0 and NaN is minus infinity."""
    z = tl.where(z != z, -float("inf"), tl.where(z == 0.0, 0.0, z))
    bits = z.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit(do_not_specialize=("first", "n_rows", "n_shared", "top_k"))
def chapter_router_select_kernel(
    z_ptr, valid_ptr,  # float32 [n_rows, C]; valid may be None
    indices_ptr, weights_ptr,  # [rows, n_shared + top_k]
    lse_ptr, residual_ptr, entropy_ptr,  # float32 [rows], the first two add up to the logarithm
    sums_ptr,  # float32 [programs, C], probabilities
    first, n_rows, C, n_shared, top_k, routed_scale,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(n_rows, ROWS),). One program takes ROWS rows; BLOCK_K >= n_shared + top_k."""
    pid = tl.program_id(0).to(tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    offs_k = tl.arange(0, BLOCK_K)
    mask_c = offs_c < C
    mask_k = offs_k < n_shared + top_k
    sums = tl.zeros([BLOCK_C], dtype=tl.float32)
    for r in range(ROWS):
        row = pid * ROWS + r
        if row < n_rows:
            z_row = z_ptr + row * C
            row += first
            is_valid = tl.full([], 1, tl.int1)
            if valid_ptr is not None:
                is_valid = tl.load(valid_ptr + row) != 0
            z = tl.load(z_row + offs_c, mask=mask_c, other=-float("inf"))
            keys = tl.where(mask_c, _ordered(z), NO_KEY)

            # the shared chapters, then the largest one by one; equal ones by rising chapter
            chosen = offs_k
            for j in range(n_shared, n_shared + top_k):
                largest = tl.max(keys, 0)
                c = tl.min(tl.where(keys == largest, offs_c, NO_CHAPTER), 0)
                keys = tl.where(offs_c == c, NO_KEY, keys)
                chosen = tl.where(offs_k == j, c + n_shared, chosen)

            maximum = tl.max(tl.where(z == z, z, -float("inf")), 0)
            d = z - maximum
            e = tl.where(mask_c, tl.exp(d), 0.0)
            total = tl.sum(e, 0)
            # finite, so that what has no probability has no part in the entropy
            d = tl.where(d < -200.0, -200.0, d)
            expected = tl.sum(tl.where(mask_c, e * d, 0.0), 0) / total
            log_total = tl.log(total)
            # exact: the error of a sum of two floats is a float
            lse = maximum + log_total
            part = lse - log_total
            residual = (maximum - part) + (log_total - (lse - part))
            tl.store(lse_ptr + row, tl.where(is_valid, lse, 0.0))
            tl.store(residual_ptr + row, tl.where(is_valid, residual, 0.0))
            tl.store(entropy_ptr + row, tl.where(is_valid, log_total - expected, 0.0))
            sums += tl.where(is_valid, e * (1.0 / total), 0.0)

            is_routed = mask_k & (offs_k >= n_shared)
            logits = tl.load(z_row + (chosen - n_shared), mask=is_routed, other=-float("inf"))
            e_k = tl.where(is_routed, tl.exp(logits - maximum), 0.0)
            weights = tl.where(is_routed, e_k * (routed_scale / tl.sum(e_k, 0)), 1.0)
            at = row * (n_shared + top_k) + offs_k
            tl.store(indices_ptr + at, tl.where(is_valid, chosen, -1), mask=mask_k)
            tl.store(weights_ptr + at, tl.where(is_valid, weights, 0.0), mask=mask_k)
    tl.store(sums_ptr + pid * C + offs_c, sums, mask=mask_c)


@triton.jit(do_not_specialize=("first", "n_rows", "n_shared", "top_k"))
def chapter_router_gradient_kernel(
    z_ptr, valid_ptr, indices_ptr, d_weights_ptr,  # valid and d_weights may be None
    lse_ptr, residual_ptr, gamma_ptr, z_factor_ptr,  # gamma: [C], see memattn.ops.chapter_router
    first, n_rows, C, n_shared, top_k, routed_scale, scale,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: (n_rows,). Turns the logits of a row into their gradient, over the temperature."""
    row = tl.program_id(0).to(tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    z_row = z_ptr + row * C
    row += first
    is_valid = tl.full([], 1, tl.int1)
    if valid_ptr is not None:
        is_valid = tl.load(valid_ptr + row) != 0
    lse = tl.load(lse_ptr + row)
    residual = tl.load(residual_ptr + row)
    z = tl.load(z_row + offs_c, mask=mask_c, other=-float("inf"))
    gamma = tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0)
    p = tl.exp((z - lse) - residual)
    shift = lse * tl.load(z_factor_ptr) - tl.sum(tl.where(mask_c, p * gamma, 0.0), 0)
    dz = tl.where(is_valid, p * (gamma + shift) * scale, 0.0)
    if d_weights_ptr is not None:
        offs_k = tl.arange(0, BLOCK_K)
        mask_k = (offs_k < top_k) & is_valid
        at = row * (n_shared + top_k) + n_shared + offs_k
        chosen = tl.load(indices_ptr + at, mask=mask_k, other=n_shared) - n_shared
        d_weights = tl.load(d_weights_ptr + at, mask=mask_k, other=0.0)
        logits = tl.load(z_row + chosen, mask=mask_k, other=-float("inf"))
        p_k = tl.where(mask_k, tl.exp((logits - lse) - residual), 0.0)
        total = tl.sum(p_k, 0)
        mean = tl.sum(p_k * d_weights, 0) / total
        own = p_k / total * (d_weights - mean) * (routed_scale * scale)
        tl.debug_barrier()  # all have read the logits
        tl.store(z_row + offs_c, dz, mask=mask_c)
        tl.debug_barrier()  # other threads of this program wrote what is read now
        dense = tl.load(z_row + chosen, mask=mask_k, other=0.0)
        tl.debug_barrier()
        tl.store(z_row + chosen, dense + own, mask=mask_k)
    else:
        tl.store(z_row + offs_c, dz, mask=mask_c)
