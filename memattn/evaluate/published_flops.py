"""The FLOPs of a memory transformer as its authors count them, to the last digit.

The published figures of the mixture of chapters (workshop paper of 2026, code at
github.com/Tasmay-Tibrewal/Memory) count one forward pass, for B sequences of T tokens:

- a product of ``[n, i]`` and ``[i, o]`` as ``2 n i o``, and attention as over all T x T pairs, the
  masked ones too;
- for each score of attention 5 operations of the softmax and 2 of scale and mask;
- RMSNorm of n vectors of D features as ``n (4 D + 4)``, a rotary position as 3 for each feature of
  query and key, SwiGLU as 5 for each feature inside the MLP, a residual as 1 for each feature;
- in a memory layer, keys and values of the selected chapters projected anew for each sequence, the
  mean over the sequence that it routes by, the router over all chapters, shared ones included, and
  its losses, a weight and an RMSNorm for each selected row of the bank;
- cross-entropy as 5 for each logit of the T - 1 targets;
- the backward pass as twice the forward pass.

``memattn.evaluate.estimate`` counts what is computed here instead: the pairs that a token sees,
and a bank that is projected once for all sequences.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from memattn.checks import must

_SOFTMAX = 5
_SCALE_AND_MASK = 2
_SWIGLU = 5
_ENTROPY = 4


@dataclass(frozen=True, kw_only=True)
class PublishedMemory:
    """The memory layers of a model, all alike.

    Attributes:
        num_layers: How many of its layers have one.
        num_chapters: Chapters in the bank, shared ones included.
        num_shared: Chapters that every sequence reads.
        top_k: Chapters that a sequence is routed to beside them.
        tokens_per_chapter: Rows of a chapter.
        num_heads: Heads of the cross-attention.
        kv_size: Features of its keys, and of its values.
    """

    num_layers: int
    num_chapters: int
    num_shared: int
    top_k: int
    tokens_per_chapter: int
    num_heads: int
    kv_size: int


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """A decoder with RMSNorm, SwiGLU and rotary positions.

    Attributes:
        hidden_size: Features of the hidden states, and of all heads together.
        num_layers: Blocks.
        num_heads: Query heads.
        kv_size: Features of the keys of a token, and of its values.
        intermediate_size: Features inside the MLP.
        vocab_size: Tokens of the vocabulary.
        memory: Its memory layers, or None.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    kv_size: int
    intermediate_size: int
    vocab_size: int
    memory: PublishedMemory | None = None


class MemoryLayerFlops(NamedTuple):
    """What a memory adds to one layer."""

    attention: int
    router: int
    router_losses: int
    weighting: int
    norm: int
    residual: int


class PublishedFlops(NamedTuple):
    """Of one forward pass."""

    layer: int  # one layer without its memory
    memory_layer: MemoryLayerFlops | None  # what a memory adds to it
    head: int  # last norm, output layer and cross-entropy
    total: int


def published_flops(model: PublishedModel, length: int, batch_size: int = 1) -> PublishedFlops:
    """Count one forward pass as the authors do.

    Args:
        model: The model.
        length: Tokens in a sequence, at least 1.
        batch_size: Sequences.

    Returns:
        The operations by place, and in all.

    Raises:
        ValueError: If a number is below 1.
    """
    for name, value in (("length", length), ("batch_size", batch_size)):
        if value < 1:
            must(name, "be at least 1", value)
    n, width = batch_size * length, model.hidden_size
    attention = _attention(n, length, n, width, model.kv_size, model.num_heads) + 3 * n * (
        width + model.kv_size
    )  # rotary positions
    mlp = 3 * _product(n, width, model.intermediate_size) + _SWIGLU * n * model.intermediate_size
    layer = attention + mlp + 2 * _rms_norm(n, width) + 2 * n * width
    logits = batch_size * (length - 1) * model.vocab_size
    head = _rms_norm(n, width) + _product(n, width, model.vocab_size) + _SOFTMAX * logits
    total = model.num_layers * layer + head
    extra = None
    if model.memory is not None:
        extra = _memory_layer(model.memory, width, length, batch_size)
        total += model.memory.num_layers * sum(extra)
    return PublishedFlops(layer, extra, head, total)


def published_parameters(parameters: int, hidden_size: int, memory: PublishedMemory) -> int:
    """The published count for a model with ``parameters`` of ours.

    The published router has a row and a bias for each shared chapter as well, in each memory
    layer. Every sequence reads a shared chapter, whatever its logit, so that they have no gradient.
    """
    return parameters + memory.num_layers * memory.num_shared * (hidden_size + 1)


def _memory_layer(
    memory: PublishedMemory, width: int, length: int, batch_size: int
) -> MemoryLayerFlops:
    """Routing by the mean of the sequence, then attention to the chapters that it selects."""
    n, chapters = batch_size * length, memory.num_chapters
    rows = batch_size * (memory.num_shared + memory.top_k) * memory.tokens_per_chapter
    router = (
        batch_size * width * length  # the mean: sums and one division
        + _product(batch_size, width, chapters)
        + _SOFTMAX * batch_size * chapters
        + batch_size * chapters * max(1, math.ceil(math.log2(memory.top_k)))  # the selection
    )
    return MemoryLayerFlops(
        attention=_attention(n, rows // batch_size, rows, width, memory.kv_size, memory.num_heads),
        router=router,
        router_losses=_router_losses(batch_size, chapters, memory.top_k),
        weighting=rows * width + _rms_norm(rows, width),
        norm=_rms_norm(n, width),
        residual=n * width,
    )


def _router_losses(samples: int, chapters: int, top_k: int) -> int:
    """Load balance, auxiliary loss, z-loss and entropy, of which all are counted always."""
    column_sums = chapters * (samples - 1)
    counts = samples * chapters * (top_k - 1) + column_sums + chapters
    means = column_sums + chapters
    load_balance = chapters + (chapters - 1) + 1
    squares = samples * chapters + column_sums + chapters
    auxiliary = 2 * chapters + (chapters - 1) + 1
    z_loss = _SOFTMAX * samples * chapters + samples + (samples - 1) + 1
    entropy = _ENTROPY * samples * chapters
    return counts + means + load_balance + squares + auxiliary + z_loss + entropy


def _attention(n: int, keys: int, rows: int, width: int, kv_size: int, num_heads: int) -> int:
    """Projections of n queries and of all rows, and attention of each query to so many keys."""
    projections = 2 * _product(n, width, width) + 2 * _product(rows, width, kv_size)
    scores = n * keys * num_heads * (_SOFTMAX + _SCALE_AND_MASK)
    return projections + 4 * n * keys * width + scores


def _product(n: int, inner: int, outer: int) -> int:
    return 2 * n * inner * outer


def _rms_norm(vectors: int, width: int) -> int:
    return vectors * (4 * width + 4)
