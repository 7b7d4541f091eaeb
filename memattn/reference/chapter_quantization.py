"""Definition of quantised rows: int8, or two four-bit numbers in a byte, with a scale for each."""

import torch
from torch import Tensor

LARGEST = {8: 127, 4: 7}  # by bits
SMALLEST_SCALE = 1e-8


def quantize_rows(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows ``[..., D]``, each row by its largest absolute value.

    ``scale = max(max|x| / 127, 1e-8)`` (7 for four bits), and a code is ``x / scale``, rounded half
    to even and clipped.

    Returns:
        int8 ``[..., D]``, or uint8 ``[..., D / 2]`` with feature ``2i`` in the lower four bits, in
        two's complement; and float32 ``[...]``.
    """
    largest = LARGEST[bits]
    rows = rows.detach().float()
    scale = (rows.abs().amax(-1) / largest).clamp(min=SMALLEST_SCALE)
    codes = (rows / scale[..., None]).round().clamp(-largest, largest).to(torch.int8)
    if bits == 4:
        low, high = codes[..., ::2] & 15, codes[..., 1::2] & 15
        codes = (low | high << 4).view(torch.uint8)
    return codes, scale


def dequantize_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows ``[..., D]`` of a dtype from what ``quantize_rows`` returns."""
    if codes.dtype == torch.uint8:
        codes = codes.view(torch.int8)
        # an arithmetic shift keeps the sign; the lower half is first moved to the top
        codes = torch.stack([codes << 4 >> 4, codes >> 4], -1).flatten(-2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (codes.to(wide) * scale[..., None].to(wide)).to(dtype)
