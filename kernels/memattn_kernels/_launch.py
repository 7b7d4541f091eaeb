"""What launchers of all operators share: registration, common arguments, launch by name."""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from memattn_kernels import configs
from memattn_kernels._common import (
    IS_INTERPRETED,
    block_length,
    block_width,
    cdiv,
    check_head_dim,
    empty_rows,
    rows,
)
from memattn_kernels._operator import Named, register
from memattn_kernels._products import launch_precision
from memattn_kernels._replay import on_launch

ROWS = ("query", "key", "value", "future_query")  # whose gradients keep their order in memory
# a part of the queries has at least this many, and there are parts for about this many programs
MIN_PART = 1024
N_PROGRAMS = 512


def register_triton(name: str, arguments: Any, **named: Any) -> Callable[..., tuple[Tensor, ...]]:
    """``register`` for the Triton operator of this name.

    What ``named`` does not say is that of an operator with the results of ``empty_results``.
    """
    usual: Named = dict(
        results="out lse residual",
        cotangents="out? lse?",
        saved="out lse residual",
        empty_results=empty_results,
        empty_gradient=empty_gradient,
    )
    return register(f"memattn_kernels::{name}", arguments, **usual | named)


def call(operator: Callable[..., tuple[Tensor, ...]], args: Any) -> tuple[Tensor, ...]:
    """The operator, in float32 for bfloat16 that is interpreted.

    Raises:
        NotImplementedError: If a head dimension is above 256.
    """
    check_head_dim("query", args.query.shape[-1])
    check_head_dim("value", args.value.shape[-1])
    if args.query.dtype == torch.bfloat16 and IS_INTERPRETED:
        # the interpreter computes bfloat16 wrongly
        tensors = {n: value for n, value in args._asdict().items() if isinstance(value, Tensor)}
        args = args._replace(**{n: t.float() for n, t in tensors.items() if t.is_floating_point()})
    return operator(*args)


def common_inputs(args: Any) -> dict:
    """Arguments that the kernels of every operator have, by name."""
    query, key, value = args.query, args.key, args.value
    return dict(
        **rows("q", query, "bht"),
        **rows("k", key, "bht"),
        **rows("v", value, "bht"),
        seq_start_ptr=None if args.seq_start is None else args.seq_start.contiguous(),
        seq_end_ptr=None if args.seq_end is None else args.seq_end.contiguous(),
        H=query.shape[1],
        G=query.shape[1] // max(key.shape[1], 1),
        T=query.shape[2],
        S=key.shape[2],
        scale=args.scale,
        D=query.shape[-1],
        DV=value.shape[-1],
        BLOCK_D=block_width(query.shape[-1]),
        BLOCK_DV=block_width(value.shape[-1]),
    )


def forward_outputs(results: Named) -> dict:
    """``out``, ``lse`` and, for float32 inputs, what float32 rounds off ``lse``, by name."""
    out = results["out"]
    return (
        rows("o", out, "bht") | residual_ptr(out, results["residual"]) | {"lse_ptr": results["lse"]}
    )


def key_rows(key: Tensor, value: Tensor, d_key: Tensor, d_value: Tensor) -> dict:
    """The keys and values ``[B, Hkv, rows, D]`` of one source and their gradients, by name."""
    named = {"k": key, "v": value, "dk": d_key, "dv": d_value}
    return {k: v for name, tensor in named.items() for k, v in rows(name, tensor, "bht").items()}


def backward_inputs(args: Any, cotangents: Named, saved: Named, grads: Named) -> dict:
    """What the backward of every operator reads of its results, and writes for token keys."""
    out, lse = saved["out"], saved["lse"]
    d_out, d_lse = cotangents["out"], cotangents["lse"]
    # the key-stationary kernels read whole tiles of these
    scaled_lse, delta = (lse.new_empty(lse.numel() + configs.MAX_BLOCK) for _ in range(2))
    return forward_outputs(saved) | dict(
        **rows("do", torch.zeros_like(out) if d_out is None else d_out, "bht"),
        **rows("dq", grads["query"], "bht"),
        **key_rows(args.key, args.value, grads["key"], grads["value"]),
        dlse_ptr=None if d_lse is None else d_lse.contiguous(),
        scaled_lse_ptr=scaled_lse,
        delta_ptr=delta,
    )


def lookup(kernel: str, query: Tensor, inputs: dict) -> dict[str, int]:
    """The configuration of a kernel for the larger of the padded head dimensions."""
    return configs.lookup(kernel, query, max(inputs["BLOCK_D"], inputs["BLOCK_DV"]))


def launch(kernel: triton.JITFunction, n_programs: int, config: dict, *inputs: dict) -> None:
    """Launch the kernel with those of the inputs that it has, later ones first, and the config."""
    if not n_programs:
        return
    given: dict = {}
    for part in inputs:
        given |= part
    with torch.cuda.device_of(given["q_ptr"]):
        run(kernel, (n_programs,), given | config)


def run(kernel: triton.JITFunction, grid: tuple[int, ...], given: dict) -> None:
    """Launch the kernel on the current device.

    Args:
        kernel: What is launched.
        grid: Programs along each axis.
        given: The kernel's arguments and options of the launch, by name; it may hold more.
    """
    # by place, as binding some sixty names costs Triton a third of its time
    values = [given[name] for name in kernel.arg_names]
    options = {name: given[name] for name in configs.LAUNCH_OPTIONS if name in given}
    options |= launch_precision(given)
    on_launch(kernel, grid, kernel[grid](*values, **options), values)


def n_query_programs(query: Tensor, config: dict) -> int:
    """Programs of a query-stationary kernel: one for each tile of queries of a head."""
    B, H, T, _ = query.shape
    return cdiv(T, config["BLOCK_M"]) * B * H


def tiles_of_groups(counts: Tensor, block: int, n_tiles: int) -> tuple[Tensor, Tensor]:
    """Cut the rows of groups into tiles of ``block`` rows, of one group each.

    Args:
        counts: Rows of each group, int64 ``[K, C]``: K lists of C groups.
        block: Rows of a tile.
        n_tiles: As many tiles as a list may need.

    Returns:
        int32 ``[K, n_tiles]`` each: the group, C for tiles that are not needed, and its first row.
    """
    ends = F.pad(((counts + (block - 1)) // block).cumsum(1), (1, 0))  # [K, C + 1]
    tile = torch.arange(n_tiles, device=ends.device).expand(len(counts), n_tiles).contiguous()
    group = torch.searchsorted(ends[:, 1:].contiguous(), tile, right=True)
    first = (tile - ends.gather(1, group)) * block
    return group.int(), first.int()


def launch_queries(kernel: triton.JITFunction, name: str, inputs: dict, **lengths: int) -> None:
    """Launch a query-stationary kernel: one program for each tile of queries of a head.

    ``lengths`` are those of key sources that have a tile of their own, by its argument's name.
    """
    config = lookup(name, inputs["q_ptr"], inputs)
    tiles = {tile: block_length(config["BLOCK_N"], length) for tile, length in lengths.items()}
    launch(kernel, n_query_programs(inputs["q_ptr"], config), config | tiles, inputs)


def parts_of(n: int, n_programs: int, shortest: int | None = None) -> tuple[int, int]:
    """How many parts ``n`` queries are cut into, and of what length, where all see the same keys.

    The programs of the keys' tiles, ``n_programs``, alone would leave a card idle. A part has at
    least MIN_PART queries, or ``shortest`` if that is given; there is one part at least.
    """
    n_parts = min(cdiv(n, shortest or MIN_PART), cdiv(N_PROGRAMS, max(n_programs, 1)))
    length = cdiv(n, max(n_parts, 1))
    return max(cdiv(n, max(length, 1)), 1), length


def launch_keys(
    kernel: triton.JITFunction, name: str, inputs: dict, n_keys: int | None = None
) -> None:
    """Launch a key-stationary kernel: one program for each tile of token keys of a head.

    Of another source that is for each of ``inputs["n_parts"]`` parts, with ``n_keys`` keys and
    tiles no longer than that.
    """
    config = lookup(name, inputs["q_ptr"], inputs)
    B, Hkv, S, _ = inputs["k_ptr"].shape
    if n_keys is not None:
        config = config | {"BLOCK_N": block_length(config["BLOCK_N"], n_keys)}
    n_tiles = cdiv(S if n_keys is None else n_keys, config["BLOCK_N"])
    launch(kernel, n_tiles * inputs.get("n_parts", 1) * B * Hkv, config, inputs)


def empty_gradient(name: str, tensor: Tensor) -> Tensor:
    """The uninitialised gradient of an argument."""
    if name in ROWS:
        return empty_rows(tensor, tensor.shape[-1])
    return tensor.new_empty(tensor.shape)


def empty_numbers(query: Tensor, is_wanted: bool = True) -> Tensor:
    """An uninitialised float32 number for each row, ``[B, H, T]``, none if they are not wanted."""
    return query.new_empty(query.shape[:-1] if is_wanted else (0,), dtype=torch.float32)


def empty_results(args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised ``out``, ``lse`` and, for float32 inputs, what float32 rounds off ``lse``."""
    query = args.query
    residual = empty_numbers(query, query.dtype == torch.float32)
    return empty_rows(query, args.value.shape[-1]), empty_numbers(query), residual


def residual_ptr(query: Tensor, residual: Tensor) -> dict:
    """What float32 rounds off ``lse``, for float32 inputs only."""
    return {"residual_ptr": residual if query.dtype == torch.float32 else None}
