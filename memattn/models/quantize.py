"""A trained memory in 8 or 4 bits, for inference."""

import dataclasses
from typing import Any, TypeVar

from torch import nn

from memattn.checks import must
from memattn.nn import MemoryBanks, MemoryCrossAttention, QuantizedMemoryBank
from memattn.parts import PartConfig
from memattn.parts.chapter_memory import ChapterMemoryConfig

Model = TypeVar("Model", bound=nn.Module)


def quantize_memory(model: Model, bits: int = 8) -> Model:
    """Store the memory banks of a model in 8 or 4 bits, in place.

    Keys and values of the memory are then read in as many bits. The rows do not learn any more.
    ``save_pretrained`` writes codes and scales.

    Args:
        model: A model of this package with a ``ChapterMemoryConfig``.
        bits: 8 or 4.

    Returns:
        The model.

    Raises:
        ValueError: If the model has no memory bank, or ``bits`` does not fit it.
    """
    found = [module for module in model.modules() if isinstance(module, MemoryBanks)]
    if not found:
        must("model", "have memory banks", type(model).__name__)

    def quantized(part: PartConfig) -> PartConfig:
        if not isinstance(part, ChapterMemoryConfig):
            return part
        return dataclasses.replace(
            part, quantize_memory=True, memory_quant_bits=bits, memory_quant_training=False
        )

    config: Any = model.config
    parts = [quantized(part) for part in config.parts]
    for part in parts:
        part.check(config.sizes, [])
    for banks in found:
        for i, bank in enumerate(banks.banks):
            assert not isinstance(bank, nn.ModuleList)
            if isinstance(bank, QuantizedMemoryBank):
                if bank.bits != bits:
                    must("bits", f"be {bank.bits}, as the bank has them", bits)
                bank.pack()
            else:
                banks.banks[i] = QuantizedMemoryBank(bank, bits)  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, MemoryCrossAttention):
            module.kv_bits = bits
        own: Any = getattr(module, "part_configs", None)
        if isinstance(own, dict):
            module.part_configs = {name: quantized(part) for name, part in own.items()}  # type: ignore[assignment]
        if getattr(module, "config", None) is not None and hasattr(module.config, "parts"):
            module.config.parts = parts  # type: ignore[union-attr]
    return model
