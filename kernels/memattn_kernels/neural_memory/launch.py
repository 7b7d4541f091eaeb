"""Launches of the kernels of the neural memory."""

from typing import Any

import torch
import triton
from torch import Tensor

from memattn_kernels import configs
from memattn_kernels._common import IS_INTERPRETED, block_width, rows
from memattn_kernels._launch import run
from memattn_kernels.neural_memory.backward import neural_memory_bwd_kernel
from memattn_kernels.neural_memory.forward import (
    FORWARD_SECTIONS,
    neural_memory_fwd_kernel,
    scratch_floats,
)
from memattn_kernels.neural_memory.tiles import BACKWARD_SECTIONS
from memattn_kernels.signatures import NeuralMemoryArgs

# bytes of scratch of all programs of a launch; heads beyond wait for another one
SCRATCH_BYTES = 1 << 30
# half inputs, too, have weights and sums in float32: their products are six of bfloat16 parts
PRECISIONS = {"half": "bf16x6", "float": "ieee"}


def memory_sizes(args: NeuralMemoryArgs) -> list[int]:
    """``d_0 ... d_N``."""
    hidden = (args.width_1, args.width_2, args.width_3)[: args.depth - 1]
    return [args.query.shape[-1], *hidden, args.value.shape[-1]]


def memory_size(args: NeuralMemoryArgs) -> int:
    """Numbers of the weights of a head."""
    sizes = memory_sizes(args)
    return sum(m * n for m, n in zip(sizes, sizes[1:], strict=False))


def n_rows(args: NeuralMemoryArgs) -> int:
    """Sequences or documents."""
    given = (args.row_start, args.count)
    return next((len(x) for x in given if x is not None), args.query.shape[0])


def checkpoint_slots(args: NeuralMemoryArgs) -> tuple[int, int]:
    """Chunks between two checkpoints, so that no more is saved than the inputs are; how many."""
    (_, _, T, D), Dv = args.query.shape, args.value.shape[-1]
    group = -(-2 * memory_size(args) // (args.chunk_size * (2 * D + Dv)))
    slots = (T - 1) // (group * args.chunk_size) + (args.count is not None) if T else 0
    return group, slots


def _inputs(args: NeuralMemoryArgs, direction: str) -> dict[str, Any]:
    """Arguments that both kernels have, by name."""
    B, H, T, _ = args.query.shape
    kind, sizes = configs.dtype_class(args.query.dtype), memory_sizes(args)
    widths = [*sizes, *[0] * (5 - len(sizes))]
    contiguous = lambda x: None if x is None else x.contiguous()
    gates = {"lr": args.lr, "eta": args.momentum, "decay": args.decay}
    strides = {
        f"stride_{name}{axis}": 0 if gate is None else stride
        for name, gate in gates.items()
        for axis, stride in zip("bht", (0, 0, 0) if gate is None else gate.stride(), strict=True)
    }
    clamp = 0 if args.max_norm is None else 2 if args.clamp_soft else 1
    group, slots = checkpoint_slots(args)
    start_w = args.start_weights.contiguous()
    width = min(sizes[0], max(configs.WIDTHS))  # tiles do not depend on it
    return dict(
        **rows("q", args.query, "bht"),
        **rows("k", args.key, "bht"),
        **rows("v", args.value, "bht"),
        **{f"{name}_ptr": gate for name, gate in gates.items()},
        **strides,
        start_w_ptr=start_w,
        start_s_ptr=None if args.momentum is None else contiguous(args.start_momentum),
        pending_h_ptr=contiguous(args.pending_h),
        pending_delta_ptr=contiguous(args.pending_delta),
        pending_decay_ptr=contiguous(args.pending_decay),
        pending_eta_ptr=contiguous(args.pending_momentum),
        count_ptr=contiguous(args.count),
        row_start_ptr=contiguous(args.row_start),
        row_end_ptr=contiguous(args.row_end),
        stride_startr=0 if len(start_w) == 1 else start_w.stride(0),
        n_heads=H,
        T=T,
        group=group,
        n_slots=slots,
        chunk=args.chunk_size,
        all_inputs=sum(sizes[:-1]),
        all_outputs=sum(sizes[1:]),
        depth=args.depth,
        **{f"width_{n}": size for n, size in enumerate(widths)},
        huber_delta=args.huber_delta,
        max_norm=args.max_norm or 0.0,
        IS_BATCH=n_rows(args) == B,
        READ_CHUNK=args.read_chunk,
        IS_SILU=args.is_silu,
        RESIDUAL=args.residual,
        IS_HUBER=args.is_huber,
        CLAMP=clamp,
        SKIP=args.skip_nonfinite,
        HAS_MOMENTUM=args.momentum is not None,
        BLOCK_C=block_width(args.chunk_size),
        PRECISION="ieee" if IS_INTERPRETED else PRECISIONS[kind],
        **configs.lookup(f"neural_memory_{direction}", args.query, width),
    )


def _launch(
    kernel: triton.JITFunction, args: NeuralMemoryArgs, floats: int, given: dict[str, Any]
) -> None:
    """One program for each head of each row, as many at a time as there is scratch for."""
    n, H = n_rows(args) * args.query.shape[1], args.query.shape[1]
    step = max(min(SCRATCH_BYTES // (4 * max(floats, 1)), n), 1)
    scratch = args.lr.new_empty(step * floats)
    item = torch.arange(n, dtype=torch.int32, device=args.query.device)
    places = torch.stack([item // H, item % H], 1) if n else item
    given |= dict(scratch_ptr=scratch, program_floats=floats, place_ptr=places)
    with torch.cuda.device_of(args.query):
        for first in range(0, n, step):
            run(kernel, (min(step, n - first),), given | {"first": first})


def launch_forward(args: NeuralMemoryArgs, results: dict[str, Tensor]) -> None:
    """Fill the results."""
    (_, H, T, _), R, size = args.query.shape, n_rows(args), memory_size(args)
    wide = lambda *shape: args.lr.new_empty(shape)
    if args.row_start is not None:  # tokens of no row
        results["out"].zero_()
        results["surprise"].zero_()
    if args.row_start is not None or args.count is not None:  # rows leave some of it alone
        results["checkpoints"].zero_()
    pending = [f"end_pending_{name}" for name in ("h", "delta", "decay", "momentum")]
    if args.return_state:
        for name in pending:
            results[name].zero_()
    end_h, end_delta, end_decay, end_eta = (
        results[name] if args.return_state else None for name in pending
    )
    w = results["end_weights"] if args.return_state else wide(R, H, size)
    s = None
    if args.momentum is not None:
        s = results["end_momentum"] if args.return_state else wide(R, H, size)
    skipped = args.lr.new_zeros(R * H, dtype=torch.int32)
    given = _inputs(args, "fwd") | rows("o", results["out"], "bht")
    given |= dict(
        surprise_ptr=results["surprise"],
        w_ptr=w,
        s_ptr=s,
        end_h_ptr=end_h,
        end_delta_ptr=end_delta,
        end_decay_ptr=end_decay,
        end_eta_ptr=end_eta,
        skipped_ptr=skipped,
        checkpoints_ptr=results["checkpoints"],
    )
    sizes = memory_sizes(args)
    _launch(
        neural_memory_fwd_kernel,
        args,
        scratch_floats(args.chunk_size, sizes, FORWARD_SECTIONS),
        given,
    )
    if not args.return_state:
        return
    total = torch.full_like(results["end_count"], T)
    if args.row_start is not None and args.row_end is not None:
        total = (args.row_end - args.row_start).clamp(min=0)
    if args.count is not None:
        total = total + args.count
    results["end_count"].copy_(total % args.chunk_size)
    results["end_skipped"].copy_(skipped.view(R, H).sum(1))
    if args.skipped is not None:
        results["end_skipped"] += args.skipped


def launch_backward(
    args: NeuralMemoryArgs,
    cotangents: dict[str, Tensor | None],
    saved: dict[str, Tensor],
    grads: dict[str, Tensor],
) -> None:
    """Fill the gradients."""
    R, H, size, sizes = n_rows(args), args.query.shape[1], memory_size(args), memory_sizes(args)
    wide = lambda *shape: args.lr.new_empty(shape)
    has_momentum = args.momentum is not None

    def cotangent(name: str) -> Tensor | None:
        given = cotangents[name]
        return None if given is None or not given.numel() else given.contiguous()

    filled = ["pending_h", "pending_delta", "pending_decay", "pending_momentum"]
    if args.row_start is not None:
        filled += ["query", "key", "value", "lr", "momentum", "decay"]
    if not has_momentum:
        filled += ["start_momentum"]
    for name in filled:
        grads[name].zero_()
    if cotangents["out"] is None:
        grads["query"].zero_()
    is_shared = len(args.start_weights) != R
    d_w = wide(R, H, size) if is_shared else grads["start_weights"]
    d_s = None
    if has_momentum:
        d_s = wide(R, H, size) if args.start_momentum is None else grads["start_momentum"]
    has_count = args.count is not None
    d_end_w, d_end_s = cotangent("end_weights"), cotangent("end_momentum")
    given = _inputs(args, "bwd")
    given |= rows("do", cotangents["out"], "bht")
    for name, grad in (("dq", "query"), ("dk", "key"), ("dv", "value")):
        given |= rows(name, grads[grad], "bht")
    given |= dict(
        d_end_w_ptr=d_end_w,
        d_end_s_ptr=d_end_s if has_momentum else None,
        d_end_h_ptr=cotangent("end_pending_h"),
        d_end_delta_ptr=cotangent("end_pending_delta"),
        d_end_decay_ptr=cotangent("end_pending_decay"),
        d_end_eta_ptr=cotangent("end_pending_momentum") if has_momentum else None,
        d_lr_ptr=grads["lr"],
        d_eta_ptr=grads["momentum"] if has_momentum else None,
        d_decay_ptr=None if args.decay is None else grads["decay"],
        d_w_ptr=d_w,
        d_s_ptr=d_s,
        d_pending_h_ptr=grads["pending_h"] if has_count else None,
        d_pending_delta_ptr=grads["pending_delta"] if has_count else None,
        d_pending_decay_ptr=grads["pending_decay"] if has_count else None,
        d_pending_eta_ptr=grads["pending_momentum"] if has_count else None,
        checkpoints_ptr=saved["checkpoints"],
        HAS_END=d_end_w is not None or d_end_s is not None,
    )
    states = given["group"] * size * (2 if has_momentum else 1)
    floats = scratch_floats(args.chunk_size, sizes, BACKWARD_SECTIONS)
    given["states_at"] = floats
    _launch(neural_memory_bwd_kernel, args, -(-(floats + states) // 32) * 32, given)
    if is_shared:
        torch.sum(d_w, 0, keepdim=True, out=grads["start_weights"])
