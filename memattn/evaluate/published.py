"""A memory transformer compared with the published figures of its authors."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from memattn.evaluate.estimate import Estimate, estimate
from memattn.evaluate.published_flops import (
    PublishedMemory,
    PublishedModel,
    published_flops,
    published_parameters,
)

if TYPE_CHECKING:
    from memattn.models import MemAttnConfig

KIND = "chapter_memory"


def published_model(config: "MemAttnConfig") -> PublishedModel | None:
    """The sizes that the published figures follow from.

    Returns:
        The sizes, or None for a decoder that has no chapter memory of the published form: one bank
        of full rank in chapters, between attention and MLP, in a decoder with rotary positions,
        RMSNorm and SwiGLU.
    """
    parts = config.named_parts()
    part: Any = parts.get(KIND)
    plain = (config.position_embedding, config.norm, config.mlp) == ("rope", "rms", "swiglu")
    if part is None or len(parts) != 2 or not plain or parts["attention"].kind != "causal":
        return None
    layers = [i for i in range(config.num_hidden_layers) if KIND in config.layer_parts(i)]
    low_rank = part.use_low_rank_memory or part.use_low_rank_projections
    if not layers or not part.use_chapters or part.memory_block_variant != "A" or low_rank:
        return None
    sizes = config.sizes
    heads = part.memory_num_heads or sizes.num_heads
    kv_heads = part.memory_num_kv_heads or heads
    return PublishedModel(
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=sizes.num_heads,
        kv_size=sizes.num_kv_heads * sizes.head_dim,
        intermediate_size=sizes.intermediate_size or 0,
        vocab_size=config.vocab_size,
        memory=PublishedMemory(
            num_layers=len(layers),
            num_chapters=part.num_chapters,
            num_shared=part.num_shared_chapters,
            top_k=part.top_k_chapters,
            tokens_per_chapter=part.num_memory_tokens // part.num_chapters,
            num_heads=heads,
            kv_size=kv_heads * (config.hidden_size // heads),
        ),
    )


def dense_twin(config: "MemAttnConfig", num_layers: int) -> "MemAttnConfig":
    """The same decoder without parts beside attention, with ``num_layers`` layers."""
    values = {**config.to_dict(), "parts": [], "num_hidden_layers": num_layers}
    return type(config).from_dict(values)


def print_published(
    config: "MemAttnConfig",
    own: Estimate,
    dense_layers: Sequence[int] = (),
    console: Console | None = None,
) -> None:
    """Print the published figures of a memory transformer next to our own, and their differences.

    Args:
        config: A configuration with a ``published_model``.
        own: Its estimate.
        dense_layers: Layers of decoders without memory to set beside it.
        console: Where to print; None means the standard output.
    """
    console = console or Console()
    model = published_model(config)
    assert model is not None and model.memory is not None
    memory, length = model.memory, own.length
    counts = published_flops(model, length)
    whole = published_parameters(own.parameters, model.hidden_size, memory)
    figures = {"with memory": (own.parameters, whole, own.flops, counts.total)}
    dense = {"without": model.num_layers} | {f"dense, {n} layers": n for n in dense_layers}
    for name, layers in dense.items():
        twin = estimate(dense_twin(config, layers), length)
        flops = published_flops(replace(model, num_layers=layers, memory=None), length).total
        figures[name] = (twin.parameters, twin.parameters, twin.flops, flops)
    table = Table(title=f"beside the published count, {length:,} tokens", title_justify="left")
    table.add_column("")
    for name in figures:
        table.add_column(name, justify="right", overflow="fold")
    names = ("parameters", "  as published", "FLOPs", "  as published")
    for name, row in zip(names, zip(*figures.values(), strict=True), strict=True):
        table.add_row(name, *(f"{figure:,}" for figure in row))
    console.print(table)
    extra = Table(title="the published FLOPs by place", title_justify="left")
    extra.add_column("place")
    extra.add_column("FLOPs", justify="right")
    assert counts.memory_layer is not None
    extra.add_row(f"a layer, of {model.num_layers}", f"{counts.layer:,}")
    extra.add_row(f"its memory, in {memory.num_layers}", f"{sum(counts.memory_layer):,}")
    for name, flops in counts.memory_layer._asdict().items():
        extra.add_row(f"  {name.replace('_', ' ')}", f"{flops:,}")
    extra.add_row("last norm, output layer, cross-entropy", f"{counts.head:,}")
    console.print(extra)
    for line in differences(model, whole - own.parameters):
        console.print(f"- {line}", highlight=False, soft_wrap=True)


def differences(model: PublishedModel, parameters: int) -> list[str]:
    """Where the two counts differ, a sentence each."""
    assert model.memory is not None
    memory = model.memory
    lines = []
    if parameters:
        lines.append(
            f"The published form has {parameters:,} parameters more: {memory.num_layers} layers x "
            f"{memory.num_shared} shared x ({model.hidden_size} + 1). Its router has a row and a "
            "bias for each shared chapter, which every sequence reads whatever its logit is, so "
            "that they get no gradient. Ours has none."
        )
    lines += [
        "The published FLOPs count attention over all pairs of tokens, ours those that a token "
        "sees: about half.",
        f"They project the {(memory.num_shared + memory.top_k) * memory.tokens_per_chapter:,} "
        "selected rows of the bank anew for each sequence. Ours routes by blocks of tokens, each "
        "from its own past, and projects what a batch selects once, at most the "
        f"{memory.num_chapters * memory.tokens_per_chapter:,} rows of the bank: more for one "
        "sequence, less for many.",
        "They count softmaxes, norms, activations, residuals, router losses and cross-entropy; "
        "ours count products alone.",
    ]
    return lines
