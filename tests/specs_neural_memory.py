"""What the shared tests need to know of the neural memory."""

from typing import NamedTuple

import torch
from operator_contract import DOCUMENTS, Arguments, Case, OperatorSpec
from torch import Tensor
from torch.nn import functional as F

import memattn

PADDED = dict(seq_start=[3, 0], seq_end=[33, 37])


class MemoryResults(NamedTuple):
    """What has gradients."""

    out: Tensor
    weights: Tensor
    momentum: Tensor
    pending_h: Tensor
    pending_delta: Tensor


def neural_memory(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rates: Tensor,
    weights_1: Tensor,
    weights_2: Tensor,
    *,
    seq_start: Tensor | None = None,
    seq_end: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    **options,
) -> MemoryResults:
    """The operator with its three rates in one tensor ``[B, H, T, 3]``, and tensors for results."""
    found = memattn.neural_memory(
        *(query, key, value, *rates.unbind(-1), [weights_1, weights_2]),
        seq_start=seq_start,
        seq_end=seq_end,
        cu_seqlens=cu_seqlens,
        backend=backend,
        **options,
    )
    after = found.state
    assert after is not None and after.packed_momentum is not None
    factors = after.pending_h, after.pending_delta
    return MemoryResults(found.out, after.packed_weights, after.packed_momentum, *factors)


def make_memory_inputs(
    *,
    B: int = 12,  # rounding grows in some sequences more than in others
    H: int = 2,
    Hkv: int | None = None,
    T: int = 37,
    D: int = 16,
    Dv: int | None = None,
    hidden: int = 20,
    chunk_size: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Arguments:
    """Inputs at which learning converges, exact in bfloat16; heads share nothing."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    Dv = D if Dv is None else Dv

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    unit = lambda: F.normalize(draw(B, H, T, D), dim=-1)
    tokens = {"query": unit(), "key": unit(), "value": draw(B, H, T, Dv)}
    rest = {
        "rates": draw(B, H, T, 3).sigmoid() * torch.tensor([0.2, 0.8, 0.2]),
        "weights_1": draw(H, hidden, D) * D**-0.5,
        "weights_2": draw(H, Dv, hidden) * hidden**-0.5,
    }
    tensors = {n: x.bfloat16().to(device, dtype) for n, x in tokens.items()}
    tensors |= {n: x.bfloat16().to(device, wide) for n, x in rest.items()}
    return tensors, dict(chunk_size=chunk_size)


MEMORY = OperatorSpec(
    operator=neural_memory,
    backends=("cpp", "reference"),
    lacks=(
        "test_large_scores",  # learning would not converge
        "test_large_equal_scores",
        "test_compiles_once_for_all_lengths-reference",  # minutes; short in test_neural_memory.py
    ),
    make_inputs=make_memory_inputs,
    own_axes=True,
    cases={
        "one": Case(dict(T=1)),
        "token": Case(),
        "chunk": Case({}, dict(read="chunk")),
        "packed": Case(dict(B=1, H=12), {}, dict(cu_seqlens=DOCUMENTS)),
        "padded": Case(dict(B=2, H=12), {}, PADDED),
        "nothing-left": Case(dict(B=2, H=12, T=9), {}, dict(seq_start=[9, 0], seq_end=[9, 9])),
    },
    interpreted_half=(),
    gradcheck={},  # of all options and states in test_neural_memory.py
    empty={"no-sequences": Case(dict(B=0, T=9))},
    at_length={"token": lambda T: Case(dict(B=6, T=T, chunk_size=32))},
    longest=(),
    at_head_dim=Case(dict(B=4, T=40)),
    at_instruction_set={
        "token": Case(dict(chunk_size=17, D=20, Dv=33, hidden=40)),
        "padded": Case(dict(B=2, H=12), {}, PADDED),
    },
    at_threads={"token": Case(dict(B=3))},
    tokens=("query", "key", "value", "rates"),
    batched=("query", "key", "value", "rates"),
    float32=("rates", "weights_1", "weights_2"),
    rows=("out",),
    small=Case(dict(B=2, T=19)),
    causal={"token": Case(dict(B=2)), "chunk": Case(dict(B=2), dict(read="chunk"))},
    padded={"token": Case(dict(B=1, T=21))},
    packed={"token": Case(dict(B=1))},
    unseen={},
    repeated=Case(dict(B=2, T=17)),
    large=Case(),
    opcheck={
        "token": Case(dict(B=1, T=9)),
        "packed": Case(dict(B=1, T=9), {}, dict(cu_seqlens=[0, 1, 6, 6, 9])),
    },
    compiled={  # one chunk at each length
        "token": lambda T: Case(
            dict(B=2, H=4, T=T, chunk_size=32), {}, dict(seq_start=[0, 2], seq_end=[7, 9])
        ),
    },
    gpu_large={"token": Case(dict(B=2, T=300, D=64, chunk_size=64))},
    wrong=Case(dict(B=2, T=9)),
    wrong_packed=Case(dict(B=1, T=9)),
)
