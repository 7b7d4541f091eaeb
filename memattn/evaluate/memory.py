"""How the neural memories of a model are used on a text, as a table."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from memattn._tables import Table
from memattn.checks import check_int, must
from memattn.evaluate.perplexity import check_window, tokenize
from memattn.parts.memory_measures import MemoryUse, measure_memory, memory_layers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def memory_use(
    model: nn.Module,
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    context_len: int | None = None,
    samples: int = 4,
) -> MemoryUse:
    """Measure how the neural memories of a model are used; see ``measure_memory``.

    Args:
        model: A model with a neural memory.
        texts: Texts. Windows of ``context_len`` tokens without overlap are cut from them; where no
            text is as long, the windows are as long as the longest.
        tokenizer: A transformers tokenizer.
        context_len: Tokens in a window; None means the model's ``max_position_embeddings``, at
            most 1024.
        samples: Windows at most.

    Raises:
        TypeError: If the model has no neural memory.
        ValueError: If there is no text, a number is out of range, or the tokenizer has neither a
            begin- nor an end-of-text token.
    """
    memory_layers(model)
    check_int("samples", samples, 1)
    context_len, _ = check_window(model, context_len, None)
    if not texts:
        must("texts", "have at least one text", "none")
    tokens = list(tokenize(list(texts), tokenizer))
    length = min(context_len, max(map(len, tokens)))
    windows = [
        ids[at : at + length] for ids in tokens for at in range(0, len(ids) - length + 1, length)
    ]
    device = next(model.parameters()).device
    return measure_memory(model, torch.tensor(windows[:samples], device=device))


def memory_tables(use: MemoryUse) -> list[Table]:
    """Measures of each layer, means over sequences, heads and tokens; and retrieval by distance."""
    rows = [
        (
            name,
            f"{layer.surprise.mean():.4f}",
            f"{layer.update.mean():.4f}",
            f"{layer.relevance.mean():.4f}",
            " ".join(f"{x:.3f}" for x in layer.utilisation.mean((0, 1)).tolist()),
        )
        for name, layer in zip(*use, strict=True)
    ]
    heads = ("layer", "surprise", "update", "relevance", "utilisation")
    known = [
        (f"{found[0].first:,}", *(f"{bucket.quality:.3f}" for bucket in found))
        for found in zip(*(layer.retrieval for layer in use.uses), strict=True)
    ]
    return [
        Table("use of the neural memory", heads, rows),
        Table("retrieval by tokens to the end, at least", ("tokens", *use.layers), known),
    ]


def memory_values(use: MemoryUse) -> dict[str, Any]:
    """The measures as plain values: one number for each chunk, bucket and memory layer."""
    layers = {}
    for name, layer in zip(*use, strict=True):
        per_chunk = lambda x, sizes=layer.chunk_tokens: [float(p.mean()) for p in x.split(sizes)]
        layers[name] = {
            "chunk_tokens": layer.chunk_tokens,
            "surprise": per_chunk(layer.surprise.mean((0, 1))),
            "update": layer.update.mean((0, 1)).tolist(),
            "relevance": per_chunk(layer.relevance.mean(0)),
            "retrieval": [
                {**b._asdict(), "quality": None if math.isnan(b.quality) else b.quality}
                for b in layer.retrieval
            ],
            "utilisation": layer.utilisation.mean((0, 1)).tolist(),
        }
    return layers
