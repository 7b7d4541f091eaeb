"""Neural memory: a small network for each head whose weights are learned while it reads."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memattn.checks import (
    check_bool,
    check_floating,
    check_int,
    check_like,
    check_rank,
    check_shape,
    check_tensor,
    must,
)
from memattn.ops._attention import autocast, sequence_lengths
from memattn.ops._dispatch import resolve_backend
from memattn.ops._neural_memory_checks import (
    check_positive,
    check_state,
    check_weights,
    check_wide,
)
from memattn.ops._neural_memory_steps import (
    Step,
    is_step,
    next_step,
    plan_of,
    remembered,
    run_step,
    signature_of,
)
from memattn.ops.neural_memory_state import NeuralMemoryState
from memattn.reference.neural_memory import pack
from memattn_kernels.signatures import NeuralMemoryArgs

CHOICES = {
    "read": ("token", "chunk"),
    "activation": ("gelu", "silu"),
    "loss": ("l2", "huber"),
    "clamp": ("hard", "soft"),
}


class NeuralMemoryOutput(NamedTuple):
    """Outputs of the memory, its new state, and the surprise of each token."""

    out: Tensor  # [B, H, T, Dv]
    state: NeuralMemoryState | None  # None with return_state=False
    surprise: Tensor  # [B, H, T], float32, without a gradient


def neural_memory(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    weights: Sequence[Tensor],
    *,
    state: NeuralMemoryState | None = None,
    chunk_size: int = 64,
    read: str = "token",
    activation: str = "gelu",
    residual: bool = False,
    loss: str = "l2",
    huber_delta: float = 1.0,
    max_norm: float | None = None,
    clamp: str = "hard",
    skip_nonfinite: bool = False,
    seq_start: Tensor | None = None,
    seq_end: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = True,
    backend: str = "auto",
) -> NeuralMemoryOutput:
    """Write each token into the weights of a small network, and read them.

    The memory of a head is ``f(W; x)``: one to four layers with an activation between them
    (``residual``: plus ``x``). With ``e = f(W; k) - v`` its inner loss is ``1/2 |e|^2``, or Huber's
    of every component. Let ``A`` be the weights before the first token of t's chunk. Then

    1. ``u_t`` is the gradient of the inner loss of ``k_t, v_t`` at ``A``, over all layers;
    2. its norm ``n_t`` is the surprise; with ``max_norm = c`` it is multiplied by ``min(1, c /
       n_t)`` (``clamp="hard"``) or ``c / n_t tanh(n_t / c)`` (``"soft"``), at most 1;
    3. ``S_t = momentum_t S_{t-1} - lr_t u_t``;
    4. ``W_t = (1 - decay_t) W_{t-1} + S_t``;
    5. ``out_t = f(W_t; q_t)``, or ``f(A; q_t)`` with ``read="chunk"``. Both are causal.

    Chunks of ``chunk_size`` tokens count from the start of the sequence or document. A token
    outside its sequence changes nothing: neither weights, nor momentum, nor the place in the
    chunk; it gives zeros.

    Args:
        query: ``[B, H, T, D]``, float16, bfloat16, float32 or float64; any strides. Neither it nor
            the key is normalised here.
        key: ``[B, H, T, D]``.
        value: ``[B, H, T, Dv]``.
        lr: float32 (float64 with a float64 query, as all that follow) ``[B, H, T]``, 0 or more.
        momentum: ``[B, H, T]``, from 0 to 1. None: ``S_t`` is the newest gradient alone.
        decay: ``[B, H, T]``, from 0 to 1; None means 0.
        weights: One to four layers ``[H, d_n, d_{n-1}]`` with ``d_0 = D`` and ``d_N = Dv``: what a
            sequence starts from, the same for the whole batch. Used without ``state`` only.
        state: What an earlier call returned for the tokens before these. Not with ``cu_seqlens``.
        chunk_size: Tokens whose gradients are taken at the same weights; 1 is the recurrence of
            the paper.
        read: ``"token"`` or ``"chunk"``.
        activation: ``"gelu"`` (with erf) or ``"silu"``.
        residual: Whether the memory adds its input; then ``Dv = D``.
        loss: ``"l2"`` or ``"huber"``.
        huber_delta: Where Huber's loss becomes linear.
        max_norm: The largest norm of a token's gradient, over all layers of a head.
        clamp: ``"hard"`` or ``"soft"``.
        skip_nonfinite: Whether a gradient whose norm is not finite counts as 0. The state counts
            them.
        seq_start: int32 ``[B]``, first token of each sequence.
        seq_end: int32 ``[B]``, the token after its last.
        cu_seqlens: int32 ``[n + 1]``, bounds of packed documents, with ``B = 1``. The state has a
            row for each document then.
        return_state: Whether to return the state.
        backend: ``"auto"`` (C++ for CPU tensors; the reference for float64, where C++ is not built
            and for CUDA tensors), ``"triton"``, which no GPU has checked yet, so that ``"auto"``
            does not choose it, ``"cpp"`` or ``"reference"``. A named backend never falls back.

    Returns:
        ``out`` in the dtype of ``query``, the state, and the surprise in float32.

    Raises:
        TypeError: If an argument has the wrong Python type.
        ValueError: If a shape, dtype, device or value does not fit, or ``backend`` is unknown.
        NotImplementedError: If a named backend lacks the dtype, device or sizes.
        ImportError: If a named backend is not installed.

    Note:
        Differentiable in query, key, value, lr, momentum, decay, weights and the floating tensors
        of the state, through ``out`` and the state that is returned, and through every gradient of
        the inner loss; once in Triton and C++. Source: Behrouz et al., Titans,
        https://arxiv.org/abs/2501.00663, equations 11 to 18. Differs: the inner loss has a factor
        of 1/2; the learning rate, momentum and decay belong to a token, not to a chunk; the read of
        a token uses the weights after that token.
    """
    tokens = (query, key, value, lr, momentum, decay)
    choices = (chunk_size, read, activation, residual, loss, huber_delta, max_norm, clamp)
    choices = (*choices, skip_nonfinite, return_state, backend)
    if seq_start is None and seq_end is None and cu_seqlens is None:
        found = next_step(state, tokens, weights, choices)
        if found is not None:
            out, after, surprise = found
            return NeuralMemoryOutput(out, after if return_state else None, surprise)
    for name, tensor in (("query", query), ("key", key), ("value", value), ("lr", lr)):
        check_tensor(name, tensor)
    check_rank("query", query, "B H T D")
    check_floating("query", query)
    B, H, T, D = query.shape
    check_shape("key", key, B=B, H=H, T=T, D=D)
    check_shape("value", value, B=B, H=H, T=T, Dv=None)
    check_like("key", key, "query", query)
    check_like("value", value, "query", query)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    for name, gate in (("lr", lr), ("momentum", momentum), ("decay", decay)):
        if gate is not None:
            check_tensor(name, gate)
            check_shape(name, gate, B=B, H=H, T=T)
            check_wide(name, gate, query, wide)
    sizes = check_weights(weights, query, value, wide)
    check_int("chunk_size", chunk_size, 1)
    for name, choice in dict(read=read, activation=activation, loss=loss, clamp=clamp).items():
        if choice not in CHOICES[name]:
            must(name, f"be one of {', '.join(CHOICES[name])}", repr(choice))
    for name, flag in (
        ("residual", residual),
        ("skip_nonfinite", skip_nonfinite),
        ("return_state", return_state),
    ):
        check_bool(name, flag)
    if residual and value.shape[-1] != D:
        must("value", f"have Dv = D = {D} with residual=True", value.shape[-1])
    huber_delta = check_positive("huber_delta", huber_delta)
    max_norm = None if max_norm is None else check_positive("max_norm", max_norm)
    sequence_lengths(query, T, cu_seqlens, seq_start, seq_end, 0, wanted_for=None)
    if state is not None:
        if cu_seqlens is not None:
            must("state", "be None with cu_seqlens", "a state")
        check_state(state, query, momentum, sizes, chunk_size, wide)
        if state.records and T > 1:
            named = dict(
                chunk_size=chunk_size,
                read=read,
                activation=activation,
                residual=residual,
                loss=loss,
                huber_delta=huber_delta,
                max_norm=max_norm,
                clamp=clamp,
                skip_nonfinite=skip_nonfinite,
                backend=backend,
            )
            found = _token_by_token(tokens, weights, state, seq_start, seq_end, named)
            return found if return_state else found._replace(state=None)

    if state is None or torch.is_grad_enabled():
        initial = pack([layer.to(wide) for layer in weights])  # [H, P]
    else:  # a copy would cost as much as a step reads
        initial = state.initial
    row_start, row_end = _rows(query, seq_start, seq_end, cu_seqlens)
    query, key, value = (autocast(tensor) for tensor in (query, key, value))
    args = NeuralMemoryArgs(
        query=query,
        key=key,
        value=value,
        lr=lr,
        momentum=momentum,
        decay=decay,
        start_weights=initial[None] if state is None else state.packed_weights,
        start_momentum=None if state is None else state.packed_momentum,
        pending_h=None if state is None else state.pending_h,
        pending_delta=None if state is None else state.pending_delta,
        pending_decay=None if state is None else state.pending_decay,
        pending_momentum=None if state is None else state.pending_momentum,
        count=None if state is None else state.count,
        skipped=None if state is None else state.skipped,
        row_start=row_start,
        row_end=row_end,
        width_1=sizes[1] if len(sizes) > 2 else 0,
        width_2=sizes[2] if len(sizes) > 3 else 0,
        width_3=sizes[3] if len(sizes) > 4 else 0,
        depth=len(sizes) - 1,
        chunk_size=chunk_size,
        read_chunk=read == "chunk",
        is_silu=activation == "silu",
        residual=residual,
        is_huber=loss == "huber",
        huber_delta=huber_delta,
        max_norm=max_norm,
        clamp_soft=clamp == "soft",
        skip_nonfinite=skip_nonfinite,
        return_state=return_state,
    )
    impl, step = _backend(_choose(backend, query))
    if state is not None and step is not None and is_step(args):
        plan = plan_of(args, signature_of(tokens, weights, choices), step)
        out, after, surprise = run_step(args[:6], state, initial, plan)
        return NeuralMemoryOutput(out, after if return_state else None, surprise)
    out, surprise, *tensors = impl(args)
    if not return_state:
        return NeuralMemoryOutput(out, None, surprise.detach())
    w, s, h, delta, pending_decay, pending_momentum, count, skipped = tensors
    uniform = None  # a compiled call must not depend on it
    if row_start is None and not torch.compiler.is_compiling():
        before = 0 if state is None else state.uniform
        uniform = None if before is None else (before + T) % chunk_size
    after = NeuralMemoryState(
        packed_weights=w,
        packed_momentum=None if momentum is None else s,
        pending_h=h,
        pending_delta=delta,
        pending_decay=pending_decay,
        pending_momentum=pending_momentum,
        count=count,
        skipped=skipped,
        initial=initial,
        sizes=sizes,
        uniform=uniform,
    )
    if state is not None and state.records:
        after = remembered(args, state, after)
    return NeuralMemoryOutput(out, after, surprise.detach())


def _choose(backend: str, query: Tensor) -> str:
    """The backend that runs: ``auto`` leaves out Triton, whose kernels no GPU has checked."""
    chosen = resolve_backend(backend, query)
    return "reference" if (backend, chosen) == ("auto", "triton") else chosen


def _backend(chosen: str) -> tuple[Callable[..., tuple[Tensor, ...]], Step | None]:
    """The operator of a backend, and that of one token where it has one."""
    match chosen:
        case "triton":
            from memattn_kernels.neural_memory import neural_memory as impl

            return impl, None
        case "cpp":
            from memattn.cpp.neural_memory import neural_memory as impl
            from memattn.cpp.neural_memory import neural_memory_step as step
        case _:
            from memattn.reference.neural_memory import neural_memory as impl
            from memattn.reference.neural_memory_step import neural_memory_step as step

    return impl, step


def _token_by_token(
    tokens: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    weights: Sequence[Tensor],
    state: NeuralMemoryState,
    seq_start: Tensor | None,
    seq_end: Tensor | None,
    options: dict[str, Any],
) -> NeuralMemoryOutput:
    """A call with a state that records: its last ``chunk_size`` tokens one by one."""
    T = tokens[0].shape[2]
    first = max(T - state.chunk_size, 0)
    outs: list[Tensor] = []
    surprises: list[Tensor] = []
    bounds = [0, first, *range(first + 1, T + 1)] if first else list(range(T + 1))
    for a, b in zip(bounds, bounds[1:], strict=False):
        query, key, value, lr = (x[:, :, a:b] for x in tokens[:4])
        momentum, decay = (None if x is None else x[:, :, a:b] for x in tokens[4:])
        start, end = (None if x is None else (x - a).clamp(min=0) for x in (seq_start, seq_end))
        given = state if b - a == 1 else state.forget_past()
        found = neural_memory(
            *(query, key, value, lr, momentum, decay, weights),
            state=given,
            seq_start=start,
            seq_end=end,
            **options,
        )
        assert found.state is not None
        state = found.state if found.state.records else found.state.record_past()
        outs.append(found.out)
        surprises.append(found.surprise)
    return NeuralMemoryOutput(torch.cat(outs, 2), state, torch.cat(surprises, 2))


def _rows(
    query: Tensor, seq_start: Tensor | None, seq_end: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """First token of each row and the one after its last, or None where rows are all tokens."""
    B, _, T, _ = query.shape
    if cu_seqlens is not None:
        return cu_seqlens[:-1], cu_seqlens[1:]
    if seq_start is None and seq_end is None:
        return None, None

    def full(at: int) -> Tensor:
        return torch.full((B,), at, dtype=torch.int32, device=query.device)

    start = full(0) if seq_start is None else seq_start.clamp(0, T)
    end = full(T) if seq_end is None else seq_end.clamp(0, T)
    return start, end
