"""Which chapters of a memory bank a token reads, and the losses that keep all of them in use."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from memattn.checks import (
    check_floating,
    check_int,
    check_rank,
    check_shape,
    check_tensor,
    must,
)
from memattn.ops._dispatch import resolve_backend
from memattn_kernels.signatures import ChapterRouterArgs

NORMALISATIONS = ("mean", "sum")


class RouterOutput(NamedTuple):
    """Selected chapters, their weights, and what a training step adds or reports."""

    indices: Tensor  # int32 [B, N, K], K = num_shared + top_k
    weights: Tensor  # float32 [B, N, K] (float64 for float64 inputs)
    load_balance_loss: Tensor  # scalars of the dtype of the weights
    auxiliary_loss: Tensor
    z_loss: Tensor
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]  # valid rows
    load: Tensor  # [C - num_shared], share of the rows that selected each chapter
    entropy: Tensor  # mean entropy of a row's probabilities


def chapter_router(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    top_k: int,
    num_shared: int = 0,
    temperature: float = 1.0,
    routed_scale: float = 1.0,
    valid: Tensor | None = None,
    normalisation: str = "mean",
    backend: str = "auto",
) -> RouterOutput:
    """Select chapters for each row: the shared ones, then the ``top_k`` with the largest logits.

    The logits ``z = (weight @ x + bias) / temperature`` of the routed chapters are float32. Equal
    logits go to the lower index; NaN counts as minus infinity. The weights of the selected are
    ``routed_scale`` times a softmax over them, those of shared chapters are 1. Over the valid rows,
    with ``f_c`` the share that selected chapter ``c``, ``P_c`` its mean probability and
    ``C' = C - num_shared``:

    - ``load_balance_loss = C' / top_k * sum_c f_c P_c``, 1 at balance (``normalisation="sum"``:
      without the division, ``top_k`` at balance);
    - ``auxiliary_loss = C' * sum_c P_c^2 - 1``, 0 at balance and ``C' - 1`` at worst;
    - ``z_loss``: the mean square of ``log sum_c exp z_c``.

    The probabilities of all rows are not kept for the backward. A row without ``valid`` has
    indices -1 and weights 0; without a valid row every loss is 0. The first two losses are products
    of means: those of parts of a batch do not add up to that of the whole.

    Args:
        hidden: ``[B, N, E]``, a row for each routing decision; float16, bfloat16, float32 or
            float64.
        weight: ``[C - num_shared, E]``, in the dtype of ``hidden`` or float32. Shared chapters have
            no logit, so that probability cannot hide there.
        bias: ``[C - num_shared]`` in the dtype of ``weight``, or None.
        top_k: Routed chapters that a row selects, from 1 to ``C - num_shared``.
        num_shared: Chapters, the first ones, that every row selects.
        temperature: Divisor of the logits.
        routed_scale: Factor of the weights of routed chapters.
        valid: bool ``[B, N]``, rows that exist; None means all.
        normalisation: ``"mean"`` or ``"sum"``, of the load-balance loss.
        backend: ``"auto"`` (Triton for CUDA tensors, C++ for CPU tensors, the reference for
            float64 and where the extension is not built), ``"triton"``, ``"cpp"`` or
            ``"reference"``. A named backend never falls back.

    Returns:
        Indices with shared chapters first, then by falling logit; weights; losses; and, without
        gradients, count, load and entropy.

    Raises:
        TypeError: If an argument has the wrong Python type.
        ValueError: If a shape, dtype, device or value does not fit, or ``backend`` is unknown.
        NotImplementedError: If a named backend lacks the dtype or device.
        ImportError: If a named backend is not installed.

    Note:
        Differentiable once in ``hidden``, ``weight`` and ``bias``, through the weights and the
        three losses; which chapters are selected, and ``f``, are constants. Sources: Fedus et al.,
        Switch Transformers (load balance); Shazeer et al. 2017 (squared coefficient of variation);
        Zoph et al., ST-MoE (z-loss). Differs from Mixture of Chapters, whose auxiliary loss is
        smallest for one-hot rows, and where probability can hide in a shared chapter.
    """
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        check_tensor(name, tensor)
    check_rank("hidden", hidden, "B N E")
    check_floating("hidden", hidden)
    B, N, E = hidden.shape
    check_rank("weight", weight, "C E")
    check_shape("weight", weight, C=None, E=E)
    n_routed = weight.shape[0]
    _check_dtype("weight", weight, hidden)
    if bias is not None:
        check_tensor("bias", bias)
        check_shape("bias", bias, C=n_routed)
        if bias.dtype != weight.dtype:
            must("bias", f"have the dtype of weight, {weight.dtype}", bias.dtype)
        if bias.device != hidden.device:
            must("bias", f"be on the device of hidden, {hidden.device}", bias.device)
    check_int("top_k", top_k, 1)
    if top_k > n_routed:
        must("top_k", f"be at most C - num_shared = {n_routed}", top_k)
    check_int("num_shared", num_shared, 0)
    numbers: dict[str, Any] = dict(temperature=temperature, routed_scale=routed_scale)
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            must(name, "be a number", type(value).__name__, TypeError)
        if not 0.0 < value < float("inf"):
            must(name, "be positive and finite", value)
    if valid is not None:
        check_tensor("valid", valid)
        check_shape("valid", valid, B=B, N=N)
        if valid.dtype != torch.bool:
            must("valid", "have dtype torch.bool", valid.dtype)
        if valid.device != hidden.device:
            must("valid", f"be on the device of hidden, {hidden.device}", valid.device)
    if normalisation not in NORMALISATIONS:
        must("normalisation", f"be one of {', '.join(NORMALISATIONS)}", repr(normalisation))
    args = ChapterRouterArgs(
        hidden=hidden,
        weight=weight,
        bias=bias,
        valid=valid,
        top_k=top_k,
        num_shared=num_shared,
        temperature=float(temperature),
        routed_scale=float(routed_scale),
        is_mean=normalisation == "mean",
    )
    match resolve_backend(backend, hidden, "hidden"):
        case "triton":
            from memattn_kernels.chapter_router import chapter_router as impl
        case "cpp":
            from memattn.cpp.chapter_router import chapter_router as impl
        case "reference":
            from memattn.reference.chapter_router import chapter_router as impl
    return RouterOutput(*impl(args))


def _check_dtype(name: str, tensor: Tensor, hidden: Tensor) -> None:
    """Raise unless a parameter has the dtype of ``hidden`` or float32, and its device."""
    if tensor.dtype not in (hidden.dtype, torch.float32):
        must(name, f"have the dtype of hidden, {hidden.dtype}, or float32", tensor.dtype)
    if tensor.device != hidden.device:
        must(name, f"be on the device of hidden, {hidden.device}", tensor.device)
