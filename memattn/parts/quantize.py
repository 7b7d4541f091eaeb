"""Quantise a trained memory to 8 or 4 bits, for inference."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from memattn.checks import must
from memattn.nn import MemoryBank, MemoryBanks, MemoryCrossAttention, QuantizedMemoryBank
from memattn.parts.base import PartConfig
from memattn.parts.chapter_memory import ChapterMemoryConfig
from memattn.reference.chapter_quantization import LARGEST

Model = TypeVar("Model", bound=nn.Module)
Change = Callable[[PartConfig], PartConfig]


def quantize_memory(model: Model, bits: int = 8) -> Model:
    """Store the memory banks of a model in 8 or 4 bits, in place.

    Keys and values of the memory are then read in ``bits`` bits. The bank is no longer trained.
    ``save_pretrained`` of the model or of an attached memory writes codes and scales.

    Args:
        model: A model of this package with a ``ChapterMemoryConfig``, or a model with attached
            memories, all of which are quantised.
        bits: 8 or 4.

    Returns:
        The model.

    Raises:
        ValueError: If the model has no memory bank, or ``bits`` does not fit it; the model is
            unchanged then.
    """
    found = [module for module in model.modules() if isinstance(module, MemoryBanks)]
    if not found:
        must("model", "have memory banks", type(model).__name__)
    if bits not in LARGEST:
        must("bits", f"be one of {', '.join(map(str, LARGEST))}", bits)
    for bank in (bank for banks in found for bank in banks.banks):
        assert isinstance(bank, MemoryBank)
        if isinstance(bank, QuantizedMemoryBank) and bank.bits != bits:
            must("bits", f"be {bank.bits}, as the bank has them", bits)
        if bits == 4 and bank.num_features % 2:
            must("bits", f"be 8 for {bank.num_features} stored features, an odd number", bits)

    for banks in found:
        for i, bank in enumerate(banks.banks):
            if isinstance(bank, QuantizedMemoryBank):
                bank.pack()
            elif isinstance(bank, MemoryBank):
                banks.banks[i] = QuantizedMemoryBank(bank, bits)

    def quantized(part: PartConfig) -> PartConfig:
        if not isinstance(part, ChapterMemoryConfig):
            return part
        return dataclasses.replace(
            part, quantize_memory=True, memory_quant_bits=bits, memory_quant_training=False
        )

    for module in model.modules():
        if isinstance(module, MemoryCrossAttention):
            module.kv_bits = bits
        replace_parts: Any = getattr(module, "replace_parts", None)
        if replace_parts is not None:
            replace_parts(quantized)
    return model
