"""What launchers of all operators share: common arguments, configurations, launch by name."""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from memattn_kernels import configs
from memattn_kernels._common import (
    IS_INTERPRETED,
    block_width,
    check_head_dim,
    device_guard,
    empty_rows,
    rows,
)

ROWS = ("query", "key", "value", "future_query")  # whose gradients keep their order in memory


def call(operator: Callable[..., tuple[Tensor, ...]], args: Any) -> tuple[Tensor, ...]:
    """The operator, in float32 for bfloat16 that is interpreted.

    Raises:
        NotImplementedError: If a head dimension is above 256.
    """
    check_head_dim("query", args.query.shape[-1])
    check_head_dim("value", args.value.shape[-1])
    if args.query.dtype == torch.bfloat16 and IS_INTERPRETED:
        # the interpreter computes bfloat16 wrongly
        args = args._replace(
            **{
                name: value.float()
                for name, value in args._asdict().items()
                if isinstance(value, Tensor) and value.is_floating_point()
            }
        )
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


def lookup(kernel: str, query: Tensor, inputs: dict) -> dict[str, int]:
    """The configuration of a kernel for the larger of the padded head dimensions."""
    return configs.lookup(kernel, query, max(inputs["BLOCK_D"], inputs["BLOCK_DV"]))


def launch(kernel: triton.JITFunction, n_programs: int, config: dict, *inputs: dict) -> None:
    """Launch the kernel with those of the inputs that it has, later ones first, and the config."""
    given = {name: value for part in inputs for name, value in part.items()}
    if n_programs:
        with device_guard(given["q_ptr"]):
            taken = {name: value for name, value in given.items() if name in kernel.arg_names}
            kernel[(n_programs,)](**taken, **config)


def n_query_programs(query: Tensor, config: dict) -> int:
    """Programs of a query-stationary kernel: one for each tile of queries of a head."""
    B, H, T, _ = query.shape
    return triton.cdiv(T, config["BLOCK_M"]) * B * H


def empty_gradient(name: str, tensor: Tensor) -> Tensor:
    """The uninitialised gradient of an argument."""
    if name in ROWS:
        return empty_rows(tensor, tensor.shape[-1])
    return tensor.new_empty(tensor.shape)


def empty_numbers(query: Tensor, is_wanted: bool = True) -> Tensor:
    """Uninitialised float32 ``[B, H, T]``, of size 0 if it is not wanted."""
    return query.new_empty(query.shape[:3] if is_wanted else (0,), dtype=torch.float32)


def empty_results(args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised ``out``, ``lse`` and, for float32 inputs, what float32 rounds off ``lse``."""
    query = args.query
    residual = empty_numbers(query, query.dtype == torch.float32)
    return empty_rows(query, args.value.shape[-1]), empty_numbers(query), residual


def residual_ptr(query: Tensor, residual: Tensor) -> dict:
    """What float32 rounds off ``lse``, for float32 inputs only."""
    return {"residual_ptr": residual if query.dtype == torch.float32 else None}
