"""Operator, inputs and options with which each kernel is timed during tile tuning."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

KEYS_OF_CHAPTER = 128
BRANCHES = 2  # the heads are divided among this many branches
# kernels that also run on rows grouped by chapter
LONG_LISTS = ("by_chapter", "bwd_dkdv")
# options of kernels for one special case
SPECIAL: dict[str, dict[str, Any]] = {
    "_quantised": {"bits": 8},
    "_independent": {"combine": "independent"},
    "_in_tile": {"combine": "independent"},
}


def workload(kernel: str) -> tuple[Callable, Callable, list[dict[str, Any]]]:
    """The operator that runs a kernel, a function that makes its inputs, and options of each pass.

    - Segmented attention: causal, then segmented, both with persistent keys; kernels for plain
      attention run dense or causal without persistent keys.
    - Future attention: with a loss, except for the forward kernel without one. Kernels for the
      gradient of the target run with ``detach_target=False``.
    - Task-masked attention: full tiles, then partial tiles.
    - Chapter attention: chapters selected by token or by sequence, whichever the kernel is for.
    - Chapter router: 4096 chapters for many rows, else 96.
    - Branch attention: two slots for each token, one for decoding.
    - Neural memory: two layers, the inner one four times as wide.
    """
    from memattn import ops
    from memattn.bench import inputs

    if kernel.startswith("task_masked_attention"):
        return task_masked_attention, inputs.make_segmented_inputs, [{"shift": 0}, {"shift": 64}]
    if kernel.startswith("chapter_attention"):
        for suffix, options in SPECIAL.items():
            if kernel.endswith(suffix):
                passes = [{"form": "sequence"} | options]
                return chapter_attention, inputs.make_segmented_inputs, passes
        forms = {"sequence": "by_chapter" not in kernel, "token": kernel.endswith(LONG_LISTS)}
        passes = [{"form": form} for form, is_wanted in forms.items() if is_wanted]
        return chapter_attention, inputs.make_segmented_inputs, passes
    if kernel.startswith("branch_attention"):
        passes = [{"slots": 1 if kernel.endswith("decode") else 2}]
        return branch_attention, inputs.make_segmented_inputs, passes
    if kernel.startswith("neural_memory"):
        return neural_memory, make_memory_inputs, [{}]
    if kernel.startswith("chapter_router"):
        return chapter_router, make_router_inputs, [{}]
    if kernel.endswith(("_dense", "_causal")):
        passes = [{"is_causal": kernel.endswith("_causal")}]
        return ops.segmented_attention, inputs.make_segmented_inputs, passes
    if kernel.startswith("segmented_attention"):
        make_inputs = partial(inputs.make_segmented_inputs, P=16)
        return ops.segmented_attention, make_inputs, [{}, {"segment_len": 512, "window_size": 512}]
    options: dict[str, Any] = {"future_dim": 128}
    if kernel.endswith(("fwd", "decode")):
        return ops.future_attention, inputs.make_future_inputs, [options]
    loss = {"loss_type": "mse", "detach_target": not kernel.endswith("_target")}
    return ops.future_attention_loss, inputs.make_future_inputs, [options | loss]


def task_masked_attention(query: Tensor, key: Tensor, value: Tensor, *, shift: int, backend: str):
    """The operator with a mask made for the shape of the inputs; see ``_task_mask``."""
    from memattn import ops

    mask = _task_mask(query.shape[2], key.shape[2], shift, query.device)
    return ops.task_masked_attention(query, key, value, mask, 0, backend=backend)


@cache
def _task_mask(T: int, S: int, shift: int, device: torch.device) -> Any:
    """Each node sees a quarter of the nodes; ``shift`` moves node bounds into tiles."""
    from memattn.ops.task_mask import TILE, TaskMask

    query_node, key_node = ((torch.arange(length) + shift) // TILE for length in (T, S))
    G = int(max(query_node[-1], key_node[-1])) + 1
    edges = torch.rand(1, G, G, generator=torch.Generator().manual_seed(0)) < 0.25
    return TaskMask.from_graph(edges | torch.eye(G, dtype=torch.bool), query_node, key_node).to(
        device
    )


def chapter_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    form: str,
    backend: str,
    combine: str = "joint",
    bits: int | None = None,
    query_offset: int = 0,
):
    """The operator with chapters cut from the first sequence's keys and a random selection."""
    from memattn import ops
    from memattn.reference.chapter_quantization import quantize_rows

    (B, _, T, _), C = query.shape, key.shape[2] // KEYS_OF_CHAPTER
    chapters = lambda rows: (
        rows[0, :, : C * KEYS_OF_CHAPTER].unflatten(1, (C, KEYS_OF_CHAPTER)).transpose(0, 1)
    )
    indices, weights = _selection((B, T) if form == "token" else (B,), C, query.device)
    scales = {}
    bank = {"chapter_key": chapters(key), "chapter_value": chapters(value)}
    if bits is not None:
        for name, rows in bank.items():
            codes, scale = quantize_rows(rows.detach().float(), bits)
            bank[name], scales[f"{name.removeprefix('chapter_')}_scale"] = codes, scale
    return ops.chapter_attention(
        query,
        **bank,
        **scales,
        chapter_indices=indices,
        chapter_weights=weights,
        query_offset=query_offset,
        combine=combine,
        backend=backend,
    )


def branch_attention(
    query: Tensor, key: Tensor, value: Tensor, *, slots: int, backend: str, query_offset: int = 0
):
    """The operator with heads split into slots and branches; each slot uses a random branch."""
    from memattn import ops

    query, key, value = (x.unflatten(1, (BRANCHES, -1)) for x in (query, key, value))
    query = query[:, :slots]
    indices, gates = _branches((len(query), query.shape[3], slots), query.device)
    return ops.branch_attention(
        query, key, value, gates, indices, query_offset=query_offset, backend=backend
    )


class Routed(NamedTuple):
    """The router's weights with all losses added, as one output."""

    out: Tensor


def make_router_inputs(
    *,
    T: int,
    D: int,
    B: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **others: int,
) -> dict[str, Tensor]:
    """Hidden states ``[B, 4 T, E]``, and weights that give logits near 1; E = D, 768 for D=256."""
    E, C = (768 if D == 256 else D), (4096 if T >= 4096 else 96)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)
    return {"hidden": draw(B, 4 * T, E), "weight": draw(C, E) * E**-0.5, "bias": draw(C)}


def chapter_router(hidden: Tensor, weight: Tensor, bias: Tensor, *, backend: str) -> Routed:
    """The operator with its losses added to the weights."""
    from memattn import ops

    found = ops.chapter_router(hidden, weight, bias, top_k=8, backend=backend)
    return Routed(found.weights + found.load_balance_loss + found.auxiliary_loss + found.z_loss)


def make_memory_inputs(
    *,
    T: int,
    D: int,
    B: int = 1,
    H: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **others: int,
) -> dict[str, Tensor]:
    """Tokens, their gates and the weights of two layers."""
    from memattn.bench.gpu import memories

    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)
    return memories.build({"B": B, "H": H, "hidden": (4,)}, {}, T=T, D=D, draw=draw)[1]


def neural_memory(*, backend: str, **given: Any):
    """The operator in chunks of 64 tokens."""
    from memattn.bench.gpu import memories

    return memories.learn(**given, chunk_size=memories.CHUNK, backend=backend)


@cache
def _selection(shape: tuple[int, ...], C: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """An eighth of the chapters for each row, and weights of them."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(*shape, C, generator=generator).argsort(-1)[..., : max(C // 8, 1)]
    weights = torch.rand(order.shape, generator=generator) + 0.5
    return order.to(device, torch.int32), weights.to(device)


@cache
def _branches(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """A branch for each slot, and its gate."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(BRANCHES, shape, generator=generator, dtype=torch.int32)
    return indices.to(device), (torch.rand(shape, generator=generator) + 0.5).to(device)
