"""Peers of the neural memory: per-sample gradients, a loop over tokens, ``titans-pytorch``."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.bench.case import Forward

Layers = list[Tensor]
Chunk = Callable[..., tuple[Tensor, ...]]
TOKENS = ("query", "key", "value", "lr", "momentum", "decay")


class MemorySizes(Protocol):
    """Sizes that this package's memory and its peers share."""

    @property
    def H(self) -> int: ...
    @property
    def D(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def expansion(self) -> int: ...
    @property
    def chunk_size(self) -> int: ...
    @property
    def device(self) -> str: ...


class _Recomputed(torch.autograd.Function):
    """Checkpointing of a chunk: saves its inputs instead of the weights of each token.

    ``torch.utils.checkpoint`` cannot be used, as the chunk computes gradients inside.
    """

    @staticmethod
    def forward(ctx: Any, function: Chunk, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            outs = ctx.function(*leaves)
        return None, *torch.autograd.grad(outs, leaves, grads, allow_unused=True)


def memory(layers: Sequence[Tensor], x: Tensor) -> Tensor:
    """``f(W; x)`` of rows ``x``."""
    for n, layer in enumerate(layers):
        x = x @ layer.mT
        if n < len(layers) - 1:
            x = F.gelu(x)
    return x


def inner_loss(layers: Sequence[Tensor], key: Tensor, value: Tensor) -> Tensor:
    """Half the squared error of rows."""
    return (memory(layers, key) - value).square().sum() / 2


def by_chunks(chunk_size: int) -> Forward:
    """Gradients of all tokens of a chunk by ``vmap(grad)``, then a scan over the tokens."""
    of_tokens = torch.func.vmap(torch.func.grad(inner_loss), in_dims=(None, 0, 0))
    of_heads = torch.func.vmap(torch.func.vmap(of_tokens))

    def chunk(n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        layers, moved = list(tensors[:n]), list(tensors[n : 2 * n])
        query, key, value, lr, momentum, decay = tensors[2 * n :]
        # [B, H, b, d_n, d_(n-1)] of each layer
        gradients = of_heads(layers, key[..., None, :], value[..., None, :])
        every = []
        for j, gradient in enumerate(zip(*(x.unbind(2) for x in gradients), strict=True)):
            at = lambda x, j=j: x[:, :, j, None, None]
            moved = [at(momentum) * s - at(lr) * u for s, u in zip(moved, gradient, strict=True)]
            kept = [(1 - at(decay)) * w + s for w, s in zip(layers, moved, strict=True)]
            layers = kept
            every.append(kept)
        stacked = [torch.stack(layer, 2) for layer in zip(*every, strict=True)]
        out = memory(stacked, query[..., None, :])[..., 0, :]
        return out, *layers, *moved

    return _over_chunks(chunk, chunk_size)


def by_tokens(chunk_size: int) -> Forward:
    """A loop over tokens; autograd computes the gradient of each."""

    def chunk(n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        layers, moved = list(tensors[:n]), list(tensors[n : 2 * n])
        start, outs = layers, []
        is_training = torch.is_grad_enabled()
        for t in range(tensors[2 * n].shape[2]):
            query, key, value = (x[:, :, t : t + 1] for x in tensors[2 * n : 2 * n + 3])
            lr, momentum, decay = (x[:, :, t, None, None] for x in tensors[2 * n + 3 :])
            with torch.enable_grad():
                at = start if is_training else [w.detach().requires_grad_() for w in start]
                gradients = torch.autograd.grad(
                    inner_loss(at, key, value), at, create_graph=is_training
                )
            moved = [momentum * s - lr * u for s, u in zip(moved, gradients, strict=True)]
            layers = [(1 - decay) * w + s for w, s in zip(layers, moved, strict=True)]
            outs.append(memory(layers, query))
        return torch.cat(outs, 2), *layers, *moved

    return _over_chunks(chunk, chunk_size)


def _over_chunks(chunk: Chunk, chunk_size: int) -> Forward:
    """Run the chunks of a sequence one after another; the backward recomputes each chunk."""

    def forward(inputs: dict[str, Tensor]) -> Tensor:
        names = [name for name in inputs if name.startswith("weights_")]
        tokens = [inputs[name] for name in TOKENS]
        B, T, n = tokens[0].shape[0], tokens[0].shape[2], len(names)
        layers = [inputs[name].expand(B, -1, -1, -1) for name in names]
        moved = [torch.zeros_like(layer) for layer in layers]
        outs = []
        for first in range(0, T, chunk_size):
            own = [x[:, :, first : first + chunk_size] for x in tokens]
            function = lambda *tensors: chunk(n, *tensors)
            out, *state = _Recomputed.apply(function, *layers, *moved, *own)  # pyright: ignore
            layers, moved = state[:n], state[n:]
            outs.append(out)
        return torch.cat(outs, 2).to(tokens[0].dtype)

    return forward


class _Columns(nn.Module):
    """Selects features ``first`` to ``last - 1`` of its input and applies ``change``."""

    def __init__(self, first: int, last: int, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.change = first, last, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x[..., self.first : self.last])


def titans_pytorch(case: MemorySizes, *, every_chunk: bool) -> Forward:
    """``NeuralMemory`` of titans-pytorch with given queries, keys, values and rates.

    Its norms, residual, gate and projections are off. It has one momentum and one decay per chunk:
    the means over the chunk of ours, before the sigmoid. Its loss is a mean over ``D``, which a
    scaled learning rate compensates. A token reads the weights before its chunk, the last token of
    a chunk those after it.

    Args:
        case: Sizes.
        every_chunk: Take gradients at the weights of each chunk's start (its ``batch_size`` is the
            chunk size). Otherwise all gradients are at the first weights, which is its default.

    Raises:
        ImportError: If the package is not installed.
    """
    from titans_pytorch import MemoryMLP, NeuralMemory  # pyright: ignore[reportMissingImports]

    H, D = case.H, case.D
    inner = H * D
    model = NeuralMemory(
        dim=inner,
        dim_head=D,
        heads=H,
        chunk_size=case.chunk_size,
        batch_size=case.chunk_size if every_chunk else None,
        model=MemoryMLP(D, depth=case.depth, expansion_factor=case.expansion),
        qkv_receives_diff_views=True,
        pre_rmsnorm=False,
        mem_model_norm_add_residual=False,
        adaptive_step_transform=lambda step: step,
    ).to(case.device)
    # the rates are appended to the keys, as features of the token
    same: Callable[[Tensor], Tensor] = lambda x: x
    to_heads = lambda x: x.mT.flatten(0, 1)
    model.to_queries = model.to_keys = model.to_values = _Columns(0, inner, same)
    model.to_adaptive_step = _Columns(inner, inner + H, to_heads)
    by_order = lambda x: to_heads(x)[None, ..., None]
    model.to_momentum = _Columns(inner + H, inner + 2 * H, by_order)
    model.to_decay_factor = _Columns(inner + 2 * H, inner + 3 * H, lambda x: to_heads(x)[..., None])
    model.retrieve_gate, model.combine_heads = None, nn.Identity()

    def forward(inputs: dict[str, Tensor]) -> Tensor:
        names = [name for name in inputs if name.startswith("weights_")]
        features = lambda x: x.transpose(1, 2).flatten(2)
        rates = [inputs["lr"] * (D / 2), *(inputs[n].logit() for n in ("momentum", "decay"))]
        rates = torch.cat([x.transpose(1, 2) for x in rates], -1)
        wide = [features(inputs[n]).to(rates.dtype) for n in ("query", "key", "value")]
        sequence = torch.stack([torch.cat([x, rates], -1) for x in wide])
        weights = {f"memory_model_parameters.{n}": inputs[name].mT for n, name in enumerate(names)}
        out, _ = torch.func.functional_call(model, weights, (sequence,))
        return out.unflatten(-1, (H, D)).transpose(1, 2).to(inputs["query"].dtype)

    return forward
