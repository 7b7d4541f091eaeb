"""Launches of the router's kernels: rows in chunks, so that no more than a chunk's logits exist."""

from typing import Any

import torch
from torch import Tensor

from memattn_kernels import configs
from memattn_kernels._common import IS_INTERPRETED, block_width, cdiv, rows_ready
from memattn_kernels._launch import run
from memattn_kernels.chapter_router.products import (
    chapter_router_d_hidden_kernel,
    chapter_router_d_weight_kernel,
    chapter_router_logits_kernel,
)
from memattn_kernels.chapter_router.rows import (
    chapter_router_gradient_kernel,
    chapter_router_select_kernel,
)
from memattn_kernels.signatures import ChapterRouterArgs

# logits of a chunk of rows, float32: at most 64 MiB
CHUNK_LOGITS = 1 << 24
# a row of logits is in the registers of one program
MAX_CHAPTERS = 32768
# rows of a program that selects, each program has sums over chapters
SELECT_ROWS = 4
# the gradient of the weights takes about this many programs, each of at least so many rows
N_PROGRAMS = 256
MIN_ROWS = 1024


def row_warps(n_chapters: int) -> int:
    """Warps that share a row: at most 16 chapters a thread, 64 beyond 8192 chapters."""
    return min(max(block_width(n_chapters) // 512, 4), 16)


def _tiles(product: str, args: ChapterRouterArgs) -> dict[str, int]:
    """The tiles of a product, whatever the number of rows: a logit must not depend on it."""
    wider = max(args.hidden, args.weight, key=lambda tensor: tensor.element_size())
    width = min(block_width(args.weight.shape[1]), configs.WIDTHS[-1])
    return configs.lookup(f"chapter_router_{product}", wider, width)


def _precision(hidden: Tensor, weight: Tensor) -> str:
    """How a float32 gradient meets hidden states or weights.

    bfloat16 has its range, float16 has not: there TF32 holds the other factor exactly.
    """
    if torch.float32 in (hidden.dtype, weight.dtype):
        return "ieee"
    return "half" if hidden.dtype == torch.bfloat16 else "tf32"


class _Chunks:
    """The rows of a call, chunk by chunk, and their logits."""

    def __init__(self, args: ChapterRouterArgs) -> None:
        B, N, E = args.hidden.shape
        self.args, self.n_rows, self.n_chapters, self.width = args, B * N, args.weight.shape[0], E
        # E = 0: no stride is ever used
        self.hidden = rows_ready(args.hidden.reshape(self.n_rows, E)) if E else args.hidden
        self.weight = rows_ready(args.weight) if E else args.weight
        self.bias = None if args.bias is None else args.bias.contiguous()
        valid = None if args.valid is None else args.valid.reshape(-1).contiguous()
        self.valid = None if valid is None else valid.view(torch.uint8)
        most = max(CHUNK_LOGITS // self.n_chapters // SELECT_ROWS * SELECT_ROWS, SELECT_ROWS)
        self.step = max(min(most, self.n_rows), 1)
        self.logits = args.hidden.new_empty(
            self.step if self.n_rows else 0, self.n_chapters, dtype=torch.float32
        )
        self.scale = 1.0 / args.temperature

    def __iter__(self):
        """First row and number of rows of each chunk, its logits computed."""
        tiles = _tiles("logits", self.args)
        for first in range(0, self.n_rows, self.step):
            n_rows = min(self.step, self.n_rows - first)
            grid = cdiv(n_rows, tiles["BLOCK_M"])
            grid *= cdiv(self.n_chapters, tiles["BLOCK_N"])
            given = dict(
                x_ptr=self.hidden,
                w_ptr=self.weight,
                bias_ptr=self.bias,
                valid_ptr=self.valid,
                z_ptr=self.logits,
                stride_xr=self.hidden.stride(0),
                stride_wc=self.weight.stride(0),
                first=first,
                n_rows=n_rows,
                C=self.n_chapters,
                E=self.width,
                scale=self.scale,
                **tiles,
            )
            run(chapter_router_logits_kernel, (grid,), given)
            yield first, n_rows

    def row_options(self) -> dict[str, Any]:
        """What the kernels of whole rows have in common."""
        args = self.args
        return dict(
            z_ptr=self.logits,
            valid_ptr=self.valid,
            C=self.n_chapters,
            n_shared=args.num_shared,
            top_k=args.top_k,
            routed_scale=args.routed_scale,
            BLOCK_C=block_width(self.n_chapters),
            BLOCK_K=block_width(args.num_shared + args.top_k),
            num_warps=1 if IS_INTERPRETED else row_warps(self.n_chapters),
        )


def launch_forward(args: ChapterRouterArgs, results: dict[str, Tensor]) -> None:
    """Fill the results."""
    chunks = _Chunks(args)
    count = args.hidden.new_full((), chunks.n_rows, dtype=torch.float32)
    if chunks.valid is not None:
        count = chunks.valid.sum(dtype=torch.int64).float()
    importance = torch.zeros_like(results["importance"])
    lse, residual = results["lse"].view(2, -1)
    entropy = torch.empty_like(lse)
    with torch.cuda.device_of(args.hidden):
        for first, n_rows in chunks:
            n_programs = cdiv(n_rows, SELECT_ROWS)
            sums = importance.new_empty(n_programs, chunks.n_chapters)
            given = dict(
                indices_ptr=results["indices"],
                weights_ptr=results["weights"],
                lse_ptr=lse,
                residual_ptr=residual,
                entropy_ptr=entropy,
                sums_ptr=sums,
                first=first,
                n_rows=n_rows,
                ROWS=SELECT_ROWS,
                **chunks.row_options(),
            )
            run(chapter_router_select_kernel, (n_programs,), given)
            importance += sums.sum(0)
    n = count.clamp(min=1.0)
    n_routed = chunks.n_chapters
    importance /= n
    # integers, whose sums have no order; rows that are not valid count in a place after the last
    chosen = results["indices"][..., args.num_shared :].reshape(-1).long() - args.num_shared
    chosen = torch.where(chosen < 0, n_routed, chosen)
    counts = chosen.new_zeros(n_routed + 1).scatter_add_(0, chosen, torch.ones_like(chosen))
    load = counts[:-1].float() / n
    factor = n_routed / args.top_k if args.is_mean else n_routed
    squares = (importance - 1 / n_routed).square().sum() * (count > 0)
    values = dict(
        importance=importance,
        load=load,
        count=count,
        load_balance_loss=factor * (load * importance).sum(),
        auxiliary_loss=n_routed * squares,
        z_loss=lse.square().sum() / n,
        entropy=entropy.sum() / n,
    )
    for name, value in values.items():
        results[name].copy_(value)


def launch_backward(
    args: ChapterRouterArgs,
    cotangents: dict[str, Tensor | None],
    saved: dict[str, Tensor],
    grads: dict[str, Tensor],
) -> None:
    """Fill the gradients."""
    chunks = _Chunks(args)
    hidden, weight, E, n_routed = chunks.hidden, chunks.weight, chunks.width, chunks.n_chapters
    n = saved["count"].clamp(min=1.0)
    balance, auxiliary, z = (
        torch.zeros_like(n) if cotangents[name] is None else cotangents[name]
        for name in ("load_balance_loss", "auxiliary_loss", "z_loss")
    )
    factor = n_routed / args.top_k if args.is_mean else n_routed
    gamma = balance * factor / n * saved["load"]
    gamma += auxiliary * (2 * n_routed) / n * (saved["importance"] - 1 / n_routed)
    d_weights = cotangents["weights"]
    lse, residual = saved["lse"].view(2, -1)
    d_hidden = grads["hidden"].view(chunks.n_rows, E)
    grid = lambda n, tiles: cdiv(n, tiles["BLOCK_M"]) * cdiv(E, tiles["BLOCK_N"])
    row_tiles, weight_tiles = _tiles("d_hidden", args), _tiles("d_weight", args)

    n_programs = max(grid(n_routed, weight_tiles), 1)
    n_parts = min(cdiv(N_PROGRAMS, n_programs), cdiv(chunks.step, MIN_ROWS))
    rows_per_part = cdiv(chunks.step, n_parts)
    weight_sums = lse.new_empty(n_parts, n_routed, E)
    bias_sums = None if args.bias is None else lse.new_empty(n_parts, n_routed)
    if chunks.n_rows == 0 or E == 0:
        weight_sums.zero_()
    if bias_sums is not None and chunks.n_rows == 0:
        bias_sums.zero_()
    shared = dict(
        z_ptr=chunks.logits, C=n_routed, E=E, PRECISION=_precision(args.hidden, args.weight)
    )
    with torch.cuda.device_of(args.hidden):
        for first, n_rows in chunks:
            place = dict(first=first, n_rows=n_rows)
            given = dict(
                indices_ptr=saved["indices"],
                d_weights_ptr=None if d_weights is None else d_weights.contiguous(),
                lse_ptr=lse,
                residual_ptr=residual,
                gamma_ptr=gamma,
                z_factor_ptr=z * 2.0 / n,
                scale=chunks.scale,
                **place,
                **chunks.row_options(),
            )
            run(chapter_router_gradient_kernel, (n_rows,), given)
            if E:
                given = dict(
                    w_ptr=weight,
                    dx_ptr=d_hidden,
                    stride_wc=weight.stride(0),
                    stride_dxr=d_hidden.stride(0),
                    **place,
                    **shared,
                    **row_tiles,
                )
                run(chapter_router_d_hidden_kernel, (grid(n_rows, row_tiles),), given)
            # also without E: it adds up the gradient of the bias
            given = dict(
                x_ptr=hidden,
                valid_ptr=chunks.valid,
                dw_ptr=weight_sums,
                db_ptr=bias_sums,
                stride_xr=hidden.stride(0),
                rows_per_part=rows_per_part,
                ADD=first > 0,
                **place,
                **shared,
                **weight_tiles,
            )
            run(chapter_router_d_weight_kernel, (n_programs, n_parts), given)
    grads["weight"].copy_(weight_sums.sum(0))
    if bias_sums is not None:
        grads["bias"].copy_(bias_sums.sum(0))
