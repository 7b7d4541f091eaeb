"""Random inputs of the attention operators, for benchmarks and tests."""

import torch
from torch import Tensor


def make_segmented_inputs(
    *,
    B: int = 2,
    H: int = 4,
    Hkv: int = 2,
    T: int = 37,
    S: int | None = None,
    D: int = 16,
    Dv: int | None = None,
    P: int = 0,
    M: int = 0,
    segment_len: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    n_segments: int | None = None,
    seed_device: str = "cpu",
) -> dict[str, Tensor]:
    """Random inputs of ``segmented_attention``; values are exact in bfloat16.

    No persistent keys if ``P`` is 0, no memory keys if ``M`` is 0. ``n_segments`` defaults to the
    segments of ``segment_len`` in ``S`` keys. Values depend on ``seed_device``.
    """
    generator = torch.Generator(seed_device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=seed_device)
        return values.to(torch.bfloat16).to(device, dtype)

    S, Dv = T if S is None else S, D if Dv is None else Dv
    tensors = {
        "query": draw(B, H, T, D),
        "key": draw(B, Hkv, S, D),
        "value": draw(B, Hkv, S, Dv),
    }
    if P:
        tensors |= {"persistent_key": draw(Hkv, P, D), "persistent_value": draw(Hkv, P, Dv)}
    if M:
        assert segment_len is not None
        N = -(-S // segment_len) if n_segments is None else n_segments
        tensors |= {
            "memory_key": draw(B, Hkv, N, M, D),
            "memory_value": draw(B, Hkv, N, M, Dv),
        }
    return tensors


def make_future_inputs(
    *,
    B: int = 2,
    H: int = 4,
    Hkv: int = 2,
    Hf: int | None = None,
    T: int = 37,
    S: int | None = None,
    D: int = 16,
    Dv: int | None = None,
    rows: int | None = None,
    tables: int | None = None,
    separate_query: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    seed_device: str = "cpu",
) -> dict[str, Tensor]:
    """Random inputs of ``future_attention``; values are exact in bfloat16.

    The future table has ``Hf`` heads (default ``H``) and ``rows`` rows (default ``S - 1``).
    ``tables`` makes that many tables, one per sequence or document, instead of one shared table.
    """
    S, Dv = T if S is None else S, D if Dv is None else Dv
    tensors = make_segmented_inputs(
        B=B,
        H=H,
        Hkv=Hkv,
        T=T,
        S=S,
        D=D,
        Dv=Dv,
        dtype=dtype,
        device=device,
        seed=seed,
        seed_device=seed_device,
    )
    shape = (*(() if tables is None else (tables,)), Hf or H, S - 1 if rows is None else rows)
    generator = torch.Generator(seed_device).manual_seed(seed + 1)
    shapes = {"future_key": (*shape, D), "future_value": (*shape, Dv)}
    if separate_query:
        shapes["future_query"] = (B, H, T, D)
    for name, wanted in shapes.items():
        values = torch.randn(wanted, generator=generator, device=seed_device).to(torch.bfloat16)
        tensors[name] = values.to(device, dtype)
    return tensors
