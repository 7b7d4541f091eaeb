"""Layers of PyTorch with specialists beside them, for the tests of shiftable attention."""

import copy

import torch
from torch import nn

from memattn.nn import DomainGate, ShiftableMultiheadAttention, ShiftableTransformerBlock

B, T, E, H = 2, 6, 8, 2
RIGHT = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
LEFT = RIGHT.flip(1)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(T)


def draw(*shape, seed=0, dtype=torch.float32):
    """Random numbers that depend on the shape and the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shake(module, size=0.3):
    """Weights that no initialisation has, biases among them."""
    for n, parameter in enumerate(module.parameters()):
        with torch.no_grad():
            parameter.add_(size * draw(*parameter.shape, seed=n).to(parameter))
    return module


def make_layer(**options):
    """An encoder layer of PyTorch, evaluated."""
    torch.manual_seed(0)
    options = dict(dropout=0.3, batch_first=True) | options
    return shake(nn.TransformerEncoderLayer(E, H, 16, **options)).eval()


def shift(module, n=2, **gate):
    """A module of ours around a layer or an attention, with open specialists that differ."""
    torch.manual_seed(1)
    module = copy.deepcopy(module)
    given = DomainGate(E, gate_size=4, **gate)
    if isinstance(module, nn.MultiheadAttention):
        block = attention = ShiftableMultiheadAttention(
            E, H, module, gate=given.to(module.out_proj.weight)
        )
    else:
        block = ShiftableTransformerBlock.from_layer(module, gate=given.to(module.linear1.weight))
        attention = block.self_attn
    for _ in range(n):
        name = attention.add_specialist(prior=1.0)
        for p in attention.specialist_parameters(name):
            p.data += 0.3 * draw(*p.shape, seed=len(name) + p.numel()).to(p)
    return block
