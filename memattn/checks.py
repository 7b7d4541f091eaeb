"""Argument checks: every message names the argument, what it must be and what it got."""

import math
from collections.abc import Collection
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SEED_BITS = 40  # the seed of a task is a product that torch's generators must still take


def must(name: str, requirement: str, got: Any, error: type[Exception] = ValueError) -> NoReturn:
    """Raise ``<name> must <requirement>, got <got>``."""
    raise error(f"{name} must {requirement}, got {got}")


def check_tensor(name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        must(name, "be a tensor", type(value).__name__, TypeError)


def check_rank(name: str, tensor: Tensor, dims: str) -> None:
    """Raise unless ``tensor`` has one axis for each of the ``dims``, such as ``"B H T D"``."""
    names = dims.split()
    if tensor.dim() != len(names):
        must(name, f"have {len(names)} axes [{', '.join(names)}]", f"shape {list(tensor.shape)}")


def check_shape(name: str, tensor: Tensor, **dims: int | None) -> None:
    """Raise unless the shape is the given one; ``None`` allows any size of that axis."""
    shape = list(tensor.shape)
    if len(shape) == len(dims) and all(
        want is None or want == got for want, got in zip(dims.values(), shape, strict=True)
    ):
        return
    wanted = ", ".join(dim if want is None else f"{dim}={want}" for dim, want in dims.items())
    must(name, f"have shape [{wanted}]", shape)


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` has a floating dtype that the operators take."""
    if tensor.dtype not in FLOATS:
        must(name, "have dtype float16, bfloat16, float32 or float64", tensor.dtype)


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless ``tensor`` has the dtype and the device of ``other``."""
    if tensor.dtype != other.dtype:
        must(name, f"have the dtype of {other_name}, {other.dtype}", tensor.dtype)
    if tensor.device != other.device:
        must(name, f"be on the device of {other_name}, {other.device}", tensor.device)


def check_int(name: str, value: Any, minimum: int) -> None:
    """Raise unless ``value`` is an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        must(name, "be an integer", type(value).__name__, TypeError)
    if value < minimum:
        must(name, f"be at least {minimum}", value)


def check_bool(name: str, value: Any) -> None:
    """Raise unless ``value`` is True or False."""
    if not isinstance(value, bool):
        must(name, "be True or False", type(value).__name__, TypeError)


def check_scale(scale: Any, head_dim: int) -> float:
    """Return the scale, ``1/sqrt(head_dim)`` for None."""
    return head_dim**-0.5 if scale is None else check_positive("scale", scale)


def check_positive(name: str, value: Any) -> float:
    """Return a positive number as a float; the message says that None is allowed too."""
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymFloat):
        must(name, "be a number or None", type(value).__name__, TypeError)
    if not 0.0 < value < float("inf"):
        must(name, "be positive and finite", value)
    return float(value)


def check_pair(name_a: str, a: Tensor | None, name_b: str, b: Tensor | None) -> None:
    """Raise unless both tensors are given, or neither."""
    if (a is None) != (b is None):
        missing, given = (name_a, name_b) if a is None else (name_b, name_a)
        must(missing, f"be given together with {given}", "None")


def check_heads(query: Tensor, name: str, tensor: Tensor, dim: int = 1) -> None:
    """Raise unless the heads of ``tensor``, its axis ``dim``, divide those of the query."""
    H, Hkv = query.shape[1], tensor.shape[dim]
    if Hkv == 0 or H % Hkv:
        must(name, f"have a number of heads that divides those of query, H={H}", f"Hkv={Hkv}")


def check_on_device_of_query(name: str, tensor: Tensor, query: Tensor) -> None:
    """Raise unless ``tensor`` is on the device of the query."""
    if tensor.device != query.device:
        must(name, f"be on the device of query, {query.device}", tensor.device)


def check_factor(name: str, tensor: Tensor, query: Tensor) -> None:
    """Raise unless float32 (or float64 with a float64 query), on the device of the query."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    if tensor.dtype not in (torch.float32, wide):
        must(name, "have dtype torch.float32", tensor.dtype)
    check_on_device_of_query(name, tensor, query)


def check_indices(name: str, indices: Tensor, query: Tensor) -> None:
    """Raise unless ``indices`` are int32 or int64 on the device of the query."""
    if indices.dtype not in (torch.int32, torch.int64):
        must(name, "have dtype torch.int32 or torch.int64", indices.dtype)
    check_on_device_of_query(name, indices, query)


def check_index_range(name: str, indices: Tensor, dim: str, size: int) -> None:
    """Raise for an index that is not from -1 to ``size - 1``, if the values are readable."""
    if not is_readable(indices) or not indices.numel():
        return
    lowest, highest = (int(x) for x in indices.aminmax())
    if lowest < -1 or highest >= size:
        got = lowest if lowest < -1 else highest
        must(name, f"be from -1 to {dim} - 1 = {size - 1}", got)


def check_int32_vector(name: str, value: Any, like: Tensor) -> None:
    """Raise unless ``value`` is an int32 vector on the device of ``like``."""
    check_tensor(name, value)
    if value.dtype != torch.int32:
        must(name, "have dtype torch.int32", value.dtype)
    check_rank(name, value, "n")
    check_on_device_of_query(name, value, like)


def is_traced(tensor: Tensor) -> bool:
    """Whether ``tensor`` belongs to a graph that is being traced, so that it has no values."""
    return torch.compiler.is_compiling() or isinstance(tensor, torch._subclasses.FakeTensor)


def is_static(size: int) -> bool:
    """Whether a size is the same at each call of a graph that is being traced."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # not above: it loads sympy

    return has_static_value(size)


def is_readable(tensor: Tensor) -> bool:
    """Whether the values can be read without waiting for a device."""
    return not (is_traced(tensor) or tensor.is_cuda)


# by identity: a plain WeakKeyDictionary would compare tensors with ==
_checked_values = WeakTensorKeyDictionary()


def values_to_check(tensor: Tensor, *context: Any) -> list[int] | None:
    """The values of a small index tensor; None if they cannot or need not be read.

    Reading a CUDA tensor waits for the device. So each tensor is read once per ``context`` (again
    after it was written to), and never while a graph is captured or traced.
    """
    if is_traced(tensor):
        return None
    if tensor.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return None
        version = 0 if tensor.is_inference() else tensor._version  # inference tensors have none
        stamp = (version, *context)
        if _checked_values.get(tensor) == stamp:
            return None
        _checked_values[tensor] = stamp
    return tensor.tolist()


def check_string(name: str, value: object, known: Collection[str]) -> None:
    """Raise TypeError unless ``value`` is a string; ``known`` are those that are meant."""
    if not isinstance(value, str):
        must(name, f"be one of {', '.join(known)}", type(value).__name__, TypeError)


def check_type(
    name: str, value: object, kind: type[Any] | tuple[type[Any], ...], wanted: str
) -> None:
    """Raise TypeError unless ``value`` is of a kind, or of one of several.

    ``wanted`` says in words what it must be.
    """
    if not isinstance(value, kind):
        must(name, wanted, type(value).__name__, TypeError)


def plain_values(tensor: Tensor) -> list[Any]:
    """The values of a tensor as Python numbers; nested lists where it has several axes."""
    return tensor.tolist()


def check_seed(name: str, seed: Any) -> None:
    """Raise unless ``seed`` is an integer from 0 to below 2**40."""
    check_int(name, seed, 0)
    if seed >= 2**_SEED_BITS:
        must(name, f"be below 2**{_SEED_BITS}", seed)


def check_device(name: str, device: torch.device | str) -> None:
    """Raise ValueError unless tensors can be made on the device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise ValueError(f"{name} must be cpu, or a GPU that is here, got {device}") from error


def check_loss(what: str, loss: float, epoch: int, lr: float) -> None:
    """Raise FloatingPointError unless a loss is finite; ``epoch`` counts from 0."""
    if not math.isfinite(loss):
        where = f"in epoch {epoch + 1} with lr={lr}"
        must(what, f"be finite {where}", loss, FloatingPointError)
