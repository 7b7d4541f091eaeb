"""Parameters and floating-point operations of a model, part by part, without building it."""

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from memattn.checks import check_int, must

if TYPE_CHECKING:
    from memattn.models import MemAttnConfig


class EstimateLine(NamedTuple):
    """One part of a model, in all layers that have it."""

    name: str
    layers: int | None  # None for what stands beside the layers
    parameters: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Parameters and operations of a model.

    Attributes:
        lines: Its parts.
        length: Tokens of the sequence.
    """

    lines: tuple[EstimateLine, ...]
    length: int

    @property
    def parameters(self) -> int:
        """Of the whole model, each once."""
        return sum(line.parameters for line in self.lines)

    @property
    def flops(self) -> int:
        """Of one forward pass of one sequence."""
        return sum(line.flops for line in self.lines)

    def to_dict(self) -> dict[str, Any]:
        """The estimate as plain values that JSON can hold."""
        lines = [line._asdict() for line in self.lines]
        totals = {"parameters": self.parameters, "flops": self.flops}
        return {"length": self.length, **totals, "lines": lines}

    def print(self, title: str, console: Console | None = None) -> None:
        """Print the estimate as a table."""
        table = Table(title=title, title_justify="left")
        table.add_column("part")
        for name in ("layers", "parameters", f"FLOPs, {self.length:,} tokens", "share"):
            table.add_column(name, justify="right", overflow="fold")
        for line in self.lines:
            layers = "" if line.layers is None else str(line.layers)
            share = f"{line.flops / self.flops:.1%}"
            table.add_row(line.name, layers, f"{line.parameters:,}", f"{line.flops:,}", share)
        table.add_section()
        table.add_row("total", "", f"{self.parameters:,}", f"{self.flops:,}", "")
        (console or Console()).print(table)


def estimate(config: "MemAttnConfig", length: int | None = None) -> Estimate:
    """Parameters of a decoder, and operations of its forward pass over one sequence.

    Products with weight matrices and those of the operators for the keys that a token sees are
    counted; a multiplication and an addition are two operations. Norms, activations, softmaxes and
    the embedding are not counted.

    Args:
        config: Configuration of the decoder. Nothing of its size is allocated.
        length: Tokens of the sequence; None means ``max_position_embeddings``.

    Returns:
        A line for each part.

    Raises:
        ValueError: If ``length`` is below 1, or above what the model has positions for.
    """
    from memattn.models import MemAttnForCausalLM

    if length is None:
        length = config.max_position_embeddings
    check_int("length", length, 1)
    if config.position_limit is not None and length > config.position_limit:
        must("length", f"be at most position_limit={config.position_limit}", length)
    with torch.device("meta"):
        parameters = {n: p.numel() for n, p in MemAttnForCausalLM(config).named_parameters()}
    counts: dict[str, int] = defaultdict(int)
    layers: dict[str, set[str]] = defaultdict(set)
    for name, count in parameters.items():
        line, layer = _line_of(name)
        counts[line] += count
        if layer is not None:
            layers[line].add(layer)
    flops: dict[str, int] = defaultdict(int)
    for i in range(config.num_hidden_layers):
        for name, part in config.layer_parts(i).items():
            cost = part.cost(config.sizes, length, i)
            flops[name] += cost.flops
            counts[name] += 0  # a part without parameters of its own has a line, too
            layers[name].add(str(i))
    for name, part in config.named_parts().items():
        shared = part.shared_cost(config.sizes, length)
        if shared.parameters or shared.flops:
            flops[f"{name}, shared"] = shared.flops
    flops["mlp"] = 2 * length * counts["mlp"]  # it has no other parameters
    flops["output layer"] = 2 * length * config.hidden_size * config.vocab_size
    counts["output layer"] += 0  # those of the embedding, where they are tied
    order = ["embedding", *config.named_parts()]
    order += [name for name in counts if name not in order]
    return Estimate(
        lines=tuple(
            EstimateLine(name, len(layers[name]) or None, counts[name], flops[name])
            for name in order
            if counts[name] or flops[name]
        ),
        length=length,
    )


def _line_of(name: str) -> tuple[str, str | None]:
    """The line that a parameter of the decoder belongs to, and its layer."""
    words = name.removeprefix("model.").split(".")
    if words[0] == "layers":
        place = words[3] if words[2] == "parts" else words[2]
        return ("norms" if "norm" in words[2] else place), words[1]
    if words[0] == "shared_parts":
        return f"{words[1]}, shared", None
    if words[0].startswith("embed_"):
        return "embedding", None
    return ("output layer" if words[0] == "lm_head" else "norms"), None
